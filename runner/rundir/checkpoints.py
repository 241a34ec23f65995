"""Checkpoints of a run: complete and unchanged, or not counted.

`checkpoints/checkpoint-<step>/` is written by the trainer, file by file. It counts only with its `COMPLETE`,
which is written last, atomically, and lists every file with size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runner.errors import InterruptedRun, Problem
from runner.rundir import plain_files
from runner.rundir.directory import RunDir, write_atomically

MARKER = "COMPLETE"
PREFIX = "checkpoint-"
BLOCK = 1 << 20


def folder(run: RunDir, step: int) -> Path:
    """Return the folder of the checkpoint after `step`."""
    return run.path / "checkpoints" / f"{PREFIX}{step}"


def steps(run: RunDir) -> list[int]:
    """All checkpoints, complete or not, oldest first."""
    found = (run.path / "checkpoints").glob(f"{PREFIX}*")
    return sorted(int(n) for path in found if (n := path.name.removeprefix(PREFIX)).isdigit() and path.is_dir())


def complete(run: RunDir) -> list[int]:
    """Steps of the checkpoints that were finished, oldest first; `damage` tells whether they still are whole."""
    return [step for step in steps(run) if (folder(run, step) / MARKER).is_file()]


def facts(path: Path) -> dict[str, Any]:
    """Facts that `seal` noted besides the files: step, processes, metric; empty for a marker that cannot be read."""
    return RunDir(path).read(MARKER)


def seal(path: Path, noted: dict[str, object]) -> None:
    """Bring every file to the disk, then write the marker with sizes and checksums. OSError if the disk refuses."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_flushed, files))
    for parent in sorted({file.parent for file in files} | {path, path.parent}):
        _flush_folder(parent)
    listed = {str(file.relative_to(path)): one for file, one in zip(files, sums, strict=True)}
    write_atomically(path / MARKER, json.dumps({**noted, "files": listed}, indent=1) + "\n")
    _flush_folder(path)


def damage(path: Path, *, content: bool = True) -> list[str]:
    """Damage of a checkpoint, a line per file; empty if it is whole. `content=False` compares sizes only."""
    listed = facts(path).get("files")
    if not isinstance(listed, dict) or not all(map(_is_file, listed.items())):
        return [f"{MARKER} is missing or cannot be read"]
    found = [f"{file.relative_to(path)} is {what}" for file, what in plain_files.special_files(path)]
    for name, expected in listed.items() if not found else ():
        file = path / name
        try:
            if not file.resolve().is_relative_to(path.resolve()):
                found.append(f"{name} is outside of it")
                continue
            size = file.stat().st_size
            if size != expected["size"]:
                found.append(f"{name} has {size:,} of {expected['size']:,} bytes")
            elif content and _sum(file) != expected["sha256"]:
                found.append(f"{name} has changed since it was written")
        except OSError as error:
            found.append(f"{name}: {error.strerror}")
    return found


def _is_file(entry: tuple[str, object]) -> bool:
    """Whether an entry of the marker is as `seal` writes it: a pod may have sent another."""
    name, noted = entry
    right = isinstance(noted, dict) and type(noted.get("size")) is int and isinstance(noted.get("sha256"), str)
    return right and name.isprintable() and len(name) < 4096


def newest(run: RunDir, say: Callable[[str], None] = lambda line: None) -> int | None:
    """Step of the newest checkpoint that is whole, None without one; says which ones are passed over, and why."""
    for step in reversed(steps(run)):
        path = folder(run, step)
        if not (path / MARKER).is_file():
            say(f"checkpoint {step} is incomplete: skipped")
            continue
        wrong = damage(path)
        if not wrong:
            return step
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        say(f"checkpoint {step} is damaged ({wrong[0]}{more}): skipped")
    return None


def interrupted(run: RunDir) -> InterruptedRun:
    """The error of a run that a signal ended at once: names the checkpoint to resume from."""
    done = complete(run)
    if not done:
        return InterruptedRun("interrupted before there was anything to save")
    what = f"interrupted; what was trained until step {done[-1]} is in {folder(run, done[-1])}"
    return InterruptedRun(Problem(what, None, f"python -m runner resume {shlex.quote(str(run.path))}"))


def discard(run: RunDir, wanted: Iterable[int]) -> None:
    """Delete checkpoints, the marker first: one that is half deleted does not count."""
    for step in wanted:
        path = folder(run, step)
        (path / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def superseded(run: RunDir, keep: int, best: int | None = None) -> list[int]:
    """Steps that need not be kept: all complete ones but the newest `keep` and the best."""
    return [step for step in complete(run)[:-keep] if step != best]


def _flushed(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"size": file.stat().st_size, "sha256": _sum(file)}


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush_folder(path: Path) -> None:
    """Directory entries are data, too (fsync(2)); where folders cannot be opened, the system does it by itself."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
