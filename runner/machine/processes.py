"""Processes that end with the one that started them, and those that the kernel ended because memory was full."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from runner.rundir.directory import text_of

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
"""This process was started by torchrun."""


def die_with_parent(parent: int | None = None, number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent is gone (Linux; prctl(2), PR_SET_PDEATHSIG): a run whose launcher was
    killed saves a checkpoint and ends, instead of going on unseen.

    Called in the new process; it ends at once if `parent` (by default torchrun, for its workers) is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, number)
    orphan = os.getppid() != parent if parent is not None else LAUNCHED and not _is_torchrun(os.getppid())
    if orphan:
        os._exit(1)


def _is_torchrun(pid: int) -> bool:
    try:
        return b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextmanager
def interrupts_handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler` inside, and what they called before afterwards. Main thread only."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


Killer = Literal["kernel", "probably the kernel", "somebody else"]


@dataclass(frozen=True)
class OomKills:
    """The kernel's counts at one moment; None where they cannot be read."""

    group: int | None
    """Count of this process's control group, in which the worker is, too: memory.events, memory.oom_control in version
    1."""
    machine: int | None
    """Count of the whole machine, outside of this container as well: `oom_kill` in /proc/vmstat."""


def oom_kills(root: Path = Path("/")) -> OomKills:
    """The counts now. `root` is where `proc` and `sys` are; a test puts its own there."""
    return OomKills(_of_group(root), _oom_count(text_of(root / "proc/vmstat")))


def killer(before: OomKills, after: OomKills) -> Killer:
    """The sender of SIGKILL between the two moments. A count of the group says it for certain."""
    if before.group is not None and after.group is not None:
        return "kernel" if after.group > before.group else "somebody else"
    if before.machine is not None and after.machine == before.machine:
        return "somebody else"
    return "probably the kernel"


def _of_group(root: Path) -> int | None:
    texts = (*control_group(root, "memory", "memory.oom_control"), *control_group(root, "", "memory.events"))
    return next((count for text in texts if (count := _oom_count(text)) is not None), None)


def _oom_count(text: str) -> int | None:
    """The line `oom_kill N`."""
    found = re.search(r"^oom_kill (\d+)$", text, re.M)
    return int(found[1]) if found else None


def control_group(root: Path, controller: str, file: str) -> Iterator[str]:
    """`file` of this process's control group and of all above it: each one limits.

    `controller` is a version-1 controller, or "" for version 2. In a container the path that
    `/proc/self/cgroup` names may be the host's and missing here; the group's root then is its own.
    """
    base = root / "sys/fs/cgroup" / controller
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            own = base / path.strip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(base) and (text := text_of(folder / file).strip()):
                    yield text
