"""`ui`: the web page."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import output_dir_option, reports_errors
from runner.errors import CannotRunError, Problem
from runner.report.invocation import install


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8900, show_default=True, help="0 is any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another needs a token.")
@click.option(
    "--token",
    envvar="RUNNER_UI_TOKEN",
    metavar="TEXT",
    help="Token of the URL, better in RUNNER_UI_TOKEN. Default: drawn.",
)
@output_dir_option
@reports_errors
def ui(port: int, host: str, token: str | None, output_dir: Path) -> None:
    """Serve a web page that composes, starts and watches runs.

    Prints its address, which holds a token: whoever has it can start runs here. Runs started in the page are those of
    the command line, and go on when the page is closed or this command ends. Only files below the working directory are
    read.

    \b
    Examples:
      python -m runner ui
      python -m runner ui --port 0 --output-dir /data/runs
      ssh -L 8900:127.0.0.1:8900 machine      the page of another machine, at 127.0.0.1:8900 here
    """
    try:
        from runner.ui.server import serve  # FastAPI, uvicorn: 1 s
    except ModuleNotFoundError as error:
        what = f"the page's packages are not installed: there is no {error.name}"
        raise CannotRunError(Problem(what, "ui", install("ui"))) from None
    sys.exit(serve(Console(), host, port, token, output_dir))
