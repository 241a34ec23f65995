"""Watches the processes of a run: passes signals on, ends all when one fails, finds one that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from runner.errors import Problem
from runner.execute.torchrun import MEETING_SECONDS
from runner.rundir import RunDir, alive

GRACE_SECONDS = 5.0
"""After one process failed, the others may end by themselves; torchrun alone would wait for 30 s."""
STACK_SECONDS = 1.0
"""What SIGUSR1 needs to write the stacks."""
SLOW = 4
"""Loading and saving show no sign of life in between: they may take so many times longer. So may Python starting, but
never less than the machines may take to meet."""
LAUNCHER_LOG = "launcher.log"
_FAILED = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-\d+) ")
"""In torchrun's summary. Its line on the first failure counts whole seconds: of a killed process and one that lost it
right after, it may name the second."""


@dataclass
class Ending:
    """How the processes ended."""

    code: int
    """Exit code of the launched process; negative: the signal that ended it."""
    ranks: list[dict[str, Any]]
    """The last sign of life of every process on this machine, by rank; then what others have said that failed."""
    hung: dict[str, Any] | None = None
    """That of the process that was furthest behind, if all were ended for want of life."""
    silent_seconds: float = 0.0
    killed: dict[int, int] = field(default_factory=dict)
    """Signals by rank, of processes that were ended from outside."""
    stopped: set[int] = field(default_factory=set)
    """Ranks that were ended here because another one had failed: what their end looks like says nothing."""
    interrupted: bool = False
    """A signal came before there was a process to hand it to, or a second time."""
    lost: Problem | None = None
    """What became of another machine, if that is why all were ended."""


def signs(run: RunDir, own: range | None = None) -> list[dict[str, Any]]:
    """`logs/rank<k>.json` of the processes on this machine, by rank. Where several machines share the folder, `own`
    are this one's ranks: names of rented machines are not always different."""
    here = socket.gethostname()
    return [s for s in _all_signs(run) if (s.get("host") == here if own is None else s["rank"] in own)]


def elsewhere(run: RunDir, own: range) -> list[dict[str, Any]]:
    """Those of other machines' processes that have failed, or were interrupted alone: before the first step or after
    the last one.

    No other end is one that all the others share in by themselves.
    """
    others = [sign for sign in _all_signs(run) if sign["rank"] not in own]
    return [s for s in others if s["state"] == "failed" or (s["state"] == "interrupted" and not s.get("agreed"))]


def _all_signs(run: RunDir) -> list[dict[str, Any]]:
    found = []
    for file in (run.path / "logs").glob("rank*.json"):
        try:
            found.append(json.loads(file.read_text("utf-8")))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda sign: int(sign["rank"]))


def forget(run: RunDir, own: range | None = None) -> None:
    """Signs of an earlier attempt go: all, or those of one machine's ranks."""
    for file in (run.path / "logs").glob("rank*.json"):
        if own is None or file.stem in {f"rank{rank}" for rank in own}:
            file.unlink(missing_ok=True)


def watch(
    process: subprocess.Popen[Any], run: RunDir, hang_minutes: float | None, own: range | None = None,
    log: str = LAUNCHER_LOG, lost: Callable[[], Problem | None] = lambda: None, asked: Sequence[int] = (),
) -> Ending:  # fmt: skip
    """Until the process has ended, by itself or because one of its processes failed or hangs.

    Where there are several machines: `own` are this one's ranks, and `lost` tells when another one was lost. `asked`
    are the signals that no worker will answer.
    """
    began = time.time()
    failed_at = over_at = None
    cause: Problem | None = None
    stopped: set[int] = set()
    while True:
        try:
            code = process.wait(timeout=0.5)
            killed = _signals(run, log)
            return Ending(code, signs(run, own), None, 0.0, killed, stopped, interrupted=bool(asked), lost=cause)
        except subprocess.TimeoutExpired:
            pass
        ranks, now = signs(run, own), time.time()
        if own and _over(ranks, own):
            over_at = over_at or now
            if now - over_at > GRACE_SECONDS:  # torchrun waits 5 minutes for those of the other machines
                process.kill()
                process.wait()
                return Ending(int(any(sign["state"] == "failed" for sign in ranks)), ranks, lost=cause)
        broken = any(gone(sign) for sign in ranks) or (own and elsewhere(run, own)) or (asked and not ranks)
        cause = cause or (None if broken else lost())
        if broken or cause:
            failed_at = failed_at or now
            if now - failed_at > GRACE_SECONDS:
                stopped |= _kill(ranks)
                if not ranks:
                    process.kill()  # torchrun still waits for the other machines: deaf to signals (in C++)
                failed_at = now
        silent = now - max((sign["beat"] for sign in ranks), default=began)
        if hang_minutes is not None and silent > _patience(ranks, 60 * hang_minutes):
            return _end_hanging(process, ranks, silent, own)


def _over(ranks: list[dict[str, Any]], own: range) -> bool:
    """All of this machine's processes have said their last word and are gone."""
    return len(ranks) == len(own) and not any(sign["state"] == "alive" or alive(sign["pid"]) for sign in ranks)


def gone(sign: dict[str, Any]) -> bool:
    """The process has failed, or ended without a word."""
    return sign["state"] == "failed" or (sign["state"] == "alive" and not alive(sign["pid"]))


@contextmanager
def passing_on(process: subprocess.Popen[Any], run: RunDir, own: range | None = None) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go to every worker, once each: they live in a session of their own, out of the terminal's
    reach, where torchrun would hand them on a second time. Gives those that no worker will answer: they came before
    there was one, or a second time, which ends it without a word."""
    asked: list[int] = []
    passed: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        pids = [sign["pid"] for sign in signs(run, own) if sign["state"] == "alive" and alive(sign["pid"])]
        if not pids or passed:
            asked.append(number)
        passed.extend(pids)
        for pid in pids or [process.pid]:
            _send(pid, number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _patience(ranks: list[dict[str, Any]], seconds: float) -> float:
    if not ranks:
        return max(SLOW * seconds, MEETING_SECONDS)
    return SLOW * seconds if any(sign.get("phase") in ("loading", "saving") for sign in ranks) else seconds


def _end_hanging(
    process: subprocess.Popen[Any], ranks: list[dict[str, Any]], silent: float, own: range | None
) -> Ending:
    for sign in ranks:
        if hasattr(signal, "SIGUSR1"):
            _send(sign["pid"], signal.SIGUSR1)
    time.sleep(STACK_SECONDS)
    _kill(ranks)
    if not ranks:
        process.terminate()  # torchrun takes its workers with it
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    nobody = {"rank": own.start if own else 0, "phase": "starting"}
    return Ending(1, ranks, min(ranks, key=lambda s: (s.get("step") or 0, s["beat"]), default=nobody), silent)


def _kill(ranks: list[dict[str, Any]]) -> set[int]:
    """Ends those still at work; gives their ranks."""
    living = [sign for sign in ranks if sign["state"] == "alive" and alive(sign["pid"])]
    for sign in living:
        _send(sign["pid"], signal.SIGKILL)
    return {sign["rank"] for sign in living}


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _signals(run: RunDir, log: str) -> dict[int, int]:
    """Signals by rank, of those that torchrun's log says a signal ended."""
    try:
        text = (run.path / "logs" / log).read_text("utf-8", errors="replace")
    except OSError:
        return {}
    return {int(rank): -int(code) for rank, code in _FAILED.findall(text)}
