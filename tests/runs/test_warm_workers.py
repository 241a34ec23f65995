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

from runner.launcher.warm_workers import WarmWorkers, can_fork
from runner.rundir.directory import RunDir
from runner.train.evaluation import baseline
from tests.conftest import spec_of
from tests.support.processes import losses, start, until, words

ONE = "hw.num_cpus=1"  # two threads wait for one another on a machine with other work to do
SHORT = (ONE, "train.max_steps=4", "eval.num_prompts=2", "eval.max_new_tokens=4")


def by_rate(out: Path) -> dict[float, RunDir]:
    """The runs by their learning rate."""
    runs = [RunDir(file.parent) for file in sorted(out.glob("*/spec.json"))]
    return {run.read("spec.json")["train"]["learning_rate"]: run for run in runs}


def in_order(out: Path) -> list[RunDir]:
    """The runs in the order in which they were started."""
    runs = [RunDir(file.parent) for file in out.glob("*/spec.json")]
    return sorted(runs, key=lambda run: run.read("status.json")["created"])


def same_but_time(*files: Path) -> bool:
    """JSON lines that say the same, but for when."""
    said = [[{**json.loads(line), "time": 0} for line in file.read_text("utf-8").splitlines()] for file in files]
    return bool(said[0]) and said[0] == said[1]


def told(process: object) -> tuple[int, str]:
    out, error = process.communicate(timeout=300)
    return process.returncode, out + error


@pytest.mark.slow
def test_the_runs_of_a_sweep_are_those_of_runs_alone(model: Path, tmp_path: Path) -> None:
    # Dropout draws from the generator that a measurement draws from, too.
    swept, alone, shared = tmp_path / "swept", tmp_path / "alone", ("method.dropout=0.2", *SHORT)
    code, said = told(start("-m", *words(model, swept, *shared), "train.learning_rate=1e-3,3e-3", "method.rank=4,8"))
    assert code == 0, said
    assert said.count("Loading torch and transformers") == 1
    assert list((swept / "sweeps").glob("*/before-*.json"))
    code, said = told(start(*words(model, alone, *shared), "train.learning_rate=3e-3", "method.rank=8"))
    assert code == 0, said
    (single,) = by_rate(alone).values()
    runs = in_order(swept)
    assert losses(runs[3].path) == losses(single.path)
    assert len({tuple(losses(run.path)) for run in runs}) == len(runs) == 4
    assert same_but_time(runs[3].path / "evals.jsonl", single.path / "evals.jsonl")
    assert (runs[3].path / "answers_before.jsonl").read_bytes() == (single.path / "answers_before.jsonl").read_bytes()
    for key in ("before", "after"):
        assert runs[3].read("summary.json")["eval"][key] == single.read("summary.json")["eval"][key]
    assert len({run.read("status.json")["pid"] for run in runs}) == 4
    weights = [run.path / "model" / "adapter_model.safetensors" for run in (runs[3], single)]
    assert len({file.read_bytes() for file in weights}) == 1
    for number, run in enumerate(runs):  # each has its own log, and the words of no other
        log = (run.path / "logs" / "run.log").read_text("utf-8")
        assert log.count("Tokenising …") == 1
        assert (f"(measured by {runs[0].id})" in log) is (number > 0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora4", "qlora8", "freeze"])
def test_a_run_that_takes_the_measurement_over_trains_as_alone(method: str, model: Path, tmp_path: Path) -> None:
    swept, alone, last = tmp_path / "swept", tmp_path / "alone", "train.learning_rate=3e-3"
    short = (ONE, f"method={method}", "train.max_steps=2", "eval.num_prompts=2", "eval.max_new_tokens=4")
    code, said = told(start("-m", *words(model, swept, *short), "train.learning_rate=1e-3,3e-3"))
    assert code == 0 and said.count("measured by") == 1, said
    code, said = told(start(*words(model, alone, *short), last))
    assert code == 0, said
    (single,) = in_order(alone)
    assert losses(in_order(swept)[1].path) == losses(single.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "varied",
    [
        ("method=lora,full", "train.precision=fp32,bf16"),  # other arithmetic each
        ("hw.num_cpus=1,2", "train.max_length=64,96"),  # another environment, and another number of threads
        ("eval.max_new_tokens=4,6", "train.seed=1,2"),  # other answers, and other rows held out
    ],
)
def test_what_differs_before_training_is_measured_by_each(varied: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    swept, alone = tmp_path / "swept", tmp_path / "alone"
    short = (ONE, "train.max_steps=2", "eval.num_prompts=2", "eval.max_new_tokens=4", "train.batch_size=4")
    code, said = told(start("-m", *words(model, swept, *short), *varied))
    assert code == 0, said
    assert "measured by" not in said
    last = [f"{word.partition('=')[0]}={word.rpartition(',')[2]}" for word in varied]
    code, said = told(start(*words(model, alone, *short), *last))
    assert code == 0, said
    (single,) = in_order(alone)
    run = in_order(swept)[-1]
    assert losses(run.path) == losses(single.path)
    for key in ("before", "after"):
        assert run.read("summary.json")["eval"][key] == single.read("summary.json")["eval"][key]
    threads = [one.read("environment.json")["num_threads"] for one in (run, single)]
    assert threads[0] == threads[1] and (threads[0] == 2 or "hw.num_cpus=1,2" not in varied)


@pytest.mark.slow
def test_a_run_that_raises_costs_only_itself(model: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(model, torn)
    config = json.loads((torn / "config.json").read_text("utf-8"))  # wider than the weights: only loading finds it
    (torn / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    options = [
        word for word in words(model, tmp_path / "runs", ONE, "train.max_steps=2") if not word.startswith("model.id")
    ]
    code, said = told(start("-m", *options, f"model.id={torn},{model}"))
    assert code == 1
    bad, good = in_order(tmp_path / "runs")
    assert bad.state() == "failed" and good.state() == "done", said
    assert bad.read("status.json")["error"] in said and len(losses(good.path)) == 2


@pytest.mark.parametrize(
    ("overrides", "counts"),
    [
        (("train.learning_rate=3e-3", "train.max_steps=7", "method.rank=4", "run.name=other"), False),
        (("method.rank=4", "method.use_dora=true"), True),
        (("method.rank=4", "method.init=pissa"), True),
        (("train.micro_batch_size=1",), True),
        (("train.packing=false",), True),
        (("train.attention=sdpa",), True),
        (("eval.max_new_tokens=5",), True),
        (("data.system_prompt=Briefly.",), True),
        (("method=qlora4",), True),
    ],
)
def test_runs_share_what_the_model_was_before(overrides: tuple[str, ...], counts: bool, tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "one").mkdir(parents=True)
    usual, changed = (
        spec_of("hw=cpu", "train.micro_batch_size=2"),
        spec_of("hw=cpu", "train.micro_batch_size=2", *overrides),
    )
    files = []
    for name, spec in (("a", usual), ("b", changed)):
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        run.write("status.json", {"sweep": "one"})
        files.append(baseline.baseline_file(spec, run))
    assert None not in files
    assert (files[0] != files[1]) is counts


def test_other_files_and_other_versions_share_nothing(tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "one").mkdir(parents=True)
    run, spec = RunDir(tmp_path / "a"), spec_of("hw=cpu")
    run.path.mkdir()
    assert baseline.baseline_file(spec, run) is None  # no sweep's
    run.write("status.json", {"sweep": "one"})
    found = {baseline.baseline_file(spec, run)}
    for file in ("environment.json", "inputs.json"):
        for digest in "ab":
            run.write(file, {"model.id": digest})
            found.add(baseline.baseline_file(spec, run))
    assert len(found) == 5


@pytest.mark.slow
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


@pytest.mark.slow
def test_one_whose_forking_process_is_killed_starts_anew(model: Path, tmp_path: Path) -> None:
    process = start(
        "-m", *words(model, tmp_path, ONE, "eval.num_prompts=0"), "train.learning_rate=1e-3,3e-3", "train.max_steps=60"
    )
    first = until(lambda: next((r for r in by_rate(tmp_path).values() if len(list(r.metrics())) > 1), None))
    pid = first.read("status.json")["pid"]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    code, said = told(process)
    assert code == 1
    states = [run.read("status.json")["state"] for run in by_rate(tmp_path).values()]
    assert states.count("done") == 1 and len(states) == 2, said


@pytest.mark.slow
def test_ctrl_c_ends_the_sweep_with_a_checkpoint(model: Path, tmp_path: Path) -> None:
    process = start(
        "-m",
        *words(model, tmp_path, ONE, "eval.num_prompts=0"),
        "train.learning_rate=1e-3,3e-3",
        "train.max_steps=4000",
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
