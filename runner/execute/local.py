"""Run here: the worker in a process of its own, so that nothing it does can take the front down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from types import FrameType

from rich.console import Console

from runner.errors import CannotRunError, NotYetError, Problem, RunFailedError
from runner.execute.killed import killer, oom_kills
from runner.hardware import why_not_here
from runner.report.autopsy import report
from runner.report.problems import print_problems
from runner.rundir import ACTIVE, RunDir
from runner.spec import LaterObjective, LocalPlace, RunSpec

# glibc gives every freed block of a few MiB back to the kernel and pays page faults to get it again,
# step after step: 285 tokens/s instead of 428 (SmolLM2, LoRA, 512 tokens, two cores, 8 steps). So: let it keep
# blocks up to 32 MiB: 8 MiB gave 264 tokens/s where 32 MiB gave 391 and 4 GiB 378 (256 tokens, 60 steps).
# DeepSpeed, where installed, is imported by accelerate and would announce that it found no GPU.
CPU_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "DS_ACCELERATOR": "cpu",
}

Handler = Callable[[int, FrameType | None], object] | int | None


@dataclass(frozen=True)
class Outcome:
    """How a worker ended."""

    run: RunDir
    exit_code: int


def check(spec: RunSpec) -> None:
    """Refuse, before anything is made or started, what this machine or this version cannot run."""
    reason = why_not_here(spec.hw) if isinstance(spec.where, LocalPlace) else None
    if reason:
        raise CannotRunError(
            Problem(
                reason,
                f"hw={spec.hw.name}",
                "hw=local uses what this machine has; python -m runner list hw shows the rest",
            )
        )
    later = list(_not_yet(spec))
    if later:
        raise NotYetError(*later)
    if util.find_spec("torch") is None or util.find_spec("trl") is None:
        raise CannotRunError(
            Problem(
                "training needs torch, transformers, trl and peft, which are not installed",
                None,
                'pip install "llm-finetuning-runner[train]", or make setup in a checkout',
            )
        )


def _not_yet(spec: RunSpec) -> Iterator[Problem]:
    """What a run may ask for and this version does not do."""
    if isinstance(spec.objective, LaterObjective):
        what = f"objective={spec.objective.name} is not supported yet: this version has no trainer for it"
        yield Problem(what, None, "use objective=sft")
    if not isinstance(spec.where, LocalPlace):
        what = f"where={spec.where.name} is not supported yet: this version cannot rent a pod"
        yield Problem(what, None, "use where=local on the machine with the GPU")
    elif spec.hw.world_size > 1:
        one = "hw.num_gpus=1" if spec.hw.accelerator == "cuda" else "hw.num_processes=1"
        what = f"hw={spec.hw.name} takes {spec.hw.world_size} processes, not supported yet: this version launches one"
        yield Problem(what, None, f"use {one}")
    if spec.deepspeed.name not in ("none", "auto"):
        what = f"deepspeed={spec.deepspeed.name} is not supported yet: this version does not launch DeepSpeed"
        yield Problem(what, None, "use deepspeed=none")


def execute(run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False) -> Outcome:
    """Start the worker on `run`, pass signals on, wait; the exit code is the worker's.

    `quiet_stdout` sends the worker's words to standard error and keeps standard output for JSON.
    """
    command = [sys.executable, "-m", "runner.train", str(run.spec_file)]
    environment = {**(CPU_ENV if spec.hw.accelerator == "cpu" else {}), **os.environ, **spec.hw.env}
    counts = oom_kills()
    worker = subprocess.Popen(command, env=environment, stdout=sys.stderr if quiet_stdout else None)
    previous = {number: signal.signal(number, _forward(worker)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = worker.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code == -signal.SIGKILL:
        print_problems(Console(stderr=True), report(run, spec, killer(counts, oom_kills())))
    elif code < 0:  # killed from outside: the worker could not say so itself
        error = RunFailedError(Problem(f"the worker was ended by {signal.Signals(-code).name}"))
        run.set_status("failed", exit_code=1, error=str(error))
        print_problems(Console(stderr=True), error)
    elif code and run.read("status.json").get("oom"):
        print_problems(Console(stderr=True), report(run, spec))
    elif code and run.state() in (*ACTIVE, "killed"):
        run.set_status("failed", exit_code=code, error=f"the worker ended with exit code {code}")
    code = 1 if code < 0 else code
    return Outcome(run, code)


def _forward(worker: subprocess.Popen[bytes]) -> Callable[[int, FrameType | None], None]:
    """On a terminal Ctrl-C reaches the worker by itself; SIGTERM has to be handed on."""

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM or not sys.stdin.isatty():
            worker.send_signal(number)

    return handle
