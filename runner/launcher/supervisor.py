"""Supervise the processes of a run: forward signals, end all when one fails, detect hangs.

Seconds are those of the monotonic clock: a wall clock that is set says nothing about a run.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol, cast

from rich.console import Console

from runner.errors import Problem
from runner.machine.processes import interrupts_handled_by
from runner.plan.worker_environment import MEETING_SECONDS
from runner.rundir.directory import RunDir, is_alive, text_of
from runner.rundir.json_files import Heartbeat

GRACE_SECONDS = 5.0
"""After one process failed, the others may end by themselves; torchrun alone would wait for 30 s."""
KILL_SECONDS = 3.0
"""After a second Ctrl-C whoever is still there is killed: one that is stopped, or busy in C, hears no signal."""
SAME_SECONDS = 0.2
"""Signals so close together are one Ctrl-C: of the terminal, and of a wrapper that passes it on (make, uv run)."""
GAP_SECONDS = 10.0
"""Two looks that lie so far apart: this machine, or this process, was suspended. Otherwise they are 0.5 s apart."""
STACK_SECONDS = 1.0
"""Time that SIGUSR1 needs to write the stacks."""
SLOW = 4
"""Loading and saving show no sign of life in between: they may take so many times longer. So may Python starting, but
never less than the machines may take to meet."""
LAUNCHER_LOG = "launcher.log"
_FAILED = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-\d+) ")
"""In torchrun's summary. Its line on the first failure counts whole seconds: of a killed process and one that lost it
right after, it may name the second."""


class Process(Protocol):
    """A process to watch: a `subprocess.Popen`, or a worker that another process has forked (warm_workers.py)."""

    @property
    def pid(self) -> int:
        """Process number."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; subprocess.TimeoutExpired where it has not ended within `timeout` seconds."""

    def kill(self) -> None:
        """SIGKILL."""


@dataclass
class Ending:
    """Result of the processes."""

    code: int
    """Exit code of the launched process; negative: the signal that ended it."""
    ranks: list[Heartbeat]
    """The last sign of life of every process on this machine, by rank; then what others have said that failed."""
    hung: Heartbeat | None = None
    """That of the process that was furthest behind, if all were ended for want of life."""
    silent_seconds: float = 0.0
    killed: dict[int, int] = field(default_factory=dict)
    """Signals by rank, of processes that were ended from outside."""
    stopped: set[int] = field(default_factory=set)
    """Ranks that were ended here because another one had failed: what their end looks like says nothing."""
    interrupted: bool = False
    """A signal came before there was a worker to hand it to, or a second time."""
    lost: Problem | None = None
    """The failure of another machine, where that ended all processes."""


def rank_reports(run: RunDir, own: range | None = None) -> list[Heartbeat]:
    """`logs/rank<k>.json` of the processes on this machine, by rank. Where several machines share the folder, `own`
    are this one's ranks: names of rented machines are not always different."""
    here = socket.gethostname()
    return [s for s in _all_signs(run) if (s.get("host") == here if own is None else s["rank"] in own)]


def failed_elsewhere(run: RunDir, own: range) -> list[Heartbeat]:
    """Return the processes of other machines that failed, or were interrupted alone, before the first or after the last
    step.

    No other end is one that all the others share in by themselves.
    """
    others = [sign for sign in _all_signs(run) if sign["rank"] not in own]
    return [s for s in others if s["state"] == "failed" or (s["state"] == "interrupted" and not s.get("agreed"))]


def _all_signs(run: RunDir) -> list[Heartbeat]:
    files = (run.path / "logs").glob("rank*.json")
    found = [cast(Heartbeat, sign) for file in files if (sign := run.read(f"logs/{file.name}"))]
    return sorted(found, key=lambda sign: int(sign["rank"]))


def remove_reports(run: RunDir, own: range | None = None) -> None:
    """Signs of an earlier attempt go: all, or those of one machine's ranks."""
    for file in (run.path / "logs").glob("rank*.json"):
        if own is None or file.stem in {f"rank{rank}" for rank in own}:
            file.unlink(missing_ok=True)


def watch(
    process: Process, run: RunDir, hang_minutes: float | None, own: range | None = None,
    log: str = LAUNCHER_LOG, lost: Callable[[], Problem | None] = lambda: None, asked: Interrupts | None = None,
) -> Ending:  # fmt: skip
    """Until the process has ended, by itself or because one of its processes failed or hangs, or `asked` for it twice.

    Where there are several machines: `own` are this one's ranks, and `lost` tells when another one was lost.
    """
    asked, silence = asked or Interrupts(), HangDetector()
    failed_at = over_at = None
    cause: Problem | None = None
    stopped: set[int] = set()
    while True:
        try:
            code = process.wait(timeout=0.5)
            killed = _signals(run, log)
            return Ending(code, rank_reports(run, own), None, 0.0, killed, stopped, asked.unanswered, cause)
        except subprocess.TimeoutExpired:
            pass
        ranks, now = rank_reports(run, own), time.monotonic()
        if asked.urgent(now):
            _end_all(process, ranks)
            return Ending(process.wait(), ranks, stopped={sign["rank"] for sign in ranks}, interrupted=True)
        if own and _over(ranks, own):
            over_at = over_at or now
            if now - over_at > GRACE_SECONDS:  # torchrun waits 5 minutes for those of the other machines
                process.kill()
                process.wait()
                return Ending(int(any(sign["state"] == "failed" for sign in ranks)), ranks, lost=cause)
        broken = (
            any(has_failed(sign) for sign in ranks)
            or (own and failed_elsewhere(run, own))
            or (asked.unanswered and not ranks)
        )
        cause = cause or (None if broken else lost())
        if broken or cause:
            failed_at = failed_at or now
            if now - failed_at > GRACE_SECONDS:
                stopped |= _kill(ranks)
                if not ranks:
                    process.kill()  # torchrun still waits for the other machines: deaf to signals (in C++)
                failed_at = now
        silent = silence.seconds(ranks, now)
        if hang_minutes is not None and silent > _patience(ranks, 60 * hang_minutes):
            return _end_hanging(process, ranks, silent, own)


def _over(ranks: list[Heartbeat], own: range) -> bool:
    """All of this machine's processes have said their last word and are gone."""
    return len(ranks) == len(own) and not any(sign["state"] == "alive" or is_alive(sign["pid"]) for sign in ranks)


def has_failed(sign: Heartbeat) -> bool:
    """The process has failed, or ended without a message."""
    return sign["state"] == "failed" or (sign["state"] == "alive" and not is_alive(sign["pid"]))


@dataclass
class HangDetector:
    """Measures the time without a heartbeat from any process, excluding time in which this process was suspended."""

    last: float = field(default_factory=time.monotonic)
    seen: list[Heartbeat] = field(default_factory=list)
    total: float = 0.0

    def seconds(self, ranks: list[Heartbeat], now: float) -> float:
        """Return the seconds without progress. Call it twice a second; after a gap the time starts again."""
        if ranks != self.seen or now - self.last > GAP_SECONDS:
            self.total = 0.0
        else:
            self.total += now - self.last
        self.last, self.seen = now, ranks
        return self.total


@dataclass
class Interrupts:
    """SIGINT and SIGTERM as they came, when."""

    times: list[float] = field(default_factory=list)
    unanswered: bool = False
    """No worker will say what became of it: one came before there was any, or a second one ends it without a word."""

    def urgent(self, now: float) -> bool:
        """The second was some seconds ago, or there was a third."""
        return len(self.times) > 2 or (len(self.times) > 1 and now - self.times[1] > KILL_SECONDS)


@contextmanager
def forward_signals(process: Process, run: RunDir, own: range | None = None) -> Iterator[Interrupts]:
    """SIGINT and SIGTERM go to every worker, once each: they live in a session of their own, out of the terminal's
    reach, where torchrun would hand them on a second time."""
    asked = Interrupts()

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked.times and now - asked.times[-1] < SAME_SECONDS:
            return
        asked.times.append(now)
        pids = [sign["pid"] for sign in rank_reports(run, own) if sign["state"] == "alive" and is_alive(sign["pid"])]
        asked.unanswered |= not pids or len(asked.times) > 1
        if pids and len(asked.times) == 1:
            what = "Stops after this step, with a checkpoint; Ctrl-C again ends the run at once"
            Console(stderr=True).print(what, highlight=False, soft_wrap=True)
        for pid in pids or [process.pid]:
            _send(pid, number)

    with interrupts_handled_by(handle):
        yield asked


def _patience(ranks: list[Heartbeat], seconds: float) -> float:
    if not ranks:
        return max(SLOW * seconds, MEETING_SECONDS)
    return SLOW * seconds if any(sign.get("phase") in ("loading", "saving") for sign in ranks) else seconds


def _end_hanging(process: Process, ranks: list[Heartbeat], silent: float, own: range | None) -> Ending:
    for sign in ranks:
        if hasattr(signal, "SIGUSR1"):
            _send(sign["pid"], signal.SIGUSR1)
    time.sleep(STACK_SECONDS)
    _end_all(process, ranks)
    process.wait()
    nobody: Heartbeat = {"rank": own.start if own else 0, "phase": "starting"}
    return Ending(1, ranks, min(ranks, key=lambda s: (s.get("step") or 0, s["beat"]), default=nobody), silent)


def _end_all(process: Process, ranks: list[Heartbeat]) -> None:
    """SIGKILL for all, torchrun first, which would name a cause, and those that have not given a sign yet as well."""
    import psutil  # comes with training, and this is asked only then

    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        below = []
    process.kill()
    _kill(ranks)
    for one in below:
        with suppress(psutil.Error):
            one.kill()


def _kill(ranks: list[Heartbeat]) -> set[int]:
    """Ends those still at work; gives their ranks."""
    living = [sign for sign in ranks if sign["state"] == "alive" and is_alive(sign["pid"])]
    for sign in living:
        _send(sign["pid"], signal.SIGKILL)
    return {sign["rank"] for sign in living}


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _signals(run: RunDir, log: str) -> dict[int, int]:
    """Signals by rank, of those that torchrun's log says a signal ended."""
    return {int(rank): -int(code) for rank, code in _FAILED.findall(text_of(run.path / "logs" / log))}
