"""Standard output and error that may be closed at any time without ending the run."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

STALLED_SECONDS = 20.0
"""How long training waits for a reader that does not read (Ctrl-S, a pager, a stopped tee) before it drops a line."""
CLOSED = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""The reader has gone: `| head`, a killed tee, a closed terminal. Anything else is a fault, such as a full disk."""
NARROWEST = 20
"""Columns of a terminal that anybody reads in; a smaller COLUMNS is not meant."""
_CHUNK = 512
"""Bytes that a pipe or terminal which poll(2) calls writable takes without blocking (POSIX, PIPE_BUF)."""


class Outlet(io.FileIO):
    """A file descriptor to write to; after the first write that fails, everything is dropped.

    rich would end the process with SystemExit, click with an exit code of 1, print with an exception.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "wb", closefd=False)
        self.lost: OSError | None = None
        self.goes_on = False
        """The process outlives the loss, and does not wait for a reader that has stopped reading."""
        self._stalled = False

    def write(self, data: Any) -> int:
        """Number of bytes taken: all of them where there is nobody to take them."""
        block = memoryview(data).cast("B")
        if self.lost is not None:
            return block.nbytes
        try:
            if self.goes_on and not self._ready():
                return block.nbytes
            while (taken := super().write(block[:_CHUNK] if self.goes_on else block)) is None:  # O_NONBLOCK, and full
                self._wait(None)
            return taken
        except OSError as error:
            self._lose(error)
            return block.nbytes

    def _ready(self) -> bool:
        self._stalled = not self._wait(0.0 if self._stalled else STALLED_SECONDS)
        return not self._stalled

    def _wait(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return bool(poll.poll(None if seconds is None else 1000 * seconds))

    def _lose(self, error: OSError) -> None:
        """From here on the descriptor is /dev/null: also for C libraries and for processes started later."""
        self.lost = error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.goes_on and self.fileno() == 1:
            what = f"Standard output is lost ({error.strerror}): the run continues; its output is in logs/run.log"
            Console(stderr=True).print(what, highlight=False, soft_wrap=True)


def guard(*, goes_on: bool = False) -> None:
    """Put both streams of this process on an `Outlet`; one that is closed (`>&-`) becomes /dev/null."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdout, sys.stderr = _on_outlet(sys.stdout, 1), _on_outlet(sys.stderr, 2)
    if os.environ.get("COLUMNS", "80").isdigit() and int(os.environ.get("COLUMNS", "80")) < NARROWEST:
        del os.environ["COLUMNS"]  # 0 in a shell without a terminal: rich then prints nothing at all
    if goes_on:
        outlive()


def outlive() -> None:
    """Let this process survive the loss of its terminal (SIGHUP) and of its reader."""
    for outlet in _outlets():
        outlet.goes_on = True
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def lost() -> OSError | None:
    """Return why standard output is lost; None while it works."""
    return next((outlet.lost for outlet in _outlets() if outlet.fileno() == 1), None)


def exit_code(code: int | None) -> int:
    """`code`, or 1 where an answer could not be written, which is said; not where its reader wanted no more of it."""
    sys.stdout.flush()
    code, error = code or 0, lost()
    if code or error is None or error.errno in CLOSED or any(outlet.goes_on for outlet in _outlets()):
        return code
    what = f"standard output cannot be written to: {error.strerror}"
    Console(stderr=True).print(f"[bold red]Error[/]\n  • {what}", highlight=False, soft_wrap=True)
    return 1


def appended(file: Path) -> Console:
    """A log that takes lines until its disk is full, then drops them."""
    number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    stream = io.TextIOWrapper(io.BufferedWriter(Outlet(number)), "utf-8", line_buffering=True)
    return Console(file=stream, width=120, force_terminal=False, color_system=None)


def _on_outlet(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Outlet(number)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors=getattr(stream, "errors", None) or "backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=getattr(stream, "write_through", False),
    )


def _outlets() -> list[Outlet]:
    """Those of this process's two streams; none where it is not guarded (a test, a notebook)."""
    raws = (getattr(getattr(stream, "buffer", None), "raw", None) for stream in (sys.stdout, sys.stderr))
    return [raw for raw in raws if isinstance(raw, Outlet)]
