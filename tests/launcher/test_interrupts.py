"""Ctrl-C: the first saves and stops, the second ends everything within seconds, whatever the worker is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from runner.launcher.supervisor import GAP_SECONDS, KILL_SECONDS, HangDetector, Interrupts
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from tests.conftest import ROOT
from tests.support.processes import losses, only_run, sign, start, until, words

LONG = ("train.max_steps=2000", "train.save_every_steps=2", "data.max_examples=60")
TWO = ("hw.num_processes=2", "deepspeed=none")
Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(model: Path, tmp_path: Path) -> Iterator[Begin]:
    """Begin a run in `tmp_path`, a long one; it, and all below it, ends with the test."""
    fronts: list[subprocess.Popen[str]] = []

    def begun(*more: str, basis: tuple[str, ...] = LONG, **env: str) -> subprocess.Popen[str]:
        fronts.append(start(*words(model, tmp_path, *basis, *more), **env))
        return fronts[-1]

    yield begun
    for front in fronts:
        for one in [*below(front), front]:
            with suppress(psutil.Error, ProcessLookupError):
                one.kill()


def below(front: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process of a run but the front."""
    try:
        return psutil.Process(front.pid).children(recursive=True)
    except psutil.Error:
        return []


def ended(front: subprocess.Popen[str], processes: list[psutil.Process], seconds: float) -> str:
    """The run ends within so many seconds with 130, and nobody is left; what it said."""
    _, errors = front.communicate(timeout=seconds)
    assert front.returncode == 130 and "Traceback" not in errors, errors
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes), 5)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "signals"),
    [((), (signal.SIGINT, signal.SIGINT)), (TWO, (signal.SIGTERM, signal.SIGINT))],
    ids=["one process", "two under torchrun"],
)
def test_a_second_signal_ends_stopped_workers_within_seconds(
    tmp_path: Path, begin: Begin, more: tuple[str, ...], signals: tuple[int, int]
) -> None:
    front = begin(*more)
    run = RunDir(until(lambda: only_run(tmp_path)))
    until(lambda: len(checkpoints.complete(run)) > 0 and sign(run.path, 0).get("phase") == "training")
    processes = below(front)
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    front.send_signal(signals[0])
    time.sleep(2)
    assert front.poll() is None  # the first one waits for the step to end
    front.send_signal(signals[1])
    errors = ended(front, processes, KILL_SECONDS + 10)
    assert "Ctrl-C again ends the run at once" in errors and "Interrupted" in errors and "SIGKILL" not in errors
    assert run.read("status.json")["state"] == "interrupted"
    step = checkpoints.complete(run)[-1]
    assert f"what was trained until step {step} is in" in errors and f"resume {run.path}" in errors


def test_one_signal_is_enough_for_a_worker_that_has_not_begun(tmp_path: Path, begin: Begin) -> None:
    """It is stopped while it imports torch: there is nothing to save."""
    front = begin()
    worker = until(lambda: [p for p in below(front) if "runner.train" in p.cmdline()])
    worker[0].send_signal(signal.SIGSTOP)
    run = RunDir(until(lambda: only_run(tmp_path)))
    front.send_signal(signal.SIGTERM)
    errors = ended(front, worker, 15)
    assert "interrupted before there was anything to save" in errors
    assert run.read("status.json")["state"] == "interrupted"


@pytest.mark.slow
def test_a_signal_for_the_whole_service_saves_a_checkpoint(tmp_path: Path, begin: Begin) -> None:
    """systemd and Slurm tell every process, and the front passes it on: twice the same is no second one."""
    front = begin()
    run = RunDir(until(lambda: only_run(tmp_path)))
    until(lambda: (run.path / "metrics.jsonl").exists())
    processes = below(front)
    for process in (*processes, front):
        process.send_signal(signal.SIGTERM)
    errors = ended(front, processes, 60)
    step = run.read("status.json")["step"]
    assert f"stopped after step {step}" in errors and checkpoints.newest(run) == step


def test_a_third_signal_does_not_wait() -> None:
    assert not Interrupts([100.0]).urgent(1000.0)
    assert not Interrupts([100.0, 101.0]).urgent(101.5)
    assert Interrupts([100.0, 101.0]).urgent(101.0 + KILL_SECONDS + 0.1)
    assert Interrupts([100.0, 101.0, 101.5]).urgent(101.6)


# ── time that nobody lived through ─────────────────────────────────────────────────────────────


def test_only_time_that_was_lived_through_is_silence() -> None:
    silence, alive = HangDetector(last=0.0), [{"rank": 0, "beat": 5.0}]
    assert silence.seconds(alive, 0.5) == 0.0
    assert [silence.seconds(alive, t / 2) for t in (2, 3, 4)] == [0.5, 1.0, 1.5]
    assert silence.seconds(alive, 2.0 + 8 * 3600) == 0.0  # the lid was closed
    assert silence.seconds(alive, 2.5 + 8 * 3600) == 0.5  # from here on it counts again
    assert silence.seconds([{"rank": 0, "beat": -4000.0}], 3.0 + 8 * 3600) == 0.0  # a wall clock set back: still a sign


CLOCK = """
import time
began, real = time.monotonic(), time.time
jumps = (({forward}, 3 * 3600.0), ({back}, -9 * 3600.0))
time.time = lambda: real() + sum(by for after, by in jumps if time.monotonic() - began > after)
"""


@pytest.mark.slow
def test_a_run_that_was_suspended_goes_on_whatever_the_clock_says(tmp_path: Path, begin: Begin) -> None:
    """All of it stands still for longer than `train.hang_minutes`; wall clocks jump three hours ahead, nine back."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CLOCK.format(forward=2, back=12), "utf-8")
    hang = ("train.max_steps=150", "train.hang_minutes=0.15", *TWO)
    front = begin(*hang, basis=(), PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    run: Path = until(lambda: only_run(tmp_path))
    until(lambda: (run / "metrics.jsonl").exists())
    processes = [*below(front), psutil.Process(front.pid)]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(GAP_SECONDS + 10)  # torchrun's rendezvous would give a node up after 15 s
    for process in processes:
        process.send_signal(signal.SIGCONT)
    _, errors = front.communicate(timeout=240)
    assert front.returncode == 0, errors
    assert len(losses(run)) == 150
    assert 0 < RunDir(run).read("summary.json")["seconds"] < 600
