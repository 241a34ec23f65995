"""The verb `emulate`: a RunPod on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import Finite, reports_errors
from runner.errors import CannotRunError, Problem
from runner.report.invocation import install


@click.command()
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Of 127.0.0.1; any free one if left out.")
@click.option("--root", type=click.Path(path_type=Path), metavar="DIR", help="Keeps pods and volumes there.")
@click.option("--key", metavar="KEY", help="The account's API key, if it is not to be made up.")
@click.option("--fault", "faults", multiple=True, metavar="KIND[:NAME=VALUE,…]", help="Goes wrong; may be given again.")
@click.option("--speed", default=1.0, show_default=True, type=Finite(0.0), help="Of the bill.")
@click.option("--realistic", is_flag=True, help="Pods take as long as RunPod's: a minute, where it is a second else.")
@click.option("--s3", is_flag=True, help="Serve network volumes by S3, too.")
@reports_errors
def emulate(
    port: int, root: Path | None, key: str | None, faults: tuple[str, ...], speed: float, realistic: bool, s3: bool
) -> None:
    """A RunPod on this machine: try everything without an account or a cent.

    Prints the variables to export; ends with Ctrl-C, and every pod with it. A pod is a real ssh server (Debian's
    openssh-server), with this machine's Python and no GPU. docs/emulator.md lists the faults.

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
