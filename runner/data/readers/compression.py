"""Compressed files: .gz, .bz2, .xz and .zst by their ending; .gz also by its first bytes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import PurePosixPath

from runner.errors import Problem, RequestError

_GZIP_MAGIC = b"\x1f\x8b"


def _zstd(data: bytes) -> bytes:
    """By pyarrow, which every machine with `datasets` has; Python has its own from 3.14."""
    try:
        pyarrow = import_module("pyarrow")
    except ImportError:
        raise RequestError(Problem(".zst needs pyarrow", None, "pip install pyarrow")) from None
    found: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    return found


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _zstd,
}


def decompressed(data: bytes, path: str) -> bytes:
    """What the file holds; RequestError for a damaged one."""
    ending = PurePosixPath(path.partition("?")[0]).suffix.lower()
    if data.startswith(_GZIP_MAGIC):
        ending = ".gz"  # some are called .jsonl all the same
    if ending not in COMPRESSIONS:
        return data
    try:
        return COMPRESSIONS[ending](data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        remedy = f"make the {ending} file again"
        raise RequestError(Problem(f"{path} is damaged: {error}", None, remedy)) from None
