"""Large files read in chunks of some thousand rows: JSONL, text and Parquet."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from runner.data.readers import arrow, urls
from runner.data.readers.files import Table, ending_of, json_lines, kind_of_file, not_utf8, read_table, text_lines
from runner.errors import Problem, RequestError
from runner.spec.input_paths import is_url

BLOCK = 8 << 20
"""Bytes of lines that are parsed at once."""
PARQUET_ROWS = 5000
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def tables(path: str, block: int | None = None) -> Iterator[Table]:
    """The file in pieces (of about `block` bytes of lines), rows numbered through; RequestError as in `read_table`."""
    file = Path(path).expanduser()
    if not in_pieces(path) or not (is_url(path) or os.path.isfile(file)):
        yield read_table(path)
        return
    try:
        with urls.open_url(path) if is_url(path) else file.open("rb") as opened:
            if kind_of_file(path) == "parquet":
                yield from _parquet(opened, path)
            else:
                unpack = _OPENERS.get(ending_of(path))
                yield from _lines(unpack(opened) if unpack else opened, path, block or BLOCK)
    except OSError as error:
        raise RequestError(Problem(f"{path} cannot be read: {error.strerror or error}")) from None


def in_pieces(path: str) -> bool:
    """A file that need not be read whole to see its first rows."""
    kind = kind_of_file(path)
    if kind == "parquet":
        return ending_of(path) == ".parquet"
    return kind in ("jsonl", "txt") and ending_of(path) != ".zst"


def _lines(opened: IO[bytes], path: str, size: int) -> Iterator[Table]:
    number, parse = 1, json_lines if kind_of_file(path) == "jsonl" else text_lines
    for block in _blocks(opened, path, size):
        text = _text(block, path, number)
        yield parse(text, path, number)
        number += text.count("\n")


def _blocks(opened: IO[bytes], path: str, size: int) -> Iterator[bytes]:
    """Whole lines, about `size` bytes of them."""
    while True:
        try:
            block = opened.read(size)
            block += opened.readline() if block else b""
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise RequestError(Problem(f"{path} is damaged: {error}", None, "make the file again")) from None
        if not block:
            return
        yield block


def _text(block: bytes, path: str, number: int) -> str:
    try:
        return block.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(not_utf8(block, error, path, number)) from None


def _parquet(opened: IO[bytes], path: str) -> Iterator[Table]:
    number = 1
    with arrow.parquet(path) as parquet:
        for batch in parquet.ParquetFile(opened).iter_batches(PARQUET_ROWS):
            rows = arrow.rows_of(batch)
            yield Table(path, rows, numbers=range(number, number + len(rows)))
            number += len(rows)
