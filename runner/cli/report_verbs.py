"""The verb that shows runs as a page: report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runner.cli.options import as_json_option, reports_errors, say
from runner.errors import Problem, RequestError

if TYPE_CHECKING:
    from runner.rundir.directory import RunDir

ENDINGS = {"html": (".html", ".htm"), "md": (".md", ".markdown")}


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="RUN…")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True),
    help="File to write; - is standard output. Default: report.html in the run's directory, of several here.",
)  # fmt: skip
@click.option(
    "--format", "kind", type=click.Choice(["html", "md"]), help="html (default), or md for a pull request."
)  # fmt: skip
@as_json_option
@reports_errors
def report(runs: tuple[Path, ...], output: Path | None, kind: str | None, as_json: bool) -> None:
    """Show a run, or several side by side, as one HTML file.

    The page has curves, held-out metrics and answers before and after, the plan beside what was measured, every setting
    with its origin, and the command that repeats the run. It needs no network. Runs that are going on, failed or were
    killed are shown as far as they came. A folder of a sweep, runs/sweeps/<id>, stands for its runs.

    \b
    Examples:
      python -m runner report runs/<id>
      python -m runner report runs/<id> runs/<id2> -o compare.html
      python -m runner report runs/sweeps/<id>
      python -m runner report runs/<id> --format md          for a pull request
      python -m runner report runs/<id> --json
    """
    chosen = _chosen(runs)
    kind = _kind(kind, output, as_json)
    from runner.report.run_report.facts import gather

    facts = [gather(run) for run in chosen]
    if as_json:
        from runner.report.run_report.json_report import as_json as facts_as_json
        from runner.report.text import dump

        _write(dump(facts_as_json(facts)) + "\n", output)
    elif kind == "md":
        from runner.report.run_report.markdown import markdown

        _write(markdown(facts), output)
    else:
        from runner.report.run_report.page import page

        _write(page(facts), output or (chosen[0].path if len(chosen) == 1 else Path()) / "report.html")


def _chosen(paths: tuple[Path, ...]) -> list[RunDir]:
    """The runs at the paths, each once; RequestError with every path that is none."""
    from runner.report.run_report.comparison import points_of
    from runner.rundir.directory import RunDir, no_such_run_problem, run_without_spec

    found: dict[Path, RunDir] = {}
    problems = []
    for path in paths:
        named = points_of(path)
        if not named and (one := RunDir.at(path) or run_without_spec(path)):
            named = [one]
        if not named:
            problems.append(no_such_run_problem(path))
        found |= {run.path.resolve(): run for run in named}
    if not paths:
        problems.append(Problem("no run is named", "command line", "python -m runner report runs/<id>"))
    if problems:
        raise RequestError(*problems)
    return list(found.values())


def _kind(kind: str | None, output: Path | None, as_json: bool) -> str:
    """`html` or `md`, by the option or the file's ending; RequestError where they do not agree."""
    if as_json:
        if kind:
            raise RequestError(Problem("--json and --format exclude each other", "command line", "leave one out"))
        return "json"
    if output is None or str(output) == "-":
        return kind or "html"
    meant = next((name for name, endings in ENDINGS.items() if output.suffix.lower() in endings), None)
    if meant is None or (kind and meant != kind):
        kind = kind or "html"
        remedy = f"-o {output.with_suffix(ENDINGS[kind][0]) if output.suffix else f'{output}{ENDINGS[kind][0]}'}"
        raise RequestError(
            Problem(f"the name of a report in {kind} ends in {ENDINGS[kind][0]}", f"-o {output}", remedy)
        )
    return meant


def _write(content: str, output: Path | None) -> None:
    if output is None or str(output) == "-":
        click.echo(content, nl=False)
        return
    from runner.rundir.directory import display_path, write_atomically

    try:
        write_atomically(output, content)
    except OSError as error:
        problem = Problem(f"{output} cannot be written: {error.strerror}", "-o", "name a file in a folder of yours: -o")
        raise RequestError(problem) from None
    say(f"Report  {display_path(output)}")
    if sys.stdout.isatty():
        say(f"        file://{output.resolve()}")
