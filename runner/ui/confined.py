"""Paths that a browser names: below the working directory, or refused."""

from __future__ import annotations

import os
from pathlib import Path

from runner.config import conf_files
from runner.errors import Problem, RequestError
from runner.paths import ASSETS, PACKAGE
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.spec.input_paths import is_url, named_places


def inside(text: str, base: Path | None = None) -> Path:
    """The path that a text names, links followed; RequestError where it is not below `base` (the working directory)."""
    root = (base or Path.cwd()).resolve()
    if "\0" in text:
        raise RequestError(Problem("a path holds no NUL", "page"))
    path = (root / Path(text).expanduser()).resolve()
    if not path.is_relative_to(root):
        remedy = f"copy the file there, or start `python -m runner ui` in a folder above it; this one is in {root}"
        raise RequestError(Problem(f"{text} is outside the working directory", "page", remedy))
    return path


def check_value(key: str, text: str) -> None:
    """RequestError for a value that names a file outside, or reads the environment by an interpolation."""
    if "${" in text:
        what = f"{key}: the page takes values, and no interpolation ${{…}}"
        raise RequestError(Problem(what, "page", "write the value itself, or the interpolation into a recipe"))
    for word in text.strip("[]").split(","):
        word = word.strip(" '\"")
        if key not in TEXTS and not is_url(word) and (word.startswith(("/", "~")) or ".." in Path(word).parts):
            inside(word.rpartition(".py:")[0] + ".py" if ".py:" in word else word)


TEXTS = ("data.system_prompt", "objective.reward_regex")
"""Keys whose value is text that may begin like a path."""


def check_spec(spec: RunSpec) -> None:
    """RequestError with every file outside the working directory that a run reads; the project's own are let in."""
    problems = []
    for _, path in named_places(spec):
        if is_url(path) or Path(os.path.abspath(path)).is_relative_to(PACKAGE) or _own(path):
            continue
        try:
            inside(path)
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)


def _own(path: str) -> bool:
    folders = [ASSETS / name for name in ("conf", "recipes", "deepspeed_configs")]
    return any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in folders)


def run_of(run_id: str, output_dir: Path) -> RunDir:
    """The run of that id; RequestError for one that is not there, or is no name of a folder."""
    if run_id != Path(run_id).name or run_id in ("", ".", "..") or "\0" in run_id:
        raise RequestError(Problem(f"{run_id!r} is no id of a run", "page"))
    run = RunDir(output_dir / run_id)
    if not (run.path / "status.json").is_file() or run.path.is_symlink():
        raise RequestError(Problem(f"there is no run {run_id}", "page", "the list of runs shows those that are there"))
    return run


def recipe_of(name: str) -> str:
    """A recipe of the catalogue, or a file below the working directory."""
    return name if name in conf_files.recipes() else str(inside(name))
