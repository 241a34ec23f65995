"""Reader of a growing `metrics.jsonl` or `evals.jsonl`, which reads only what is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.config import json_text
from runner.rundir.json_files import of_type


class MetricsTail:
    """Lines of a file of metrics so far: 10,000 lines take 0.1 s to parse, and are asked for every second."""

    def __init__(self, file: Path, record: type) -> None:
        self.file, self.record = file, record
        self.lines: list[dict[str, Any]] = []
        self._inode, self._read, self._rest = 0, 0, b""

    def update(self) -> list[dict[str, Any]]:
        """All lines, the new ones included. A file that was written anew, as a resumed run does, is read anew; one that
        is not there has none."""
        try:
            with self.file.open("rb") as stream:
                about = self.file.stat()
                if about.st_ino != self._inode or about.st_size < self._read:
                    self.lines, self._read, self._rest = [], 0, b""
                self._inode = about.st_ino
                stream.seek(self._read)
                new = stream.read()
        except OSError:
            return self.lines
        self._read += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        for line in whole:
            try:
                content = json_text.loads(line.decode("utf-8", "replace"))
            except ValueError:
                continue
            if isinstance(content, dict):
                self.lines.append(of_type(content, self.record))
        return self.lines
