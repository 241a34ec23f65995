"""Verbs for a run in a pod: attach, logs, status, fetch; from any machine with the same API key."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
from rich.console import Console

from runner.cli.options import answer, as_json_option, output_dir_option, reports_errors
from runner.report import terminal
from runner.report.text import dump, without_control_sequences


@click.command()
@click.argument("run_id")
@output_dir_option
@as_json_option
@reports_errors
def attach(run_id: str, output_dir: Path, as_json: bool) -> None:
    """Follow a rented run to its end, download it, end its pod.

    Ctrl-C stops following; the run continues. The exit code is that of the training.

    \b
    Examples:
      python -m runner attach runs/<id>
      python -m runner attach <id>                 on another machine, with the same RUNPOD_API_KEY
    """
    from runner.cloud import remote_run

    _end_with(remote_run.attach, run_id, output_dir, as_json)


@click.command()
@click.argument("run_id")
@output_dir_option
@as_json_option
@reports_errors
def fetch(run_id: str, output_dir: Path, as_json: bool) -> None:
    """Download a rented run.

    If the run has ended, its pod is ended after the download; if it still trains, a copy of its current state is
    downloaded. A pod that stopped itself to keep its result is started for the download.

    \b
    Examples:
      python -m runner fetch runs/<id>
      python -m runner fetch <id> --output-dir ~/runs --json
    """
    from runner.cloud import remote_run

    _end_with(remote_run.fetch, run_id, output_dir, as_json)


def _end_with(work: Callable[[str, Path, Console], int], run_id: str, output_dir: Path, as_json: bool) -> NoReturn:
    """Exit with the code of `work`, after the run's summary in JSON (its status, where there is none yet)."""
    from runner.rundir.directory import RunDir

    terminal.outlive()
    code = work(run_id, output_dir, Console(stderr=as_json))
    run = RunDir(output_dir / Path(run_id).name)
    if as_json:
        click.echo(dump(run.summary or run.status))
    sys.exit(code)


@click.command()
@click.argument("run_id")
@as_json_option
@reports_errors
def status(run_id: str, as_json: bool) -> None:
    """Show the state of a run: step, loss and, if rented, cost.

    \b
    Examples:
      python -m runner status runs/<id>
      python -m runner status <id> --json
    """
    from runner.cloud.remote_run import status as ask

    facts = ask(run_id)
    known = {name.replace("_", " "): value for name, value in facts.items() if value is not None}
    lines = [f"{name:16} {without_control_sequences(str(value))}" for name, value in known.items()]
    answer(as_json, facts, "\n".join(lines))


@click.command()
@click.argument("run_id")
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows, until Ctrl-C.")
@click.option("-n", "--lines", default=40, show_default=True, help="Last lines to begin with.")
@as_json_option
@reports_errors
def logs(run_id: str, follow: bool, lines: int, as_json: bool) -> None:
    """Print the training log of a rented run.

    \b
    Examples:
      python -m runner logs runs/<id>
      python -m runner logs <id> -f
    """
    from runner.cloud.remote_run import logs as read

    for line in read(run_id, follow, lines):
        click.echo(dump({"line": line}) if as_json else without_control_sequences(line))
        if terminal.lost():  # `| head`: nobody reads on
            return
