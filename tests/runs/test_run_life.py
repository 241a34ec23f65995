"""A run from outside: repeated, killed, interrupted, tracked, swept. Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, all_runs
from tests.conftest import ROOT, SHORT, run_cli


def short(tmp_path: Path, *overrides: str) -> list[str]:
    return [*SHORT, "eval.num_prompts=0", f"run.output_dir={tmp_path / 'runs'}", *overrides]


def the_run(tmp_path: Path) -> RunDir:
    runs = all_runs(tmp_path / "runs")
    assert len(runs) == 1
    return runs[0]


@pytest.mark.slow
def test_spec_json_repeats_the_run_exactly(tmp_path: Path) -> None:
    run_cli(*short(tmp_path, "train.max_steps=3", "method.dropout=0.1"), code=0)
    run = the_run(tmp_path)
    again = run_cli(str(run.spec_file), "--json", code=0)
    summary = json.loads(again.stdout)
    assert summary["run_id"] != run.id
    repeated = RunDir(tmp_path / "runs" / summary["run_id"])
    keys = ("step", "loss", "grad_norm", "learning_rate")
    assert [[line[k] for k in keys] for line in run.metrics()] == [[x[k] for k in keys] for x in repeated.metrics()]
    assert run.read("spec.json") == repeated.read("spec.json")
    facts = run.read("environment.json")
    assert facts["data_fingerprint"] == repeated.read("environment.json")["data_fingerprint"]
    assert facts["packages"]["torch"] and facts["model_source"]


def start(tmp_path: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run in the background, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *short(tmp_path, *overrides)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_step(tmp_path: Path, step: int) -> RunDir:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for run in all_runs(tmp_path / "runs"):
            if any(line["step"] >= step for line in run.metrics()):
                return run
        time.sleep(0.05)
    raise AssertionError("the run did not get to its first steps")


@pytest.mark.slow
def test_kill_leaves_nothing_that_a_later_command_trips_over(tmp_path: Path) -> None:
    process = start(tmp_path, "train.max_steps=400", "train.save_every_steps=2")
    run = wait_for_step(tmp_path, 3)
    os.killpg(process.pid, signal.SIGKILL)  # the front
    worker = run.read("status.json")["pid"]
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while run.state() != "killed" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.state() == "killed"
    assert not (run.path / "model").exists()
    for checkpoint in (run.path / "checkpoints").glob("checkpoint-*"):
        if (checkpoint / "COMPLETE").exists():
            assert (checkpoint / "adapter_model.safetensors").stat().st_size > 0
    listed = run_cli("runs", "--output-dir", str(tmp_path / "runs"), "--json")
    assert [row["state"] for row in json.loads(listed.stdout)] == ["killed"]
    talk = run_cli("chat", str(run.path), "--prompt", "hello")
    assert talk.returncode == 2 and "killed" in talk.stderr and "Traceback" not in talk.stderr
    run_cli(str(run.spec_file), "train.max_steps=1", code=0)


def test_a_killed_worker_is_reported_by_the_front(tmp_path: Path) -> None:
    process = start(tmp_path, "train.max_steps=400")
    run = wait_for_step(tmp_path, 1)
    os.kill(run.read("status.json")["pid"], signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert run.state() == "failed" and "SIGKILL" in run.read("status.json")["error"]


@pytest.mark.slow
def test_sigterm_saves_a_complete_checkpoint_and_exits_130(tmp_path: Path) -> None:
    process = start(tmp_path, "train.max_steps=400")
    run = wait_for_step(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert run.state() == "interrupted"
    step = run.read("status.json")["step"]
    checkpoint = checkpoints.folder(run, step)
    assert checkpoints.facts(checkpoint)["step"] == step and checkpoints.damage(checkpoint) == []
    assert (checkpoint / "optimizer.pt").stat().st_size > 0
    assert f"after step {step}" in err and "Traceback" not in err


@pytest.mark.slow
def test_tensorboard_events_can_be_read_back(train: Callable[..., Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = train("track=tensorboard", "train.max_steps=3", "eval.num_prompts=0")
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    read = [round(event.value, 4) for event in events.Scalars("train/loss")]
    assert read == [round(line["loss"], 4) for line in run.metrics()]


@pytest.mark.slow
def test_wandb_offline_leaves_a_run_that_wandb_reads(tmp_path: Path) -> None:
    done = run_cli(*short(tmp_path, "track=wandb", "train.max_steps=3"), code=0, WANDB_MODE="", WANDB_API_KEY="")
    assert "recorded offline (no key" in done.stdout
    run = the_run(tmp_path)
    (folder,) = (run.path / "wandb").glob("offline-run-*")
    read = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    history = [record["history"]["item"] for record in map(json.loads, read.stdout.splitlines())
               if record["type"] == "history"]  # fmt: skip
    losses = [float(item["train/loss"]) for item in history if "train/loss" in item]
    assert losses == pytest.approx([line["loss"] for line in run.metrics()])


@pytest.mark.slow
def test_wandb_without_network_says_so_and_goes_on(tmp_path: Path) -> None:
    done = run_cli(
        *short(tmp_path, "track=wandb", "train.max_steps=1"),
        WANDB_MODE="online", WANDB_API_KEY="x" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stdout


@pytest.mark.slow
def test_sweep_goes_on_after_a_failure_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "not_a_model"
    folder.mkdir()
    done = run_cli(
        "-m", *short(tmp_path, "train.max_steps=2", f"model.id={folder},HuggingFaceTB/SmolLM2-135M-Instruct",
                     "model.package=null", "model.gguf_file=null"),
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 1
    (file,) = (tmp_path / "runs" / "sweeps").glob("*/sweep.json")
    rows = json.loads(file.read_text("utf-8"))["runs"]
    assert len(rows) == 2 and all(row["exit_code"] and row["error"] for row in rows)  # each has its reason
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [(), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")], ids=["basic", "joblib"]
)
def test_sweep_table_is_sorted_by_the_metric(launcher: tuple[str, ...], tmp_path: Path) -> None:
    words = ["train.max_steps=3", "train.learning_rate=1e-5,1e-3", *launcher]
    done = run_cli("-m", *short(tmp_path, *words), code=0)
    (file,) = (tmp_path / "runs" / "sweeps").glob("*/sweep.json")
    rows = json.loads(file.read_text("utf-8"))["runs"]
    assert [row["exit_code"] for row in rows] == [0, 0]
    assert rows[0]["metric"] < rows[1]["metric"]
    assert "train.learning_rate=0.001" in rows[0]["overrides"] or "train.learning_rate=1e-3" in rows[0]["overrides"]
    assert len({row["run_id"] for row in rows}) == 2
    assert done.stdout.index(rows[0]["run_id"][-6:]) < done.stdout.rindex(rows[1]["run_id"][-6:])
