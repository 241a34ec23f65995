"""Many runs out of one request: every point is checked, then all are run, and what came out is sorted."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner import hardware
from runner.compose import compose, parallel_jobs, points, source_finder, task_overrides
from runner.compose import sweep as hydra_sweep
from runner.errors import InterruptedRun, Problem, RequestError, RunnerError
from runner.execute.manner import PLAINLY, Manner
from runner.launch import agreed, check, plan_first, start
from runner.plan.plan import Plan
from runner.report.metrics import unknown_metric
from runner.report.problems import dump, print_problems
from runner.report.summary import metric_of, shown
from runner.report.tables import print_sweep
from runner.request import COMMAND_LINE, Request
from runner.resolve import complete
from runner.rundir import RunDir, write_atomically
from runner.spec import RunSpec


def sweep(request: Request, console: Console, as_json: bool, manner: Manner = PLAINLY) -> int:
    """All points of a sweep; a failed one does not stop the others, but the exit code says so."""
    if not request.overrides and request.spec_file is None:
        remedy = "write key=a,b for what is to differ, such as method=lora,full; without -m it is one run"
        raise RequestError(Problem("-m sweeps over values, and none is named", COMMAND_LINE, remedy))
    checked = _checked(request, manner)
    specs = [spec for spec, _ in checked]
    shared = specs[0]
    name = f"sweep-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(shared.run.output_dir).expanduser() / "sweeps" / name
    max_pods = _max_pods(request, specs, manner)
    if max_pods:
        pods = import_module("runner.execute.pool")  # read for rented runs alone, as launch.rented is
        manner = replace(manner, pool=pods.made_for(specs, folder, max_pods))
    if not agreed(checked, manner, console):
        return InterruptedRun.exit_code
    _made(folder, shared.run.output_dir)
    manner = replace(manner, yes=True)  # asked once
    try:
        interrupted = not _run(request, folder, as_json, manner, console)
    except KeyboardInterrupt:
        interrupted = True
    rows = [r for file in sorted(folder.glob("point-*.json")) if (r := RunDir(folder).read(file.name))]
    worst = math.inf if shared.run.metric_mode == "min" else -math.inf
    rows.sort(key=lambda r: r["metric"] if r["metric"] is not None else worst, reverse=shared.run.metric_mode == "max")
    RunDir(folder).write("sweep.json", {"sweep": name, "metric": shared.run.metric, "runs": rows})
    if as_json:
        click.echo(dump(rows))
    else:
        print_sweep(console, rows, shared.run.metric, shown(folder))
    if interrupted:
        return InterruptedRun.exit_code
    return 1 if any(row["exit_code"] for row in rows) or not rows else 0


def _made(folder: Path, output_dir: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(f"run.output_dir={output_dir} cannot be written to: {error.strerror}", "run.output_dir")
        raise RequestError(problem) from None


def _run(request: Request, folder: Path, as_json: bool, manner: Manner, console: Console) -> bool:
    """Every point, through Hydra's launcher; over rented pods as many at once as there may be pods. False where it was
    stopped before the last one."""
    task, pool = partial(_point, sweep_dir=folder, as_json=as_json, manner=manner), manner.pool
    if pool is None:
        hydra_sweep(request, task, folder)
        return True
    jobs = min(pool.max_pods, len(pool.kinds))
    launcher = ["basic"] if jobs == 1 else ["joblib", f"hydra.launcher.n_jobs={jobs}", "hydra.launcher.batch_size=1"]
    request = replace(request, overrides=(*request.overrides, f"hydra/launcher={launcher[0]}", *launcher[1:]))
    with pool.kept(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)):
        hydra_sweep(request, partial(pool.points.do, task), folder)
        return not pool.points.stopped


def _max_pods(request: Request, specs: list[RunSpec], manner: Manner) -> int | None:
    """How many pods at once, one handed on from run to run; None where every rented run has one of its own."""
    asked, renting = max(spec.sweep.max_pods for spec in specs), sum(spec.where.name == "runpod" for spec in specs)
    typed = {word.lstrip("+~").partition("=")[0] for word in request.overrides}
    source = f"sweep.max_pods={asked}"
    if asked > 1 and manner.detach:
        what = "nobody stays who could hand a pod on to the next run: a detached sweep has a pod for each, all at once"
        raise RequestError(Problem(what, f"--detach with {source}", f"leave out --detach, or {source}"))
    if asked > 1 and renting < len(specs):
        what = f"{len(specs) - renting} of {len(specs)} runs are not rented, and would be many at once on this machine"
        raise RequestError(Problem(what, source, "write where=runpod, or leave sweep.max_pods out"))
    if asked > 1 and "hydra/sweeper" in typed:
        what = "a sweeper that chooses its points as it goes does not say how many pods are needed still"
        raise RequestError(Problem(what, source, "leave sweep.max_pods out: every run has a pod of its own then"))
    if not renting or manner.detach or "hydra/sweeper" in typed:
        return None
    if any(key.startswith(("hydra/launcher", "hydra.launcher")) for key in typed):
        what = "how many rented runs go on at once is how many pods there may be"
        remedy = "write sweep.max_pods=2, say, and leave hydra/launcher and hydra.launcher out"
        raise RequestError(Problem(what, COMMAND_LINE, remedy))
    return asked


def _checked(request: Request, manner: Manner) -> list[tuple[RunSpec, Plan | None]]:
    """Every point of a sweep, resolved and able to run, with its plan; else one error with what is wrong with any."""
    found: list[tuple[RunSpec, Plan | None]] = []
    errors: list[RunnerError] = []
    for point in points(request):
        try:
            composed = compose(point)
            if (wrong := unknown_metric(composed.run.metric)) is not None:
                raise RequestError(wrong)
            spec, notes = complete(composed, source_finder(point), fetch=True)
            planned = plan_first(spec, notes, composed)
            check(spec, notes, composed, manner)
            found.append((spec, planned))
        except RunnerError as error:
            errors.append(_of_point(error, point))
    if errors:
        kind = type(errors[0])
        raise kind(*dict.fromkeys(p for error in errors if isinstance(error, kind) for p in error.problems))
    return found


def _of_point(error: RunnerError, point: Request) -> RunnerError:
    """The error with the point of the sweep that it concerns."""
    where = " ".join(point.overrides)
    return type(error)(*(replace(p, source=p.source or where) for p in error.problems))


def _sharing(spec: RunSpec, jobs: int) -> RunSpec:
    """On this machine's CPU, an equal share of the cores for each of the runs that go on at once.

    Two runs with a thread per core each wait for one another at every barrier: ten times slower, not two.
    """
    if jobs == 1 or spec.where.name == "runpod":
        return spec
    hw = hardware.resolve(spec.hw)
    if hw.accelerator != "cpu" or not hw.num_cpus:
        return spec
    return spec.model_copy(update={"hw": hw.model_copy(update={"num_cpus": max(1, hw.num_cpus // jobs)})})


def _point(spec: RunSpec, index: int, sweep_dir: Path, as_json: bool, manner: Manner = PLAINLY) -> float:
    """One point of a sweep: never raises; leaves `point-<index>.json` and returns the metric.

    Of one that failed, or whose metric is no number, the worst there can be: NaN would end a study of Optuna's.
    """
    console = Console(stderr=as_json)
    row: dict[str, Any] = {"index": index, "run_id": None, "overrides": task_overrides(), "metric": None}
    try:
        composed = _sharing(spec, parallel_jobs())
        spec, notes = complete(composed, fetch=True)
        if manner.pool is not None:
            spec = manner.pool.fitted(spec)
        planned = plan_first(spec, notes, composed)
        check(spec, notes, composed, manner)
        outcome = start(spec, notes, console, as_json, sweep=sweep_dir.name, planned=planned, manner=manner)
        row |= {"run_id": outcome.run.id, "exit_code": outcome.exit_code}
        row["error"] = outcome.run.read("status.json").get("error")
        value = metric_of(outcome.run.read("summary.json"), spec.run.metric)
    except RunnerError as error:
        print_problems(Console(stderr=True), error)
        row |= {"exit_code": error.exit_code, "error": str(error)}
        value = math.nan
    if math.isnan(value):
        value = math.inf if spec.run.metric_mode == "min" else -math.inf
    row["metric"] = value if math.isfinite(value) else None
    sweep_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep_dir / f"point-{index:04d}.json", dump(row))
    if row["exit_code"] == 130:
        raise KeyboardInterrupt
    return value
