"""The trash of runs: `delete` moves a run into `.trash` beside it, `restore` moves it back."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from shlex import quote

from runner.cloud.ledger import Ledger
from runner.errors import Problem, RequestError
from runner.paths import state_dir
from runner.rundir.atomic_folder import whole
from runner.rundir.directory import ACTIVE, RunDir, display_path, no_such_run_problem, run_folder
from runner.rundir.lock import own_run, run_at_work_error

TRASH = ".trash"
"""Folder beside the runs: on the same disk, so that a run of 100 GB is moved at once."""


def delete(paths: tuple[Path, ...], output_dir: Path) -> list[tuple[Path, Path]]:
    """Move runs to the trash; where each was, and where it is.

    RequestError, and nothing is moved, where one is no run, is running or has a pod.
    """
    runs, problems = [], []
    for path in dict.fromkeys(paths):
        run = _run_at(path, output_dir)
        if run is None:
            problems.append(no_such_run_problem(path))
        elif found := _why_not(run):
            problems.append(found)
        else:
            runs.append(run)
    if problems:
        raise RequestError(*problems)
    moved = []
    for run in runs:
        target = _trashed(run.path)
        with own_run(run):  # who resumes it at this moment has it, or meets the lock
            _move(run.path, target)
        moved.append((run.path, target))
    return moved


def restore(paths: tuple[Path, ...], output_dir: Path) -> list[tuple[Path, Path]]:
    """Move runs back from the trash; where each was in it, and where it is. RequestError, and nothing is moved, where
    one is not in the trash or its place is taken."""
    moves, problems = [], []
    for path in dict.fromkeys(paths):
        source = _in_trash(path, output_dir)
        if source is None:
            there = ", ".join(trashed_ids(output_dir)) or "nothing"
            what = f"{path.name} is not in the trash {display_path(output_dir / TRASH)}"
            problems.append(
                Problem(what, "command line", f"it holds {there}; --output-dir names another folder of runs")
            )
        elif (target := source.parent.parent / source.name).exists():
            remedy = f"move that one away: mv {quote(display_path(target))} {quote(display_path(target))}-other"
            problems.append(Problem(f"{display_path(target)} is there already", "command line", remedy))
        else:
            moves.append((source, target))
    if problems:
        raise RequestError(*problems)
    for source, target in moves:
        _move(source, target)
    return moves


def trashed_ids(output_dir: Path) -> list[str]:
    """Ids of the runs in the trash of a folder of runs."""
    return sorted(file.parent.name for file in (output_dir / TRASH).glob("*/status.json"))


def _run_at(path: Path, output_dir: Path) -> RunDir | None:
    """A run, with `spec.json` or with what is left of one; a link to a folder stays a link."""
    folder = run_folder(path)
    for place in dict.fromkeys((folder, output_dir / folder)):
        if any((place / name).is_file() for name in ("spec.json", "status.json")):
            return RunDir(Path(os.path.abspath(place)))
    return None


def _why_not(run: RunDir) -> Problem | None:
    """Why a run may not be moved."""
    status = run.status
    if run.path.parent.name == TRASH:
        shown = quote(display_path(run.path.parent))
        return Problem(f"{run.id} is in the trash already", "command line", f"rm -r {shown} empties it for ever")
    if run.state(status) in ACTIVE:
        return run_at_work_error(run, {key: status[key] for key in ("pid", "host") if key in status})
    if held := _pod_of(run.id):
        remedy = f"python -m runner fetch {run.id} downloads what it has; pods terminate {run.id} ends it"
        return Problem(f"{run.id} has {held}", "command line", remedy)
    if _trashed(run.path).exists():
        shown = quote(display_path(_trashed(run.path)))
        return Problem(f"the trash has a run {run.id} already", "command line", f"rm -r {shown} deletes it for ever")
    return None


def _pod_of(run_id: str) -> str | None:
    """The pod of a run that is not gone, in words."""
    if not (state_dir() / "ledger.db").exists():  # nothing was ever rented
        return None
    for entry in Ledger.or_copy()[0].entries(run_id):
        if entry.state != "GONE":
            return f"a pod, {entry.pod_id or entry.name} ({entry.state})"
    return None


def _trashed(folder: Path) -> Path:
    return folder.parent / TRASH / folder.name


def _in_trash(path: Path, output_dir: Path) -> Path | None:
    """The run in a trash that is meant by its id, its old folder or its folder in the trash."""
    folder = Path(os.path.abspath(run_folder(path)))
    places = [folder] if folder.parent.name == TRASH else [_trashed(folder)]
    places.append(Path(os.path.abspath(output_dir)) / TRASH / folder.name)
    return next(
        (place for place in places if (place / "status.json").is_file() or (place / "spec.json").is_file()), None
    )


def _move(source: Path, target: Path) -> None:
    """Rename; where the target is on another disk, copy it whole, then remove the source."""
    try:
        target.parent.mkdir(exist_ok=True)
        try:
            source.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with whole(target) as temporary:
                shutil.copytree(source, temporary, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(source)
    except OSError as error:
        what = f"{display_path(source)} cannot be moved to {display_path(target)}: {error.strerror or error}"
        remedy = "it is where it was; see the rights of both folders and the room on the disk"
        raise RequestError(Problem(what, "command line", remedy)) from None
