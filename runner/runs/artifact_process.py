"""Write a folder of weights from a finished run, in a worker process: complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

from runner.errors import CannotRunError, Problem, RequestError, RunFailedError
from runner.launcher import inherited_ranks
from runner.machine import writable
from runner.report.invocation import install
from runner.rundir.atomic_folder import unfinished
from runner.rundir.directory import RunDir

MODULE = "runner.train.artifact_verbs"
# No GPU is needed to read what DeepSpeed wrote, and without one its import would announce that it found none.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}


def environment() -> dict[str, str]:
    """What a process finds that is no run: one, wherever another launcher placed this one."""
    return {**ENVIRONMENT, **inherited_ranks.cleaned(os.environ)}


def produce(verb: str, run: RunDir, target: Path, *arguments: str) -> int:
    """Have `verb` write `target` from the run; its exit code. Nothing of a killed one is left.

    RequestError where `target` exists or cannot be made; CannotRunError without torch; RunFailedError if killed.
    """
    _check(target)
    command = [sys.executable, "-m", MODULE, verb, str(run.spec_file), "--out", str(target), *arguments]
    worker = subprocess.Popen(command, env=environment())
    try:
        return waited(worker)
    finally:
        shutil.rmtree(unfinished(target, worker.pid), ignore_errors=True)


def waited(worker: subprocess.Popen[Any]) -> int:
    """Its exit code; RunFailedError if it was killed. A signal to this process is passed on, and it tidies up and ends:
    on a terminal Ctrl-C reaches it by itself."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: worker.send_signal(number))
    code = None
    try:
        while code is None:
            try:
                code = worker.wait()
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    worker.send_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code < 0:
        remedy = "the system's log (dmesg) says whether memory ran out" if code == -signal.SIGKILL else None
        raise RunFailedError(Problem(f"the process was ended by {signal.Signals(-code).name}", None, remedy))
    return code


def _check(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RequestError(Problem(f"{target} exists", "--out", "name another folder with --out, or delete this one"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(Problem(f"{target} cannot be made: {error.strerror}", "--out")) from None
    if why := writable.why_not(target.parent):  # os.access says yes to root, also in /proc
        what = f"{target.parent} cannot be written to: {why}"
        raise RequestError(Problem(what, "--out", "name another folder with --out"))
    if util.find_spec("torch") is None or util.find_spec("peft") is None:
        what = "this needs torch, transformers and peft, which are not installed"
        raise CannotRunError(Problem(what, None, install("train")))
