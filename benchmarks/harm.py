"""What can happen to the machine of a launcher, by real means: its disk, its ledger, its clock, its name."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from tests.support.disks import CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUTS, Disk, unshare

DAY_S = 86_400.0
PR_SET_PDEATHSIG = 1
LEDGER = {
    "ledger deleted": "the ledger's files are deleted",
    "ledger overwritten": "the ledger's bytes are random ones",
    "ledger page zeroed": "a page in the middle of the ledger is zero",
    "ledger unreadable": "a folder is where the ledger was",
}
DISK = {
    "disk full": "the disk of the state folder has no free block (ext4)",
    "disk nearly full": "it has a random number of free blocks, up to 64 KiB: a write fails in its middle",
    "disk read-only": "it is read-only from one moment on, under open files (ext4, as after an error of the device)",
    "file size limit": "no file of the launcher may grow (RLIMIT_FSIZE: EFBIG)",
}
CLOCK = {
    "clock a day ahead": "of the launcher alone",
    "clock a day behind": "of the launcher alone",
    "clock set forward": "by a day, while the launcher is at work",
    "clock set back": "by a day, while the launcher is at work",
    "listing a day ahead": "another command, whose clock is a day ahead, lists and reaps meanwhile",
    "listing a day behind": "the same, a day behind",
}
NAME = {
    "hostname changed": "while the launcher is at work",
    "other container": "the launcher has PID namespace, /proc and host name of its own",
}
HARMS = {**LEDGER, **DISK, **CLOCK, **NAME}
"""Harm → what it is."""


class Harm:
    """One harm to a launcher whose state folder is `state`, at `moment` seconds after its start."""

    def __init__(self, kind: str | None, state: Path, moment: float, chance: random.Random) -> None:
        self.kind, self.state, self.moment, self.chance = kind, state, moment, chance
        self.disk = Disk(state) if kind is not None and kind.startswith("disk") else None
        self.spare = chance.randrange(1, 16) * 4096 if kind == "disk nearly full" else 0

    def strike(self, listing: Callable[[], int]) -> None:
        """From outside. `listing` is another command that looks, in a process of its own."""
        file = self.state / "ledger.db"
        if self.kind in ("disk full", "disk nearly full") and self.disk is not None:
            self.disk.fill(self.spare)
        elif self.kind == "disk read-only" and self.disk is not None:
            self.disk.break_down()
        elif self.kind in LEDGER and file.is_file():
            self._harm_ledger(file)
        elif self.kind in ("listing a day ahead", "listing a day behind"):
            os.waitpid(listing(), 0)

    def _harm_ledger(self, file: Path) -> None:
        with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=1)) as db:
            db.execute("pragma wal_checkpoint(truncate)")
        size = file.stat().st_size
        if self.kind == "ledger overwritten":
            file.write_bytes(self.chance.randbytes(size))
        elif self.kind == "ledger page zeroed":
            with file.open("r+b") as stream:
                stream.seek(4096 * self.chance.randrange(1, max(2, size // 4096)))
                stream.write(bytes(4096))
        else:
            for part in self.state.glob("ledger.db*"):
                part.unlink(missing_ok=True)
            if self.kind == "ledger unreadable":
                file.mkdir()

    def mend(self) -> None:
        """What a person does before the next command: makes room, boots, moves a broken ledger away as it is told."""
        if self.disk is not None:
            self.disk.mend()
        if self.kind in LEDGER:
            for part in self.state.glob("ledger.db*"):
                part.rename(part.with_name(part.name.replace("ledger", "broken")))

    def close(self) -> None:
        """Unmount what was mounted."""
        if self.disk is not None:
            self.disk.close()

    def inside(self, work: Callable[[], None]) -> None:
        """Let the launcher work, harmed from inside its own process."""
        if self.kind in ("clock a day ahead", "clock a day behind"):
            set_clock(DAY_S if self.kind.endswith("ahead") else -DAY_S, from_start=True)
        elif self.kind in ("clock set forward", "clock set back"):
            self._later(lambda: set_clock(DAY_S if self.kind == "clock set forward" else -DAY_S))
        elif self.kind == "file size limit":
            self._later(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)))
        elif self.kind == "hostname changed":
            unshare(CLONE_NEWUTS)
            self._later(lambda: socket.sethostname("dhcp-17"))
        elif self.kind == "other container":
            in_container(work)
            return
        work()

    def _later(self, what: Callable[[], None]) -> None:
        timer = threading.Timer(self.moment, what)
        timer.daemon = True
        timer.start()


def set_clock(seconds: float, from_start: bool = False) -> None:
    """This process's wall clock; `from_start`: it was so when the process began."""
    from runner.cloud import clock

    real = time.time
    time.time = lambda: real() + seconds
    if from_start:
        clock._BEGAN += seconds


def in_container(work: Callable[[], None]) -> None:
    """In namespaces of its own, with a /proc and a host name; ends with this process."""
    unshare(CLONE_NEWUTS | CLONE_NEWNS)
    unshare(CLONE_NEWPID)  # last: the next process is its first one
    socket.sethostname("container-1")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
        work()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)
