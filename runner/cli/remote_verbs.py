"""Verbs for a run in a pod: attach, logs, status, fetch; from any machine with the same API key."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import as_json_option, output_dir_option, reports_errors
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
    from runner.cloud.remote_run import attach as go_back
    from runner.rundir.directory import RunDir

    terminal.outlive()
    code = go_back(run_id, output_dir, Console(stderr=as_json))
    _answer(as_json, RunDir(output_dir / Path(run_id).name))
    sys.exit(code)


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
    from runner.cloud.remote_run import fetch as bring
    from runner.rundir.directory import RunDir

    terminal.outlive()
    code = bring(run_id, output_dir, Console(stderr=as_json))
    _answer(as_json, RunDir(output_dir / Path(run_id).name))
    sys.exit(code)


def _answer(as_json: bool, run: object) -> None:
    from runner.rundir.directory import RunDir

    if as_json and isinstance(run, RunDir):
        click.echo(dump(run.summary or run.status))


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
    if as_json:
        click.echo(dump(facts))
        return
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name.replace('_', ' '):16} {without_control_sequences(str(value))}")


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
