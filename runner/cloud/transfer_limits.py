"""Limits on what a pod may send: what a run can hold, and never the last of the disk.

A pod is a stranger's machine. One that sends without end would fill the disk of whoever rents it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from runner.errors import Problem, RunFailedError
from runner.rundir.directory import RunDir

RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 20
"""What stays free: a GiB, or a twentieth of a small disk."""
TIMES_PLANNED = 4
MORE_BYTES = 20 << 30
"""Logs, profiles, what packages leave: on top of so many times what the plan says of disks."""
FOLLOWED_BYTES = 4 << 30
"""Logs and measurements while a run is followed: 15 million steps of 300 bytes."""
FOLLOWED_FILES = 5_000
MOST_FILES = 200_000


class TooMuchError(RunFailedError):
    """The pod has, or sends, more than there is room for here, or than a run can hold."""


def free(folder: Path) -> int:
    """Bytes that may be written below a folder; 0 where only the reserve is left."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    disk = shutil.disk_usage(place)
    return max(0, disk.free - min(RESERVE_BYTES, disk.total // RESERVE_SHARE))


def of_run(run: RunDir) -> int:
    """Bytes that a run can hold by its plan, or that there is room for, whichever is less."""
    planned = run.read("plan.json").get("disk_gib")
    if not isinstance(planned, (int, float)) or not 0 < planned < 1e9:
        return free(run.path)
    return min(free(run.path), int(TIMES_PLANNED * planned * (1 << 30)) + MORE_BYTES)


def check(size: int, files: int, most: int, folder: Path) -> None:
    """TooMuchError for what a pod says it has."""
    if size > most:
        raise too_much(f"the pod has {shown(size)} to send", most, folder)
    if files > MOST_FILES:
        raise TooMuchError(Problem(f"the pod has {files:,} files to send: no run has so many", None, LOOK))


def too_much(what: str, most: int, folder: Path) -> TooMuchError:
    """With the limit, and what to do about it."""
    if most >= free(folder):
        remedy = f"make room at {os.fspath(folder.parent)}, then fetch the run; what stays in the pod is kept there"
        return TooMuchError(Problem(f"{what}, and there is room for {shown(most)} here", None, remedy))
    return TooMuchError(Problem(f"{what}, more than a run of this plan can hold ({shown(most)})", None, LOOK))


LOOK = "python -m runner pods ssh POD, and delete what does not belong to the run; then fetch it"


def shown(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
