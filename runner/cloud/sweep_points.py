"""Points of a sweep over rented pods: which have started, which are done, how they are stopped.

They may be processes of their own. A folder of markers is what all of them see; signals go through the process of the
sweep, which outlives them: each point hears of a Ctrl-C once, saves, and brings its run home.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType

from runner.errors import RunnerError
from runner.machine.processes import die_with_parent
from runner.report.line_labels import Labelled
from runner.rundir.directory import alive
from runner.spec import RunSpec

_index: ContextVar[int | None] = ContextVar("_index", default=None)
"""The point that this process does."""

Task = Callable[[RunSpec | RunnerError, int], float]


@dataclass(frozen=True)
class Points:
    """The same in every process of the sweep."""

    folder: Path
    """Of the markers; it is there while the sweep goes on."""
    owner: int
    """The process of the sweep."""

    def do(self, task: Task, given: RunSpec | RunnerError, index: int) -> float:
        """Do one point; NaN for one that is not begun any more, or was interrupted in a process of its own."""
        here = os.getpid() == self.owner
        self._marker("begun", index).write_text(str(os.getpid()))
        _index.set(index)
        try:
            if here:
                return task(given, index)
            _leave_with(self.owner)
            with _apart(f"[{index + 1}] "):
                # A Ctrl-C reaches it from here on; one that came before has left its mark.
                return math.nan if self.stopped else task(given, index)
        except KeyboardInterrupt:
            self.stop()
            if here:
                raise
            return math.nan
        finally:
            self._marker("over", index).touch()

    @property
    def stopped(self) -> bool:
        """No further point is begun: the sweep was interrupted, or its process is gone."""
        return (self.folder / "stopped").exists() or not alive(self.owner)

    def stop(self) -> None:
        """Begin no further point."""
        with suppress(OSError):
            (self.folder / "stopped").touch()

    def serve(self) -> None:
        """The point that this process does has its pod, or rents one: it waits for none any more."""
        if (index := _index.get()) is not None:
            self._marker("served", index).touch()

    def served(self, index: int) -> bool:
        """Whether a point has had its pod. One that has only begun may still take what another one leaves."""
        return self._marker("served", index).exists() or self._marker("over", index).exists()

    def at_work(self) -> list[int]:
        """Processes of points that have begun and are not over."""
        begun = [file for file in self.folder.glob("begun-*") if not file.with_name(f"over-{file.name[6:]}").exists()]
        return [int(text) for file in begun if (text := file.read_text()) and alive(text)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time."""
        with (self.folder / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def watched(self, apart: bool) -> Iterator[None]:
        """Around the sweep, in its own process: SIGTERM is a Ctrl-C, and no signal ends this process before points that
        are processes of their own (`apart`)."""
        self.folder.mkdir(parents=True)
        handle = self._pass_on if apart else interrupt
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stop()
        for pid in self.at_work():
            with suppress(OSError):
                os.kill(pid, signal.SIGINT)

    def _marker(self, what: str, index: int) -> Path:
        return self.folder / f"{what}-{index:04d}"


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler: the signal is a Ctrl-C."""
    raise KeyboardInterrupt


@cache
def _leave_with(owner: int) -> None:
    """End this process as soon as the sweep's is gone, however it ended: joblib's live on, and would rent pods in place
    of those that somebody ends. Their own pods are then nobody's: they end themselves, and `pods reap --all` ends them.
    """
    die_with_parent(owner, signal.SIGKILL)

    def wait() -> None:  # where the kernel does not tell: macOS
        while alive(owner):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _apart(label: str) -> Iterator[None]:
    """A point in a process of its own: its lines have a label, and Ctrl-C comes from the sweep's process alone."""
    with suppress(OSError):
        os.setpgid(0, 0)  # out of the terminal's reach, which would tell it a second time
    signal.signal(signal.SIGINT, interrupt)
    out, err = Labelled(sys.stdout, label), Labelled(sys.stderr, label)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
