"""Rows that exceed memory: canonical JSON lines in a file, read where they are needed."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from tempfile import TemporaryFile
from typing import IO, Any, overload

from runner.data.examples import CLASSES, Kind, Learnable, content_of
from runner.paths import cache_dir


class Stored(Sequence[Learnable]):
    """Rows of one kind, by their places in a file: 8 bytes of memory each.

    The file has no name, so it goes with the process; a line is where the row came from, a tab, and its content.
    """

    def __init__(self, lines: mmap.mmap, begins: array[int], kind: Kind) -> None:
        self._lines, self._begins, self.kind = lines, begins, kind

    @classmethod
    def of(cls, rows: Iterable[Learnable], kind: Kind) -> Stored:
        """Write rows as they come."""
        begins, at = array("q"), 0
        with _file() as file:
            for row in rows:
                content = json.dumps(content_of(row), sort_keys=True, separators=(",", ":"))
                begins.append(at)
                at += file.write(f"{json.dumps(row.where)}\t{content}\n".encode("ascii"))
            if not at:
                at = file.write(b"\n")
            file.flush()
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), begins, kind)

    def __len__(self) -> int:
        return len(self._begins)

    @overload
    def __getitem__(self, index: int) -> Learnable: ...
    @overload
    def __getitem__(self, index: slice) -> Stored: ...
    def __getitem__(self, index: int | slice) -> Learnable | Stored:
        if isinstance(index, slice):
            return Stored(self._lines, self._begins[index], self.kind)
        return decoded(self._line(self._begins[index]), self.kind)

    def __iter__(self) -> Iterator[Learnable]:
        return (decoded(line, self.kind) for line in self.lines())

    def lines(self) -> Iterator[bytes]:
        """The rows as they are written: what another process decodes for itself."""
        return (self._line(begin) for begin in self._begins)

    def take(self, indices: Sequence[int]) -> Stored:
        """The rows of these indices, in their order."""
        return Stored(self._lines, array("q", (self._begins[index] for index in indices)), self.kind)

    def fingerprint(self) -> str:
        """That of `examples.fingerprint`, without making rows of the lines."""
        digest = hashlib.sha256()
        for line in self.lines():
            digest.update(line.partition(b"\t")[2])
            digest.update(b"\n")
        return digest.hexdigest()

    def _line(self, begin: int) -> bytes:
        return self._lines[begin : self._lines.find(b"\n", begin)]


def decoded(line: bytes, kind: Kind) -> Learnable:
    """The row of one line."""
    where, _, content = line.partition(b"\t")
    fields: dict[str, Any] = json.loads(content)
    return CLASSES[kind](**fields, where=json.loads(where))


def num_bytes(files: Iterable[str]) -> int:
    """Size of the files that are here."""
    return sum(os.path.getsize(os.path.expanduser(name)) for name in files if os.path.isfile(os.path.expanduser(name)))


def _file() -> IO[bytes]:
    """In the cache, whose disk is the larger one; where that cannot be written to, among the system's own."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TemporaryFile(dir=folder, buffering=1 << 20)
    except OSError:
        return TemporaryFile(buffering=1 << 20)
