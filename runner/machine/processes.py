"""Processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

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
