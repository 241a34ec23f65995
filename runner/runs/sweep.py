"""Sweeps: every point is checked, then all are run and sorted by the metric."""

from __future__ import annotations

import math
import secrets
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import click
from rich.console import Console

from runner.config.command_line import Request
from runner.config.compose import Sources, compose
from runner.config.provenance import COMMAND_LINE
from runner.config.sweep_points import Sweep, direction_problem, parallel_jobs, read_sweep, task_overrides
from runner.doctor import system
from runner.errors import InterruptedRun, Problem, RequestError, RunFailedError, RunnerError
from runner.launcher.warm_workers import WarmWorkers
from runner.machine import detect
from runner.plan.plan import Plan
from runner.report.summary import metric_of
from runner.report.tables import print_sweep
from runner.report.text import dump, print_problems
from runner.resolve.steps import resolve
from runner.rundir.directory import RunDir, display_path, write_atomically
from runner.rundir.launch_options import DEFAULT_OPTIONS, LaunchOptions
from runner.runs.launch import check_launch, confirm_costs, create_and_execute, plan_or_refuse
from runner.runs.sweep_metric import unknown_metric, unwritten_metric
from runner.runs.unread_keys import taken_back
from runner.spec import RunSpec


@dataclass(frozen=True)
class _Points:
    """The points of a sweep as they were checked."""

    right: list[tuple[int, Request, RunSpec, Plan | None]]
    wrong: list[tuple[int, Request, RunnerError]]

    @property
    def specs(self) -> list[RunSpec]:
        """The runs that are started."""
        return [spec for _, _, spec, _ in self.right]


def sweep(request: Request, console: Console, as_json: bool, launch_options: LaunchOptions = DEFAULT_OPTIONS) -> int:
    """All points of a sweep; one that cannot run, or fails, does not stop the others, but the exit code says so."""
    warm = WarmWorkers(lambda line: console.print(line, highlight=False, soft_wrap=True))
    try:
        return _sweep(request, console, as_json, replace(launch_options, warm=warm))
    finally:
        warm.close()


def _sweep(request: Request, console: Console, as_json: bool, launch_options: LaunchOptions) -> int:
    asked = read_sweep(request)
    for note in taken_back(request):
        console.print(f"Note    {note}", highlight=False, soft_wrap=True, markup=False)
    _check_targets(asked)
    points = _checked(asked, launch_options)
    specs, shared = points.specs, points.specs[0]
    _check_metrics(specs)
    name = f"sweep-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = Path(shared.run.output_dir).expanduser() / "sweeps" / name
    max_pods = _max_pods(asked, specs, launch_options)
    if max_pods:
        from runner.cloud.sweep_pool import pool_for  # for rented runs alone

        launch_options = replace(launch_options, pool=pool_for(specs, folder, max_pods))
    _tell(asked, points)
    if not confirm_costs([(spec, plan) for _, _, spec, plan in points.right], launch_options, console):
        return InterruptedRun.exit_code
    _made(folder, shared.run.output_dir)
    if not asked.searches:
        _left_out(folder, points)
    launch_options, failed = replace(launch_options, yes=True), None  # asked once
    try:
        interrupted = not _run(asked, points, folder, as_json, launch_options, console)
    except KeyboardInterrupt:
        interrupted = True
    except RunFailedError as error:
        interrupted, failed = False, error
    code = _told(folder, name, shared, as_json, console)
    if failed is not None:
        raise failed
    return InterruptedRun.exit_code if interrupted else code


def _told(folder: Path, name: str, shared: RunSpec, as_json: bool, console: Console) -> int:
    """Sort, keep and print the rows; 1 where any run failed."""
    rows = [r for file in sorted(folder.glob("point-*.json")) if (r := RunDir(folder).read(file.name))]
    worst = _worst(shared)
    rows.sort(key=lambda r: r["metric"] if r["metric"] is not None else worst, reverse=shared.run.metric_mode == "max")
    RunDir(folder).write("sweep.json", {"sweep": name, "metric": shared.run.metric, "runs": rows})
    if as_json:
        click.echo(dump(rows))
    else:
        print_sweep(console, rows, shared.run.metric, display_path(folder))
    return 1 if any(row["exit_code"] for row in rows) or not rows else 0


def _worst(shared: RunSpec) -> float:
    return math.inf if shared.run.metric_mode == "min" else -math.inf


def _tell(asked: Sweep, points: _Points) -> None:
    """Say before the first run which points cannot be, and why."""
    if not points.wrong:
        return
    number, total = len(points.wrong), len(points.wrong) + len(points.right)
    title = f"{number} of {total} points cannot run; the others do"
    if asked.searches:
        title = "A sweeper may choose what cannot run; such a trial counts as the worst"
    told = []
    for _, point, error in points.wrong:
        label = asked.varied(point)
        for p in error.problems:
            told.append(p if not label or label in p.what else replace(p, what=f"{label}: {p.what}"))
    print_problems(Console(stderr=True), RequestError(*dict.fromkeys(told)), title=title)


def _left_out(folder: Path, points: _Points) -> None:
    """A row for each point that cannot run."""
    for number, point, error in points.wrong:
        words = [word.lstrip("+") for word in point.overrides]
        _write_row(folder, _row(number, words) | {"exit_code": error.exit_code, "error": str(error)})


def _row(number: int, words: list[str]) -> dict[str, object]:
    return {"index": number, "run_id": None, "overrides": words, "metric": None}


def _write_row(folder: Path, row: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"point-{row['index']:04d}.json", dump(row))


def _made(folder: Path, output_dir: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem(f"run.output_dir={output_dir} cannot be written to: {error.strerror}", "run.output_dir")
        raise RequestError(problem) from None


def _run(
    asked: Sweep, points: _Points, folder: Path, as_json: bool, launch_options: LaunchOptions, console: Console
) -> bool:  # fmt: skip
    """Every point, through Hydra's launcher; over rented pods as many at once as there may be pods. False where it was
    stopped before the last one."""
    numbers, shared, pool = [number for number, *_ in points.right], points.specs[0], launch_options.pool
    chosen = [point for _, point, _, _ in points.right]
    task = partial(
        _point, sweep_dir=folder, as_json=as_json, launch_options=launch_options,
        numbers=None if asked.searches else numbers, worst=_worst(shared),
        requests=() if asked.searches else tuple(chosen),
    )  # fmt: skip
    if pool is None:
        asked.run(task, chosen, shared, folder)
        return True
    jobs = min(pool.max_pods, len(pool.kinds))
    launcher = ["basic"] if jobs == 1 else ["joblib", f"hydra.launcher.n_jobs={jobs}", "hydra.launcher.batch_size=1"]
    with pool.kept(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)):
        task = partial(pool.points.do, task)
        asked.run(task, chosen, shared, folder, f"hydra/launcher={launcher[0]}", *launcher[1:])
        return not pool.points.stopped


def _check_targets(sweep: Sweep) -> None:
    """RequestError where two runs would upload their models to one place, each over the one before."""
    targets: list[str] = []
    for number, point in enumerate(sweep.points):
        with suppress(RequestError):  # which is said with all that is wrong with the point
            target = compose(point).push.to
            if target is None and number == 0:
                return
            targets += [target] if target is not None else []
    if len(targets) > len(set(targets)) or (targets and sweep.searches):
        what = f"the runs of a sweep would upload to {targets[0]}, each over the one before"
        remedy = "leave push.to out, and upload the best: python -m runner push runs/<id> org/name"
        raise RequestError(Problem(what, f"push.to={targets[0]}", remedy))


def _check_metrics(specs: list[RunSpec]) -> None:
    """RequestError where the runs would be sorted by different numbers."""
    found = dict.fromkeys(f"{spec.run.metric} ({spec.run.metric_mode})" for spec in specs)
    if len(found) > 1:
        what = f"the runs of this sweep would be sorted by different numbers: {' and '.join(found)}"
        remedy = "name one for all, such as run.metric=train.loss_last run.metric_mode=min"
        raise RequestError(Problem(what, "run.metric", remedy))


def _max_pods(sweep: Sweep, specs: list[RunSpec], launch_options: LaunchOptions) -> int | None:
    """How many pods at once, one handed on from run to run; None where every rented run has one of its own."""
    asked, renting = max(spec.sweep.max_pods for spec in specs), sum(spec.is_rented for spec in specs)
    typed = {word.lstrip("+~").partition("=")[0] for word in sweep.request.overrides}
    source = f"sweep.max_pods={asked}"
    if asked > 1 and launch_options.detach:
        what = "nobody stays who could hand a pod on to the next run: a detached sweep has a pod for each, all at once"
        raise RequestError(Problem(what, f"--detach with {source}", f"leave out --detach, or {source}"))
    if asked > 1 and renting < len(specs):
        what = f"{len(specs) - renting} of {len(specs)} runs are not rented, and would be many at once on this machine"
        raise RequestError(Problem(what, source, "write where=runpod, or leave sweep.max_pods out"))
    if asked > 1 and sweep.searches:
        what = "a sweeper that chooses its points as it goes does not say how many pods are needed still"
        raise RequestError(Problem(what, source, "leave sweep.max_pods out: every run has a pod of its own then"))
    if not renting or launch_options.detach or sweep.searches:
        return None
    if any(key.startswith(("hydra/launcher", "hydra.launcher")) for key in typed):
        what = "how many rented runs go on at once is how many pods there may be"
        remedy = "write sweep.max_pods=2, say, and leave hydra/launcher and hydra.launcher out"
        raise RequestError(Problem(what, COMMAND_LINE, remedy))
    return asked


def _checked(asked: Sweep, launch_options: LaunchOptions) -> _Points:
    """Every point of a sweep, resolved and able to run, with its plan, or with its error; where none can run, one error
    with what is wrong with any. What an HPO sweeper may choose has to be valid, and need not fit."""
    points = _Points([], [])
    for number, point in enumerate(asked.points):
        try:
            points.right.append((number, point, *_able(asked, point, launch_options)))
            first = points.specs[0]
            if launch_options.warm is not None and len(points.right) == 1 and first.sweep.max_pods == 1:
                launch_options.warm.prepare(first)  # with more, a run here is refused
        except RunnerError as error:
            points.wrong.append((number, point, type(error)(*(asked.told(p, point) for p in error.problems))))
    if not asked.points:
        remedy = "write key=a,b, or range(1,4), whose end is left out"
        raise RequestError(Problem("a range or a pattern among the values holds none", COMMAND_LINE, remedy))
    errors = [error for _, _, error in points.wrong]
    invalid: list[RunnerError] = [error for error in errors if isinstance(error, RequestError)]
    if invalid and asked.searches:
        errors = invalid
    elif points.right:
        return points
    raise type(errors[0])(*dict.fromkeys(p for error in errors for p in error.problems))


def _able(asked: Sweep, point: Request, launch_options: LaunchOptions) -> tuple[RunSpec, Plan | None]:
    composed = compose(point)
    spec, notes = resolve(composed, Sources(point), fetch=True)
    wrong = [unknown_metric(spec.run.metric), direction_problem(asked, spec)]
    if problems := [problem for problem in wrong if problem is not None]:
        raise RequestError(*problems)
    planned = plan_or_refuse(spec, notes, composed)
    if (problem := unwritten_metric(spec, planned)) is not None:
        raise RequestError(problem)
    check_launch(spec, notes, composed, launch_options)
    return spec, planned


def _sharing(spec: RunSpec, jobs: int) -> RunSpec:
    """On this machine's CPU, an equal share of the cores for each of the runs that go on at once.

    Two runs with a thread per core each wait for one another at every barrier: ten times slower, not two.
    """
    if jobs == 1 or spec.is_rented:
        return spec
    hw = detect.resolve(spec.hw)
    if hw.accelerator != "cpu" or not hw.num_cpus:
        return spec
    return spec.model_copy(update={"hw": hw.model_copy(update={"num_cpus": max(1, hw.num_cpus // jobs)})})


def _point(
    given: RunSpec | RunnerError, index: int, sweep_dir: Path, as_json: bool,
    launch_options: LaunchOptions = DEFAULT_OPTIONS, numbers: list[int] | None = None, worst: float = math.inf,
    requests: tuple[Request, ...] = (),
) -> float:  # fmt: skip
    """One point of a sweep: never raises; leaves `point-<number>.json` and returns the metric.

    `numbers` are those of the points that are started, in the grid, and `requests` what they compose from. The metric
    of one that failed, or that is no number, is the `worst` there can be: NaN would end a study of Optuna's.
    """
    console = Console(stderr=as_json)
    row = _row(numbers[index] if numbers else index, task_overrides())
    value = math.nan
    try:
        if isinstance(given, RunnerError):
            raise given
        composed = _sharing(given, jobs := parallel_jobs())
        launch_options = (
            launch_options if jobs == 1 else replace(launch_options, warm=None)
        )  # each job is a process of its own
        spec, notes = resolve(composed, fetch=True)
        if launch_options.pool is not None:
            spec = launch_options.pool.fitted(spec)
        planned = plan_or_refuse(spec, notes, composed)
        check_launch(spec, notes, composed, launch_options)
        notes += system.check_disk(spec, planned)
        outcome = create_and_execute(
            spec, notes, console, as_json, sweep=sweep_dir.name, planned=planned, launch_options=launch_options,
            asked=(requests[index], given) if requests else None,
        )  # fmt: skip
        row |= {"run_id": outcome.run.id, "exit_code": outcome.exit_code}
        row["error"] = outcome.run.status.get("error")
        value = metric_of(outcome.run.summary, spec.run.metric)
    except RunnerError as error:
        print_problems(Console(stderr=True), error)
        row |= {"exit_code": error.exit_code, "error": str(error)}
    except Exception as error:  # a fault of this program costs one run, not those that come after it
        traceback.print_exc()
        row |= {"exit_code": 1, "error": f"{type(error).__name__}: {error}"}
    row["metric"] = value if math.isfinite(value) else None
    _write_row(sweep_dir, row)
    if row["exit_code"] == 130:
        raise KeyboardInterrupt
    return worst if math.isnan(value) else value
