"""Refuses links and devices where only plain files belong: a model may come from another machine."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from runner.errors import Problem, RequestError

KINDS = (
    (stat.S_ISLNK, "a link"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)  # fmt: skip


def special_kind(mode: int) -> str:
    """The kind of a special file; empty for a folder or a plain file."""
    return next((what for test, what in KINDS if test(mode)), "")


def special_files(folder: Path) -> list[tuple[Path, str]]:
    """Special files below a folder, or in its place, each with its kind."""
    try:
        if what := special_kind(os.lstat(folder).st_mode):
            return [(folder, what)]
    except OSError:
        return []
    names = [
        Path(path, name) for path, folders, files in os.walk(folder) for name in (*sorted(folders), *sorted(files))
    ]
    return [(path, what) for path in names if (what := special_kind(path.lstat().st_mode))]


def refuse_special_files(*folders: Path) -> None:
    """RequestError where one of them has a link: what it leads to would be read, or uploaded, as the run's own."""
    problems = []
    for path, what in (one for folder in folders for one in special_files(folder)):
        to = f" to {os.readlink(path)}" if path.is_symlink() else ""
        remedy = f"if it is not yours, delete it: rm {shlex.quote(str(path))}; else put the file itself in its place"
        problems.append(Problem(f"{path} is {what}{to}, where only plain files belong", None, remedy))
    if problems:
        raise RequestError(*problems)
