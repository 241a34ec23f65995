"""docs/runpod.md's journey prints what the page shows, and the way from rows to a published model, small and large."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.chaos_pods import pods_python
from benchmarks.journey import PAGE, commands, parts, retyped, typist
from tests.support.emulated import Emulator, emulator, needs_sshd
from tests.support.front import runner
from tests.support.hub import Hub, hub
from tests.support.processes import losses, only_run, start, tiny_model, words

__all__ = ["emulator", "hub"]  # fixtures

TEXT = PAGE.read_text("utf-8")


def test_the_quick_commands_of_the_page_print_what_stands_there(
    emulator: Emulator, hub: Hub, tmp_path: Path
) -> None:  # fmt: skip
    now = retyped(TEXT, typist(tmp_path, emulator.env, hub), ("quick",))
    assert list(parts(now, "quick")) == list(parts(TEXT, "quick")), "drifted: python -m benchmarks.journey"
    assert emulator.pods() == {}


def test_the_cost_on_the_page_is_known_and_adds_up() -> None:
    """Hours times price, of the first plan on the page; and what was paid is not more than its cap."""
    plan = next(part for part in parts(TEXT, "quick") if "\nCost " in part)
    usd, hourly = re.findall(r"\nCost +\$([\d.]+), at \$([\d.]+) an hour", plan)[0]
    minutes, seconds = re.findall(r"\nTime +(\d+) min (\d+) s", plan)[0]
    hours = (int(minutes) + int(seconds) / 60) / 60
    assert float(usd) == pytest.approx(hours * float(hourly), abs=0.006)
    assert "not known" not in TEXT[: TEXT.index("## Spending limits")]
    rows, examples = re.search(r"here (\d+) rows", TEXT), re.search(r"Data +(\d+) examples.*; (\d+) held out", TEXT)
    assert rows and examples and int(rows[1]) == int(examples[1]) + int(examples[2])


def test_every_longer_command_of_the_page_is_shown_with_what_it_printed() -> None:
    found = [command for part in parts(TEXT, "full") for command in commands(part)]
    verbs = [word for command in found for word in re.findall(r"python -m runner (\w+)\b(?![.=])", command.text)]
    assert verbs == ["pods", "chat", "chat", "merge", "push", "deploy", "deploy"]
    for command in found:
        assert command.output.strip(), command.text
    assert "gone, which was confirmed" in found[0].output and "No pods" in found[1].output


# ── a dataset of questions and answers: small here, large on RunPod, both on the Hub ──────────────

ROWS = [{"prompt": f"What is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(40)]


@pytest.fixture
def qa(tmp_path: Path) -> Path:
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return file


@needs_sshd
def test_small_here_large_in_a_pod_and_both_on_the_hub(
    emulator: Emulator, hub: Hub, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The four commands that the project began with: train a small model, train a large one, gpus, list.

    The words are the same for both models: where=auto. In the pod of the 70B trains benchmarks/pod_training.
    """
    visible = Path(sys.prefix) / f"pods-python-{tmp_path.name}"  # from inside of a pod, which has a /tmp of its own
    env = {
        **emulator.env, **hub.env(), "RUNNER_STATE": str(tmp_path / "state"), "RUNNER_CLOUD_PACE": "0.1",
        "RUNNER_POD_PYTHON": str(pods_python(visible)),
    }  # fmt: skip
    try:
        small, large = tmp_path / "small", tmp_path / "large"
        common = (f"data.path={qa}", "where=auto", "push.to=me/tuned", "where.max_usd=20", "--yes")
        tiny = words(tiny_model(tmp_path / "tiny"), small, *common)
        done = start(*tiny, **env)
        out, err = done.communicate(timeout=240)
        assert done.returncode == 0, out + err
        run = only_run(small)
        assert run and len(losses(run)) == 12 and "where=auto: here" in out + err
        assert (run / "pushed.json").is_file() and "adapter_model.safetensors" in hub.files
        assert not any(e.method == "POST" for e in emulator.exchanges)  # nothing was asked for

        more = ("model=llama2_70b", "method=qlora4", "train.max_steps=80", f"run.output_dir={large}")
        done = start(*more, *common, **env)
        out, err = done.communicate(timeout=240)
        said = out + err
        assert done.returncode == 0 and "; rented, hw=" in said and "gone, which was confirmed" in said, said
        run = only_run(large)
        assert run and len(losses(run)) == 80 and json.loads((run / "pushed.json").read_text("utf-8"))["repo"]
        rents, planned = re.search(r"about \$([\d.]+) for", said), json.loads((run / "plan.json").read_text("utf-8"))
        assert rents and float(rents[1]) == planned["usd"]  # what is agreed to is what was planned, disks included
        (create,) = [e for e in emulator.exchanges if e.method == "POST" and e.path == "/v2/pods"]
        assert create.body["gpu"]["id"] == json.loads((run / "pod.json").read_text("utf-8"))["gpu"]
        assert emulator.pods() == {}
    finally:
        visible.unlink(missing_ok=True)

    monkeypatch.setenv("RUNNER_STATE", str(tmp_path / "state"))
    gpus = json.loads(runner("gpus", "--json").stdout)
    assert {"NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3"} <= {row["id"] for row in gpus}
    listed = runner("pods", "list", "--json")
    assert listed.exit_code == 0 and json.loads(listed.stdout) == []
