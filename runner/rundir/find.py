"""Find a run by its directory or id, and say what it lacks."""

from __future__ import annotations

import shlex
from pathlib import Path

from runner.config.suggestions import nearest
from runner.errors import Problem, RequestError
from runner.rundir import checkpoints, plain_files
from runner.rundir.directory import ACTIVE, RunDir, all_runs, shown


def unfinished(run: RunDir, instead: str | None = None) -> RequestError:
    """A run that has no model yet: resumed where it has a checkpoint, else run again."""
    going_on = f"python -m runner resume {shlex.quote(shown(run.path))}"
    state = run.state()
    if state in ACTIVE:
        remedy = "wait for its end: python -m runner runs shows how far it is"
    elif checkpoints.complete(run):
        remedy = f"{going_on} goes on after step {checkpoints.complete(run)[-1]}"
    else:
        remedy = f"{going_on} begins it anew: it has no checkpoint"
    what = f"{shown(run.path)} has no model yet: its state is {state}"
    return RequestError(Problem(what, None, f"{remedy}, {instead}" if instead else remedy))


def find(path: Path) -> RunDir:
    """The run at `path`, by its directory or its id below `runs/`; RequestError where its model is not plain files."""
    for candidate in (path, Path("runs") / path):
        if (candidate / "spec.json").is_file():
            plain_files.refuse(candidate / "model")
            return RunDir(candidate)
    raise RequestError(missing(path))


def missing(path: Path) -> Problem:
    """There is no run at `path`; the one whose id is nearest."""
    parent = path.parent if path.parent.is_dir() and path.parent != Path() else Path("runs")
    near = nearest(path.name, [run.id for run in all_runs(parent)])
    remedy = f"did you mean {parent / near}?" if near else "python -m runner runs shows them"
    return Problem(f"there is no run {path}", "command line", remedy)
