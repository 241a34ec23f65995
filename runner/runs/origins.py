"""`origins.json`: the words that a run was started with, and the place that set each of its values."""

from __future__ import annotations

from contextlib import suppress

from runner.config.command_line import Request
from runner.config.compose import origins
from runner.config.provenance import COMMAND_LINE, flattened
from runner.report.run_report.facts import ORIGINS
from runner.report.tables import derived_from
from runner.rundir.directory import RunDir
from runner.spec import RunSpec


def record_origins(run: RunDir, request: Request, composed: RunSpec, spec: RunSpec) -> None:
    """Write it for a new run, which does without it where that fails: it is for readers alone."""
    with suppress(Exception):
        run.write(ORIGINS, {"typed": _typed(request), "places": places(request, composed, spec)})


def record_resume(run: RunDir, overrides: tuple[str, ...]) -> None:
    """The keys that a resume has set."""
    known = run.read(ORIGINS)
    found = known.get("places")
    if not overrides or not isinstance(found, dict):
        return
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0]
        found |= {one: f"{COMMAND_LINE} of a resume" for one in found if one == key or one.startswith(f"{key}.")}
    with suppress(OSError):
        run.write(ORIGINS, {**known, "places": found})


def places(request: Request, composed: RunSpec, spec: RunSpec) -> dict[str, str]:
    """Dotted key → `command line`, file and line, `default`, or what its value was derived from."""
    setting = origins(request)
    before = dict(flattened(composed.model_dump(mode="json")))
    found = {}
    for key, value in flattened(spec.model_dump(mode="json")):
        where = [one.place for one in setting if one.concerns(key)]
        found[key] = derived_from(key) if key in before and value != before[key] else (where or ["default"])[-1]
    return found


def _typed(request: Request) -> list[str]:
    """The words, in an order that means the same: `--config-dir` first, then what the run starts from."""
    folders = [word for folder in request.config_dirs for word in ("--config-dir", str(folder))]
    start = [str(request.spec_file)] if request.spec_file else []
    recipe = [f"recipe={request.recipe}"] if request.recipe else []
    return [*folders, *start, *recipe, *(word.lstrip("+") for word in request.overrides)]  # `++` is of a sweep's
