"""Contents of what a run reads (rows, templates, reward functions), tried before anything is made.

Apart from inputs.py, which only looks whether files are there: a plan need not read how rows are judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runner.data import row_checks
from runner.data.readers.sources import files_of
from runner.errors import RequestError
from runner.machine import writable
from runner.runs.inputs import check_files
from runner.spec import RunSpec
from runner.spec.input_paths import is_url, named_places

_checked: dict[str, list[str]] = {}
"""Notes on what this process has found right: the points of a sweep mostly read the same."""


def check_contents(spec: RunSpec) -> list[str]:
    """Notes; RequestError for what is not there, and for rows, templates and reward functions that are not right.

    CannotRunError where a cache cannot be written to.
    """
    check_files(spec)
    writable.check_caches(spec)
    said = (spec.data, spec.objective, spec.model, spec.eval, spec.where.name, sorted(_states(spec)))
    if (key := repr(said)) not in _checked:
        _checked[key] = row_checks.check_rows(spec)
    return list(_checked[key])


def _states(spec: RunSpec) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of every file here that a run reads."""
    for _, path in named_places(spec):
        with suppress(RequestError):
            for file in [] if is_url(path) else files_of(path):
                with suppress(OSError):
                    stat = Path(file).expanduser().stat()
                    yield file, stat.st_size, stat.st_mtime_ns
