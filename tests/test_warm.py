"""The runs of a sweep on this machine share one start-up, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.execute.warm import WarmWorkers, can_fork
from runner.rundir import RunDir
from tests.conftest import spec_of
from tests.processes import losses, start, tiny_model, until, words

SHORT = ("train.max_steps=4", "eval.num_prompts=2", "eval.max_new_tokens=4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("warm") / "model")


def by_rate(out: Path) -> dict[float, RunDir]:
    """The runs by their learning rate."""
    runs = [RunDir(file.parent) for file in sorted(out.glob("*/spec.json"))]
    return {run.read("spec.json")["train"]["learning_rate"]: run for run in runs}


def told(process: object) -> tuple[int, str]:
    out, error = process.communicate(timeout=100)  # type: ignore[attr-defined]
    return process.returncode, out + error  # type: ignore[attr-defined]


def test_the_runs_of_a_sweep_are_those_of_runs_alone(model: Path, tmp_path: Path) -> None:
    swept, alone = tmp_path / "swept", tmp_path / "alone"
    code, said = told(start("-m", *words(model, swept, *SHORT), "train.learning_rate=1e-3,3e-3"))
    assert code == 0, said
    code, said = told(start(*words(model, alone, *SHORT), "train.learning_rate=3e-3"))
    assert code == 0, said
    (single,) = by_rate(alone).values()
    runs = by_rate(swept)
    assert losses(runs[3e-3].path) == losses(single.path) != losses(runs[1e-3].path)
    for key in ("before", "after"):
        assert runs[3e-3].read("summary.json")["eval"][key] == single.read("summary.json")["eval"][key]
    pids = {run.read("status.json")["pid"] for run in runs.values()}
    assert len(pids) == 2
    weights = [run.path / "model" / "adapter_model.safetensors" for run in (runs[3e-3], single)]
    assert len({file.read_bytes() for file in weights}) == 1
    for run in runs.values():  # each has its own log, and the words of no other
        assert (run.path / "logs" / "run.log").read_text("utf-8").count("Loading torch and transformers") == 1


def test_a_killed_run_costs_only_itself(model: Path, tmp_path: Path) -> None:
    process = start(
        "-m", *words(model, tmp_path, *SHORT), "train.learning_rate=1e-3,3e-3", "train.max_steps=60,4", "--json"
    )
    first = until(lambda: next((r for r in by_rate(tmp_path).values() if len(list(r.metrics())) > 1), None))
    parent = int(Path(f"/proc/{first.read('status.json')['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    assert parent != process.pid
    os.kill(first.read("status.json")["pid"], signal.SIGKILL)
    code, said = told(process)
    assert code == 1
    rows = json.loads(said[said.index("[\n") : said.rindex("]") + 1])
    assert sorted(row["exit_code"] for row in rows)[-1] == 1 and any(row["exit_code"] == 0 for row in rows), rows


def test_one_whose_forking_process_is_killed_starts_anew(model: Path, tmp_path: Path) -> None:
    process = start(
        "-m", *words(model, tmp_path, "eval.num_prompts=0"), "train.learning_rate=1e-3,3e-3", "train.max_steps=60"
    )
    first = until(lambda: next((r for r in by_rate(tmp_path).values() if len(list(r.metrics())) > 1), None))
    pid = first.read("status.json")["pid"]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    code, said = told(process)
    assert code == 1
    states = [run.read("status.json")["state"] for run in by_rate(tmp_path).values()]
    assert states.count("done") == 1 and len(states) == 2, said


def test_ctrl_c_ends_the_sweep_with_a_checkpoint(model: Path, tmp_path: Path) -> None:
    process = start(
        "-m", *words(model, tmp_path, "eval.num_prompts=0"), "train.learning_rate=1e-3,3e-3", "train.max_steps=4000"
    )
    first = until(lambda: next((r for r in by_rate(tmp_path).values() if len(list(r.metrics())) > 1), None))
    pid = first.read("status.json")["pid"]
    process.send_signal(signal.SIGINT)
    code, said = told(process)
    assert code == 130, said
    assert len(by_rate(tmp_path)) == 1 and first.state() == "interrupted"
    assert list((first.path / "checkpoints").glob("*/COMPLETE"))
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_where_the_libraries_cannot_be_imported_the_run_starts_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = sys.executable
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    workers = WarmWorkers()
    process = workers.start(
        RunDir(tmp_path), spec_of("hw=cpu"), None, lambda: subprocess.Popen([python, "-c", "raise SystemExit(7)"])
    )
    assert process.wait(30) == 7
    workers.close()


@pytest.mark.parametrize(
    ("overrides", "forks"),
    [(("hw=cpu",), True), (("hw=cpu", "hw.num_processes=2"), False), (("hw=h100",), False)],
)
def test_only_one_process_on_a_cpu_is_forked(overrides: tuple[str, ...], forks: bool) -> None:
    assert can_fork(spec_of(*overrides)) is forks
