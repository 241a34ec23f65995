"""Verbs over runs that exist already: runs, watch, compare."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from runner.cli.options import answer, as_json_option, output_dir_option, reports_errors
from runner.errors import Problem, RequestError, RunnerError

if TYPE_CHECKING:
    from runner.report.run_filter import RunFilter
    from runner.report.run_list import RunRow
    from runner.rundir.directory import RunDir


@click.group(invoke_without_command=True)
@output_dir_option
@click.option("--state", "states", multiple=True, help="Only runs in this state; may be given more than once.")
@click.option(
    "--model", "models", multiple=True, help="Only runs of this model: a name, or a pattern such as 'llama*'."
)
@click.option("--method", "methods", multiple=True, help="Only runs with this method; as --model.")
@click.option("--since", metavar="2h|7d|DATE", help="Only runs that were created since.")
@click.option("--text", help="Only runs with this text in id, model, method, objective, data or error.")
@click.option("--sort", metavar="COLUMN", help="Sort by a column of the JSON, such as loss, seconds or created.")
@click.option("--reverse", is_flag=True, help="Sort the other way round.")
@click.option("--best", metavar="METRIC", help="Sort by a key of summary.json, such as eval.after.loss, best first.")
@click.option("-n", "--limit", type=click.IntRange(min=1), help="So many runs: the newest, or the first with an order.")
@click.option("--watch", is_flag=True, help="Show the list again every two seconds, until Ctrl-C.")
@as_json_option
@click.pass_context
def runs(context: click.Context, /, watch: bool, **options: Any) -> None:
    """List past runs: state, model, method, loss, time; delete and restore them.

    \b
    Examples:
      python -m runner runs
      python -m runner runs --state failed --since 7d
      python -m runner runs --model 'llama*' --best eval.after.loss -n 5
      python -m runner runs --text orders --sort seconds --reverse --json
      python -m runner runs --watch
      python -m runner runs delete <id>                to runs/.trash
      python -m runner runs restore <id>
      python -m runner runs --output-dir /data/runs
    """
    if context.invoked_subcommand is None:
        _list(watch, **options)
        return
    given = [p.opts[0] for p in context.command.params if p.name and _typed(context, p.name) and p.name != "output_dir"]
    if given:
        raise click.UsageError(f"{' '.join(given)} filters the list; name the runs to {context.invoked_subcommand}")
    context.obj = options["output_dir"] if _typed(context, "output_dir") else None


def _typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


@reports_errors
def _list(
    watch: bool, output_dir: Path, states: tuple[str, ...], models: tuple[str, ...], methods: tuple[str, ...],
    since: str | None, text: str | None, sort: str | None, reverse: bool, best: str | None, limit: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    from runner.report.run_filter import RunFilter, moment
    from runner.report.run_list import print_runs

    if output_dir.exists() and not output_dir.is_dir():
        raise RequestError(Problem(f"{output_dir} is not a folder", "--output-dir", "name one that holds runs"))
    wanted = RunFilter(states, models, methods, moment(since, datetime.now()) if since else None, text)
    wanted.check()
    _check_order(sort, best)

    def rows() -> list[RunRow]:
        return _rows(output_dir, wanted, sort, reverse, best, limit)

    def shown(console: Console) -> None:
        found = rows()
        if not found and (why := list(wanted.why_none(_all_rows(output_dir)))):
            console.print("No run matches " + "; ".join(why), highlight=False, markup=False, soft_wrap=True)
            return
        print_runs(console, found, output_dir, best)

    if watch and not as_json:
        from runner.report.watch import repeat

        repeat(Console(), shown)
        return
    if as_json:
        answer(as_json, rows(), "")
    else:
        shown(Console())


def _all_rows(output_dir: Path) -> list[RunRow]:
    from runner.report.run_list import run_rows

    return run_rows(output_dir)


def _rows(
    output_dir: Path, wanted: RunFilter, sort: str | None, reverse: bool, best: str | None, limit: int | None
) -> list[RunRow]:
    """The runs asked for, in the order asked for."""
    from runner.report.metric import direction
    from runner.report.run_filter import best_first, ordered
    from runner.report.run_list import run_rows
    from runner.rundir.directory import RunDir, runs_in

    rows = wanted.matching(run_rows(output_dir, best))
    if best is not None:
        if rows and all(row.get("metric") is None for row in rows):
            from runner.report.comparison import numbers_of

            check_metric(best, "--best", [key for run in runs_in(output_dir) for key in numbers_of(run.summary)])
        rows = best_first(rows, direction(best, (RunDir(output_dir / row["run_id"]) for row in rows)))
        rows = rows[::-1] if reverse else rows
        return rows[:limit]
    if sort is not None:
        return ordered(rows, sort, reverse)[:limit]
    rows = rows[-limit:] if limit else rows
    return rows[::-1] if reverse else rows


def _check_order(sort: str | None, best: str | None) -> None:
    from runner.config.did_you_mean import nearest
    from runner.report.run_filter import COLUMNS

    if sort is not None and best is not None:
        raise RequestError(Problem("--sort and --best are two orders", "command line", "write one of them"))
    if sort is not None and sort not in COLUMNS:
        near = nearest(sort, COLUMNS)
        remedy = f"did you mean --sort {near}?" if near else f"one of {', '.join(COLUMNS)}"
        raise RequestError(Problem(f"--sort {sort}: there is no such column", "command line", remedy))


@runs.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN…")
@click.option("--output-dir", type=click.Path(path_type=Path), help="Folder with the runs.  [default: runs]")
@as_json_option
@click.pass_context
@reports_errors
def delete(context: click.Context, runs: tuple[Path, ...], output_dir: Path | None, as_json: bool) -> None:
    """Move runs to the trash: a folder .trash beside them.

    A run that is running, or that has a pod, is refused.

    \b
    Examples:
      python -m runner runs delete <id>
      python -m runner runs delete runs/<id> /data/runs/<id> --json
      rm -r runs/.trash                                frees the disk, for ever
    """
    from runner.runs import trash

    moved = trash.delete(runs, output_dir or context.obj or Path("runs"))
    _say_moved(moved, as_json, undo="restore")


@runs.command()
@click.argument("trashed", nargs=-1, type=click.Path(path_type=Path), metavar="[RUN…]")
@click.option("--output-dir", type=click.Path(path_type=Path), help="Folder with the runs.  [default: runs]")
@as_json_option
@click.pass_context
@reports_errors
def restore(context: click.Context, trashed: tuple[Path, ...], output_dir: Path | None, as_json: bool) -> None:
    """Move runs back from the trash; without a run, list what is in it.

    \b
    Examples:
      python -m runner runs restore
      python -m runner runs restore <id>
      python -m runner runs restore /data/runs/.trash/<id> --json
    """
    from runner.runs import trash

    folder = output_dir or context.obj or Path("runs")
    if not trashed:
        ids = trash.trashed_ids(folder)
        answer(as_json, ids, "\n".join(ids) or f"The trash {folder / trash.TRASH} is empty.")
        return
    _say_moved(trash.restore(trashed, folder), as_json, undo="delete")


def _say_moved(moved: list[tuple[Path, Path]], as_json: bool, undo: str) -> None:
    from shlex import quote

    from runner.report.invocation import as_invoked
    from runner.rundir.directory import display_path

    if as_json:
        answer(True, [{"run_id": to.name, "from": str(source), "to": str(to)} for source, to in moved], "")
        return
    for source, to in moved:
        click.echo(f"Moved   {display_path(source)} to {display_path(to)}")
    words = " ".join(quote(display_path(to)) for _, to in moved)
    click.echo(f"Undo    {as_invoked('python -m runner')} runs {undo} {words}")


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--metric", help="Curve to draw: a key of metrics.jsonl, such as grad_norm or tokens_per_second.")
@click.option("--once", is_flag=True, help="Print the state once; the exit code is 0, whatever the run's.")
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, help="Seconds between looks."
)
@as_json_option
@reports_errors
def watch(run_dir: Path, metric: str | None, once: bool, interval: float, as_json: bool) -> None:
    """Watch a run: live curves and state in the terminal.

    Ends with the run: exit code 0 when it is done, else the run's. Ctrl-C stops watching; the run continues. Without a
    terminal, and with --json, a line is printed for each change instead.

    \b
    Examples:
      python -m runner watch runs/<id>
      python -m runner watch <id> --metric grad_norm
      python -m runner watch <id> --once --json
      python -m runner watch <id> > watch.log && python -m runner chat <id>
    """
    from runner.report import watch as watching
    from runner.rundir.directory import RunDir

    console = Console(stderr=False)
    options = watching.WatchOptions(metric, once, interval, as_json)
    sys.exit(watching.watch(RunDir.find(run_dir), console, options))


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="RUN RUN…")
@click.option("--metric", help="Key of summary.json to sort by, instead of the first run's run.metric.")
@click.option("--all", "every_key", is_flag=True, help="Show facts that follow from another model or hardware, too.")
@as_json_option
@reports_errors
def compare(runs: tuple[Path, ...], metric: str | None, every_key: bool, as_json: bool) -> None:
    """Compare runs: the keys that differ, and the results, best first.

    \b
    Examples:
      python -m runner compare runs/<id> runs/<id>
      python -m runner compare runs/phi2-* --metric train.tokens_per_second
      python -m runner compare <id> <id> <id> --json
    """
    from runner.report.comparison import compare as compare_runs
    from runner.report.comparison import numbers_of
    from runner.report.comparison_table import print_comparison

    found = _found(runs)
    if metric is not None:
        check_metric(metric, "--metric", [key for run in found for key in numbers_of(run.summary)])
    comparison = compare_runs(found, metric)
    answer(as_json, comparison.as_dict(), lambda: print_comparison(Console(), comparison, every_key=every_key))


def _found(paths: tuple[Path, ...]) -> list[RunDir]:
    """The runs at `paths`; RequestError naming each that is none, and for fewer than two runs."""
    from runner.rundir.directory import RunDir

    runs: list[RunDir] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            runs.append(RunDir.find(path))
        except RunnerError as error:
            problems += error.problems
    times = Counter(run.path.resolve() for run in runs)
    repeated = [path.name for path, times_named in times.items() if times_named > 1]
    problems += [Problem(f"{name} is named more than once", "command line", "name it once") for name in repeated]
    if len(runs) < 2 and not problems:
        remedy = "python -m runner runs lists them: name two or more"
        problems.append(Problem(f"a comparison needs two runs, and this names {len(runs)}", "command line", remedy))
    if problems:
        raise RequestError(*problems)
    return runs


def check_metric(metric: str, option: str, known: list[str]) -> None:
    """RequestError for a metric that none of the runs has measured."""
    if metric in known or not known:
        return
    from runner.config.did_you_mean import nearest

    names = sorted(set(known))
    ending = [name for name in ("eval.after." + metric, "train." + metric, "eval." + metric) if name in names]
    near = ending[0] if ending else nearest(metric, names)
    remedy = f"did you mean {option} {near}?" if near else f"one of {', '.join(names)}"
    raise RequestError(Problem(f"{option} {metric}: no run has measured it", "command line", remedy))
