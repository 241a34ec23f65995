"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def unfinished(target: Path, pid: int) -> Path:
    """Where process `pid` prepares `target`: beside it, so that a rename is enough to finish."""
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
