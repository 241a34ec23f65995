"""Folders written beside their place and renamed: complete or absent."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

LEFT_BEHIND = 24 * 3600.0  # seconds without a change: whoever wrote it was killed. Unpacking a large model takes hours


def unfinished(target: Path, pid: int) -> Path:
    """Return the temporary path of `target` for process `pid`, beside it so that a rename completes it."""
    return target.with_name(f".{target.name}.{pid}.tmp")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends, and goes when the block fails.

    OSError where it cannot be written, or where `target` has come to hold something meanwhile.
    """
    temporary = unfinished(target, os.getpid())
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def cached(target: Path, is_whole: Callable[[], bool]) -> Iterator[Path]:
    """As `whole`, for what can be made again and several processes may make at once: the first one's stays.

    A `target` that is not `is_whole` is replaced; what killed processes left beside it a day ago goes.
    """
    for left in target.parent.glob("*.tmp"):
        if time.time() - _touched(left) > LEFT_BEHIND:
            shutil.rmtree(left, ignore_errors=True)
    # Not the process's number: in a container the next run has the same one, and would meet what a killed one left.
    temporary = target.with_name(f"{target.name}.{uuid4().hex}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not is_whole():
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _touched(folder: Path) -> float:
    """When something in it was last written; now, where it goes at this moment."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return time.time()
