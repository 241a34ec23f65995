"""Digests of a run's inputs: recorded in `inputs.json` at its start, compared on resume.

What is behind a URL or on the Hub is compared by its rows, in the worker (train/worker.py), and so is everything else.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from runner.data import user_code
from runner.data.readers.sources import files_digest, files_of
from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.spec.input_paths import get_place, is_code, is_url, named_places, put_place

FILE = "inputs.json"
REMEDY = "restore it, or write run.on_changed_inputs=continue to use the new content"


def record_digests(run: RunDir, spec: RunSpec) -> None:
    """Keep what the files that the run reads hold."""
    run.write(FILE, _digests(spec))


def changed_inputs(run: RunDir, spec: RunSpec) -> list[Problem]:
    """A problem for every file whose content is not what the run began with."""
    if spec.run.on_changed_inputs == "continue":
        return []
    known, now = run.read(FILE), _digests(spec)
    places = dict(named_places(spec))
    gone = [
        Problem(f"{places[key]} does not exist", key, f"restore it, or name its new place: {key}=…")
        for key in known
        if key in places and key not in now
    ]
    return gone + [
        Problem(f"{_called(key, places[key])} is not what the run has trained on until now", key, REMEDY)
        for key in now
        if key in known and known[key] != now[key]
    ]


def changed_base(run: RunDir, spec: RunSpec) -> str | None:
    """A line where the folder of the base holds something else than when the run began; RequestError where it is gone.

    An adapter belongs to the weights that it was trained on. A note only: a file more in the folder does no harm.
    """
    place, known = Path(spec.model.id), run.read(FILE).get("model.id")
    if place.is_absolute() and not place.exists():
        raise RequestError(Problem(f"{place}, the run's base, does not exist", "model.id", "bring it back"))
    if known is None or known == _digest("model.id", spec.model.id):
        return None
    return f"Note: {place}, the run's base, is not what the adapter was trained on: its files have changed since"


def with_moved_places(run: RunDir, old: RunSpec, new: RunSpec) -> RunSpec:
    """The new run with its places called as before where they hold the same, or where that does not matter."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    known, free = run.read(FILE), new.run.on_changed_inputs == "continue"
    for key, value in named_places(new):
        with suppress(KeyError, IndexError):  # it was not there
            said = get_place(before, key)
            if said != get_place(after, key) and (free or known.get(key) == _digest(key, value)):
                put_place(after, key, said)
    return RunSpec.model_validate(after)


def _called(key: str, path: str) -> str:
    imports = is_code(key) and len(user_code.source_files(path)) > 1
    return f"{path} or a module it imports" if imports else path


def _digests(spec: RunSpec) -> dict[str, object]:
    found = {key: _digest(key, value) for key, value in named_places(spec) if key != "deepspeed.config"}
    return {key: value for key, value in found.items() if value is not None}


def _digest(key: str, path: str) -> str | None:
    """Of a file, of what a glob fits, of a folder with everything in it, or of a reward function's file with the
    modules that it imports; None for what is not here."""
    if is_url(path):
        return None
    place = Path(path).expanduser()
    with suppress(OSError, RequestError):
        if place.is_dir():
            return files_digest([str(file) for file in sorted(place.rglob("*")) if file.is_file()])
        return files_digest(user_code.source_files(path) if is_code(key) else files_of(path))
    return None
