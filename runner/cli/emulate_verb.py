"""The verb `emulate`: an emulated RunPod on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import Finite, reports_errors
from runner.errors import CannotRunError, Problem
from runner.report.invocation import install


@click.command()
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port on 127.0.0.1. Default: any free one.")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for pods and volumes. Default: a temporary one.",
)
@click.option("--key", metavar="KEY", help="API key of the account. Default: a random one.")
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="KIND[:NAME=VALUE,…]",
    help="Inject a fault (docs/emulator.md). May be given more than once.",
)
@click.option("--speed", default=1.0, show_default=True, type=Finite(0.0), help="Billed seconds per real second.")
@click.option("--realistic", is_flag=True, help="Start pods in a minute instead of a second, as RunPod does.")
@click.option("--s3", is_flag=True, help="Also serve network volumes over S3.")
@reports_errors
def emulate(
    port: int, root: Path | None, key: str | None, faults: tuple[str, ...], speed: float, realistic: bool, s3: bool
) -> None:
    """Start an emulated RunPod, to try renting without an account.

    Prints the variables to export. Ctrl-C ends it and every pod. A pod is a real ssh server (Debian's openssh-server)
    with this machine's Python. docs/emulator.md lists the faults.

    \b
    Examples:
      python -m runner emulate --port 8321
      python -m runner emulate --fault "no_capacity:gpu=NVIDIA L4,times=2" --fault slow_pull:seconds=30
    """
    try:
        from runner.emulator.server import REALISTIC, faults_of, serve  # FastAPI, uvicorn: 1 s
    except ModuleNotFoundError as error:
        what = f"the emulator's packages are not installed: there is no {error.name}"
        raise CannotRunError(Problem(what, "emulate", install("emulator"))) from None
    settings = {**(REALISTIC if realistic else {}), **({"key": key} if key else {}), "speed": speed}
    sys.exit(serve(Console(highlight=False), port, root, faults_of(faults), s3, **settings))
