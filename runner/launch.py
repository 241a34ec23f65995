"""From a request to finished runs: one, or a sweep of them."""

from __future__ import annotations

import math
import secrets
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner import hardware
from runner.compose import Request, compose, task_overrides
from runner.compose import sweep as hydra_sweep
from runner.errors import RunnerError
from runner.execute import local
from runner.plan.resolve import resolve
from runner.report.problems import dump, print_problems
from runner.report.summary import metric_of, shown
from runner.report.tables import headline, print_sweep
from runner.rundir import RunDir, write_atomically
from runner.spec import RunSpec


def resolved(request: Request) -> tuple[RunSpec, list[str]]:
    """The run with nothing left open, and notes for the user."""
    return complete(compose(request))


def complete(spec: RunSpec) -> tuple[RunSpec, list[str]]:
    """Look at the hardware, then decide every `auto`; the rules across parts are checked once more."""
    spec = RunSpec.model_validate(spec.model_copy(update={"hw": hardware.resolve(spec.hw)}).model_dump())
    return resolve(spec)


def run(request: Request, console: Console, as_json: bool) -> int:
    """One run, to its end; the exit code of the worker."""
    spec, notes = resolved(request)
    local.check(spec)
    outcome = start(spec, notes, console, as_json)
    if as_json:
        click.echo(dump(outcome.run.read("summary.json") or outcome.run.read("status.json")))
    return outcome.exit_code


def start(
    spec: RunSpec, notes: list[str], console: Console, as_json: bool, sweep: str | None = None
) -> local.Outcome:
    """Make the run directory, say what is about to happen, and run."""
    directory = RunDir.create(spec, sweep)
    console.print(headline(spec, shown(directory.path)), highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"Note    {note}", highlight=False, soft_wrap=True)
    return local.execute(directory, spec, quiet_stdout=as_json)


def sweep(request: Request, console: Console, as_json: bool) -> int:
    """All points of a sweep; a failed one does not stop the others, but the exit code says so."""
    base = compose(_without_sweeps(request))
    name = f"sweep-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(base.run.output_dir).expanduser() / "sweeps" / name
    hydra_sweep(request, partial(_point, sweep_dir=folder, as_json=as_json), folder)
    rows = [r for file in sorted(folder.glob("point-*.json")) if (r := RunDir(folder).read(file.name))]
    worst = math.inf if base.run.metric_mode == "min" else -math.inf
    rows.sort(key=lambda r: r["metric"] if r["metric"] is not None else worst, reverse=base.run.metric_mode == "max")
    RunDir(folder).write("sweep.json", {"sweep": name, "metric": base.run.metric, "runs": rows})
    if as_json:
        click.echo(dump(rows))
    else:
        print_sweep(console, rows, base.run.metric, shown(folder))
    return 1 if any(row["exit_code"] for row in rows) or not rows else 0


def _without_sweeps(request: Request) -> Request:
    """The first point, for what all points share (where runs go, which metric sorts them)."""
    keep = tuple(o for o in request.overrides if o.startswith(("run.", "recipe=")))
    return Request(request.recipe, keep, request.config_dirs, request.spec_file)


def _point(spec: RunSpec, index: int, sweep_dir: Path, as_json: bool) -> float:
    """One point of a sweep: never raises; leaves `point-<index>.json` and returns the metric (NaN if it failed)."""
    console = Console(stderr=as_json)
    row: dict[str, Any] = {"index": index, "run_id": None, "overrides": task_overrides(), "metric": None}
    try:
        spec, notes = complete(spec)
        local.check(spec)
        outcome = start(spec, notes, console, as_json, sweep=sweep_dir.name)
        row |= {"run_id": outcome.run.id, "exit_code": outcome.exit_code}
        row["error"] = outcome.run.read("status.json").get("error")
        value = metric_of(outcome.run.read("summary.json"), spec.run.metric)
    except RunnerError as error:
        print_problems(Console(stderr=True), error)
        row |= {"exit_code": error.exit_code, "error": str(error)}
        value = math.nan
    row["metric"] = None if math.isnan(value) else value
    sweep_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep_dir / f"point-{index:04d}.json", dump(row))
    if row["exit_code"] == 130:
        raise KeyboardInterrupt
    return value
