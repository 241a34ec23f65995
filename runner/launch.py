"""From a request to finished runs: one, or a sweep of them."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner import hardware, planning
from runner.compose import compose, parallel_jobs, points, source_finder, task_overrides
from runner.compose import sweep as hydra_sweep
from runner.errors import InterruptedRun, RequestError, RunnerError
from runner.execute import local
from runner.plan.plan import Plan
from runner.plan.resolve import resolve
from runner.problems import SourceOf, validated
from runner.report.problems import dump, print_problems
from runner.report.summary import metric_of, shown
from runner.report.tables import headline, in_one_line, print_sweep
from runner.request import Request
from runner.rundir import RunDir, write_atomically
from runner.spec import RunSpec


def resolved(request: Request, *, needed: bool = False) -> tuple[RunSpec, list[str]]:
    """The run with nothing left open, and notes for the user."""
    return complete(compose(request), source_finder(request), needed=needed)


def complete(
    spec: RunSpec, source_of: SourceOf = lambda key: None, *, needed: bool = False
) -> tuple[RunSpec, list[str]]:
    """Look at the hardware and the model's facts, then decide every `auto`; the rules across parts are checked again.

    `needed`: the facts of a model outside the catalogue are asked of the Hub, and missing ones are an error.
    """
    checked = asked(spec, source_of, needed=needed)
    said: list[str] = []
    if checked.where.name == "auto":
        here = None if hardware.why_not_here(checked.hw) else checked.hw
        checked, said = planning.place(checked, here)
    ready, notes = resolve(checked, planning.options_for(checked))
    return ready, [*said, *notes]


def asked(spec: RunSpec, source_of: SourceOf = lambda key: None, *, needed: bool = False) -> RunSpec:
    """A composed run with the facts of hardware and model, its `auto`s still open."""
    found = spec.model_copy(update={"hw": hardware.resolve(spec.hw)})
    return validated(planning.with_facts(found, needed=needed).model_dump(), source_of)


def run(request: Request, console: Console, as_json: bool) -> int:
    """One run, to its end; the exit code of the worker."""
    composed = compose(request)
    spec, notes = complete(composed, source_finder(request))
    planned = plan_first(spec, notes, composed)
    try:
        local.check(spec)
    except RunnerError:
        if planned is not None:
            line = f"Plan    {in_one_line(planned.as_dict())}"
            Console(stderr=True).print(line, highlight=False, soft_wrap=True)
        raise
    outcome = start(spec, notes, console, as_json, planned=planned)
    if as_json:
        click.echo(dump(outcome.run.read("summary.json") or outcome.run.read("status.json")))
    return outcome.exit_code


def plan_first(spec: RunSpec, notes: list[str], composed: RunSpec) -> Plan | None:
    """What the run needs and takes, before anything is made; CannotRunError for what does not fit or costs too much.

    `composed` is the run as it was asked for, from which the refusal works out what would fit.

    None for a model that the arithmetic does not know: the run goes on without a plan, and says so.
    """
    try:
        planned = planning.plan(spec, notes)
    except RequestError as error:
        notes.append(f"no plan: {error}")
        return None
    if planned.reasons:
        planning.refuse(asked(composed), planned)
    return planned


def start(
    spec: RunSpec, notes: list[str], console: Console, as_json: bool, sweep: str | None = None,
    planned: Plan | None = None,
) -> local.Outcome:  # fmt: skip
    """Make the run directory, say what is about to happen, and run."""
    directory = RunDir.create(spec, sweep)
    console.print(headline(spec, shown(directory.path)), highlight=False, soft_wrap=True)
    if planned is not None:
        directory.write("plan.json", planned.as_dict())
        console.print(f"Plan    {in_one_line(planned.as_dict())}", highlight=False, soft_wrap=True)
        if planned.deepspeed is not None:
            directory.write("deepspeed.json", planned.deepspeed)
    for note in notes:
        console.print(f"Note    {note}", highlight=False, soft_wrap=True)
    return local.execute(directory, spec, quiet_stdout=as_json)


def sweep(request: Request, console: Console, as_json: bool) -> int:
    """All points of a sweep; a failed one does not stop the others, but the exit code says so."""
    shared = _checked(request)[0]
    name = f"sweep-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(shared.run.output_dir).expanduser() / "sweeps" / name
    interrupted = False
    try:
        hydra_sweep(request, partial(_point, sweep_dir=folder, as_json=as_json), folder)
    except KeyboardInterrupt:
        interrupted = True
    rows = [r for file in sorted(folder.glob("point-*.json")) if (r := RunDir(folder).read(file.name))]
    worst = math.inf if shared.run.metric_mode == "min" else -math.inf
    rows.sort(key=lambda r: r["metric"] if r["metric"] is not None else worst, reverse=shared.run.metric_mode == "max")
    folder.mkdir(parents=True, exist_ok=True)
    RunDir(folder).write("sweep.json", {"sweep": name, "metric": shared.run.metric, "runs": rows})
    if as_json:
        click.echo(dump(rows))
    else:
        print_sweep(console, rows, shared.run.metric, shown(folder))
    if interrupted:
        return InterruptedRun.exit_code
    return 1 if any(row["exit_code"] for row in rows) or not rows else 0


def _checked(request: Request) -> list[RunSpec]:
    """Every point of a sweep, resolved and able to run; else one error with what is wrong with any of them."""
    specs: list[RunSpec] = []
    errors: list[RunnerError] = []
    for point in points(request):
        try:
            composed = compose(point)
            spec, notes = complete(composed, source_finder(point))
            plan_first(spec, notes, composed)
            local.check(spec)
            specs.append(spec)
        except RunnerError as error:
            errors.append(_of_point(error, point))
    if errors:
        kind = type(errors[0])
        raise kind(*dict.fromkeys(p for error in errors if isinstance(error, kind) for p in error.problems))
    return specs


def _of_point(error: RunnerError, point: Request) -> RunnerError:
    """The error with the point of the sweep that it concerns."""
    where = " ".join(point.overrides)
    return type(error)(*(replace(p, source=p.source or where) for p in error.problems))


def _sharing(spec: RunSpec, jobs: int) -> RunSpec:
    """On a CPU, an equal share of the cores for each of the runs that go on at once.

    Two runs with a thread per core each wait for one another at every barrier: ten times slower, not two.
    """
    hw = hardware.resolve(spec.hw)
    if jobs == 1 or hw.accelerator != "cpu" or not hw.num_cpus:
        return spec
    return spec.model_copy(update={"hw": hw.model_copy(update={"num_cpus": max(1, hw.num_cpus // jobs)})})


def _point(spec: RunSpec, index: int, sweep_dir: Path, as_json: bool) -> float:
    """One point of a sweep: never raises; leaves `point-<index>.json` and returns the metric (NaN if it failed)."""
    console = Console(stderr=as_json)
    row: dict[str, Any] = {"index": index, "run_id": None, "overrides": task_overrides(), "metric": None}
    try:
        composed = _sharing(spec, parallel_jobs())
        spec, notes = complete(composed)
        planned = plan_first(spec, notes, composed)
        local.check(spec)
        outcome = start(spec, notes, console, as_json, sweep=sweep_dir.name, planned=planned)
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
