"""Streams what is new in a run's files, as JSON lines. Runs in the pod: standard library only, Python ≥ 3.10.

`tail.py DIR` reads one line of JSON first: what the other side has already, {"metrics.jsonl": [size, CRC-32], …}. Then
every line that it reads is a sign of life of the launcher, and it writes

    {"file": name, "at": offset, "data": base64}    what was added; at 0 the file begins anew
    {"whole": name, "data": base64}                 a small file that is replaced as a whole
    {"checkpoints": [step, …]}                      those that are complete
    {"time": t}                                     nothing: the connection lives
"""

from __future__ import annotations

import base64
import json
import os
import select
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHM = Path("/dev/shm")
GROWING = ("metrics.jsonl", "evals.jsonl", "gpu.jsonl", "logs/*.log", "logs/*.txt", "tensorboard/**/events.*")
WHOLE = ("status.json", "agent-status.json", "summary.json", "rewinds.json", "environment.json", "logs/rank*.json")
BLOCK = 256 * 1024
EVERY_SECONDS = 0.3
QUIET_SECONDS = 2.0


class Tail:
    """Reports changes of a folder."""

    def __init__(self, folder: Path, known: dict[str, list[int]]) -> None:
        self.folder = folder
        self.known = known
        self.at: dict[str, tuple[int, int]] = {}  # name → inode, bytes told
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.steps: list[int] | None = None

    def news(self) -> Iterator[dict[str, object]]:
        """Yield the changes since the last call. Small files come last, since they refer to the others."""
        for pattern in GROWING:
            for file in sorted(self.folder.glob(pattern)):
                yield from self._growing(file)
        steps = sorted(int(mark.parent.name.rpartition("-")[2]) for mark in self.folder.glob("checkpoints/*/COMPLETE"))
        if steps != self.steps:
            self.steps = steps
            yield {"checkpoints": steps}
        for pattern in WHOLE:
            for file in sorted(self.folder.glob(pattern)):
                yield from self._whole(file, str(file.relative_to(self.folder)))
        # What the disk did not take of the agent's status: there only where it is the newer one.
        yield from self._whole(SHM / f"runner-{self.folder.name}.unwritten", "agent-status.json")

    def _growing(self, file: Path) -> Iterator[dict[str, object]]:
        name = str(file.relative_to(self.folder))
        try:
            with file.open("rb") as stream:
                facts = os.fstat(stream.fileno())
                inode, told = self.at.get(name, (0, 0))
                if name not in self.at:
                    told = self._begun(name, stream)
                elif inode != facts.st_ino or facts.st_size < told:
                    told = 0  # rewritten: the steps after a checkpoint are done again
                stream.seek(told)
                while block := stream.read(BLOCK):
                    yield {"file": name, "at": told, "data": base64.b64encode(block).decode()}
                    told += len(block)
                if facts.st_size == 0 and inode and inode != facts.st_ino:
                    yield {"file": name, "at": 0, "data": ""}
                self.at[name] = (facts.st_ino, told)
        except OSError:
            return

    def _begun(self, name: str, stream: Any) -> int:
        """How much of a file the other side has, if what it has is how the file begins."""
        size, crc = self.known.get(name, (0, 0))
        found, left = 0, size
        while left and (block := stream.read(min(BLOCK, left))):
            found, left = zlib.crc32(block, found), left - len(block)
        return size if not left and found == crc else 0

    def _whole(self, file: Path, name: str) -> Iterator[dict[str, Any]]:
        try:
            facts = file.stat()
            mark = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if self.seen.get(str(file)) == mark:
                return
            self.seen[str(file)] = mark
            yield {"whole": name, "data": base64.b64encode(file.read_bytes()).decode()}
        except OSError:
            return


def main(folder: Path) -> int:
    """Until the other side hangs up."""
    tail = Tail(folder, json.loads(sys.stdin.readline() or "{}"))
    beat = SHM / f"runner-{folder.name}.beat"
    beat.touch()
    last = 0.0
    while True:
        told = False
        for line in tail.news():
            print(json.dumps(line), flush=False)
            told = True
        if told or time.monotonic() - last > QUIET_SECONDS:
            last = time.monotonic()
            print(json.dumps({"time": time.time()}), flush=True)
        if select.select([0], [], [], EVERY_SECONDS)[0]:
            if not os.read(0, 4096):
                return 0
            beat.touch()


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]).absolute()))
    except BrokenPipeError:
        os._exit(0)
