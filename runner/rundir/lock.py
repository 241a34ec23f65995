"""Lock of a run, which the kernel holds while any process of the run is alive."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from runner.config import json_text
from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir, is_alive

LEAVING_SECONDS = 15.0
_held: set[int] = set()


@contextmanager
def own_run(run: RunDir) -> Iterator[None]:
    """Own `run`: no other process starts or resumes it until the block ends, or longer: until the last process that
    inherited the lock is gone, should this one be killed. RequestError where somebody has it.

    Without a lock where the disk has none (some network file systems): then process numbers have to do.
    """
    try:
        handle = os.open(run.path / ".owner", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RequestError(Problem(f"{run.path} cannot be written to: {error.strerror}", "command line")) from None
    try:
        _lock(handle, run)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        _held.add(handle)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _lock(handle: int, run: RunDir) -> None:
    """Take it. Where the launcher is gone, those it left are on their way out: torchrun after its ranks."""
    end = time.monotonic() + LEAVING_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            by = json_text.object_of(os.pread(handle, 4096, 0))
            lost = by.get("host") == socket.gethostname() and not is_alive(by.get("pid"))
            if not lost or time.monotonic() > end:
                held = _holder(run.path / ".owner") if lost else None
                raise RequestError(run_at_work_error(run, by if held is None else {**by, "pid": held})) from None
            time.sleep(0.1)
        except OSError:  # a disk without locks
            return


def _holder(file: Path) -> int | None:
    """A process that has the file open, but for this one."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if (pid := int(link.parts[2])) != os.getpid() and os.readlink(link) == str(file.resolve()):
                return pid
    return None


def inherited_locks() -> tuple[int, ...]:
    """File descriptors of the locks that this process holds: what it starts keeps them."""
    return tuple(_held)


def run_at_work_error(run: RunDir, by: Mapping[str, object]) -> Problem:
    """Two would write the same files. `by` are process and host, as far as they are known."""
    status = run.status
    pid = by.get("pid") or status.get("pid")
    elsewhere = by.get("host", socket.gethostname()) != socket.gethostname()
    where = f" on {by['host']}" if elsewhere else ""
    what = f"{run.id} is running{where} ({status.get('state', 'starting')}, process {pid})"
    return Problem(what, "command line", f"wait for its end, or stop it{where and ' there'}: kill {pid}")
