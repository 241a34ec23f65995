"""Damage of weight files that is seen without loading them: cut short, no weights at all, or a pointer of Git LFS."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from runner.config import json_text
from runner.errors import Problem

POINTER = b"version https://git-lfs.github.com/spec/"
"""Begins the file that `git clone` leaves where Git LFS is not installed."""
LARGEST_HEADER = 100_000_000
"""Bytes that safetensors takes for a header (`MAX_HEADER_SIZE`, safetensors 0.8)."""


def damage_of(file: Path) -> Problem | None:
    """The problem with a weight file; None for one whose size is right, or that is no safetensors file."""
    try:
        with file.open("rb") as stream:
            size, begin = os.fstat(stream.fileno()).st_size, stream.read(len(POINTER))
            if begin == POINTER:
                what = f"{file} is a pointer of Git LFS, without the weights"
                return Problem(what, "model.id", f"git -C {quote(str(file.parent))} lfs pull")
            if file.suffix != ".safetensors":
                return None
            length = int.from_bytes(begin[:8], "little")
            if size < 8 + length or not 2 <= length <= LARGEST_HEADER:
                return _damaged(file, f"has {size:,} bytes and no whole header")
            stream.seek(8)
            wanted = 8 + length + _values(stream.read(length))
    except OSError as error:
        return Problem(f"{file} cannot be read: {error.strerror}", "model.id")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return _damaged(file, "has a header that is none")
    return _damaged(file, f"has {size:,} bytes, and by its header {wanted:,}") if size != wanted else None


def _values(header: bytes) -> int:
    """Bytes of all tensors by the header, `{"name": {"dtype": …, "shape": …, "data_offsets": [begin, end]}, …}`."""
    tensors = json_text.loads(header)
    ends = [one["data_offsets"][1] for name, one in tensors.items() if name != "__metadata__"]
    if not all(isinstance(end, int) for end in ends):
        raise ValueError("an offset is no whole number")
    return max(ends, default=0)


def _damaged(file: Path, how: str) -> Problem:
    return Problem(f"{file} {how}: it is damaged", "model.id", "copy it again from where the model is from")
