"""RunPod's own verbs: `gpus` to rent, network `volumes`, and `emulate`, an emulated RunPod on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import Finite, answer, as_json_option, reports_errors, request_of, say
from runner.errors import CannotRunError, Problem
from runner.report.invocation import install
from runner.report.text import counted
from runner.spec.where import country_codes


def _codes(context: click.Context, param: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """`us,se` as US and SE."""
    try:
        return tuple(country_codes([code for word in words for code in word.split(",")]))
    except ValueError as error:
        raise click.BadParameter(str(error).replace("where.country=US, or [SE,RO]", "--country US")) from None


@click.command()
@click.option("--min-memory", type=click.IntRange(min=0), default=0, help="Least memory of one GPU, GB.")
@click.option("--cloud", type=click.Choice(["secure", "community"]), help="Only GPUs of this cloud.")
@click.option(
    "--count", type=click.IntRange(min=1), default=1, show_default=True, help="Stock for pods with this many GPUs."
)
@click.option(
    "--country",
    "countries",
    multiple=True,
    metavar="CODE",
    callback=_codes,
    help="Only data centres of this country, such as US. May be given more than once.",
)
@as_json_option
@reports_errors
def gpus(min_memory: int, cloud: str | None, count: int, countries: tuple[str, ...], as_json: bool) -> None:
    """List RunPod's GPUs as they are now: prices, stock, memory.

    The last columns name the data centres and the largest model of the catalogue that each GPU holds.

    \b
    Examples:
      python -m runner gpus
      python -m runner gpus --min-memory 48 --cloud secure
      python -m runner gpus --count 8 --json
      python -m runner gpus --country SE --country RO    where.country=[SE,RO]
    """
    from runner.cloud.runpod import offers
    from runner.cloud.runpod.api import Api
    from runner.report.pod_tables import print_gpus
    from runner.resolve import fit
    from runner.resolve.steps import resolved

    api = Api()
    for code in countries:
        offers.centers_in(api, code, cloud, f"--country {code}")
    found = api.gpus(count=count, cloud=cloud, stock=True, countries=countries)
    spec, _ = resolved(request_of(("hw=cpu",), ()))
    rows = fit.gpu_rows(found, spec, min_memory=min_memory, cloud=cloud)
    answer(as_json, rows, lambda: print_gpus(Console(), rows, cloud))


@click.group(invoke_without_command=True)
@as_json_option
@click.pass_context
def volumes(context: click.Context, as_json: bool) -> None:
    """List and manage network volumes.

    A network volume stays when its pod ends, and belongs to one data centre. A run uses it by where.volume=NAME. put,
    get and ls need RunPod's S3 keys (console.runpod.io/user/settings) in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.

    \b
    Examples:
      python -m runner volumes
      python -m runner volumes create data --size 100 --data-center EU-RO-1
      python -m runner volumes put data corpus.jsonl datasets/
      python -m runner volumes ls data runs/
      python -m runner volumes delete data
    """
    if context.invoked_subcommand is None:
        _list(as_json=as_json)


@reports_errors
def _list(as_json: bool) -> None:
    from runner.cloud.runpod.api import Api
    from runner.cloud.runpod.volumes import usd_per_month
    from runner.report.pod_tables import print_volumes

    rows = [{**asdict(volume), "usd_per_month": usd_per_month(volume.size_gb)} for volume in Api().volumes()]
    answer(as_json, rows, lambda: print_volumes(Console(), rows))


@volumes.command(name="list")
@as_json_option
def list_(as_json: bool) -> None:
    """Same as `volumes` without a verb."""
    _list(as_json=as_json)


@volumes.command()
@click.argument("name")
@click.option("--size", type=click.IntRange(10, 4096), required=True, help="Size in GB.")
@click.option("--data-center", required=True, help="Data centre of the volume and of the pods that use it.")
@as_json_option
@reports_errors
def create(name: str, size: int, data_center: str, as_json: bool) -> None:
    """Create a network volume; it is paid for until it is deleted."""
    from runner.cloud.runpod import volumes as keeping
    from runner.cloud.runpod.api import Api

    made = keeping.create(Api(), name, size, data_center)
    usd = keeping.usd_per_month(made.size_gb)
    said = f"volume {made.id} ({made.name}) in {made.data_center}: ${usd:.2f} a month until deleted"
    answer(as_json, {**asdict(made), "usd_per_month": usd}, said)


@volumes.command()
@click.argument("volume")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@as_json_option
@reports_errors
def delete(volume: str, yes: bool, as_json: bool) -> None:
    """Delete a network volume and everything on it."""
    from runner.cloud.runpod import volumes as keeping
    from runner.cloud.runpod.api import Api

    api = Api()
    found = keeping.find_volume(api, volume)
    if not yes:
        what = f"{found.name} ({found.id}, {found.size_gb} GB)"
        click.confirm(f"Delete {what} and all that is on it?", abort=True, err=True)
    keeping.delete(api, found)
    answer(as_json, {"id": found.id, "state": "gone"}, f"volume {found.id} is gone")


@volumes.command()
@click.argument("volume")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", default="")
@as_json_option
@reports_errors
def put(volume: str, source: Path, target: str, as_json: bool) -> None:
    """Upload a file or folder to a volume over S3; no pod is needed.

    TARGET is a path on the volume; one that ends in / is a folder.
    """
    from runner.cloud.runpod import volumes
    from runner.cloud.runpod.api import Api

    sent = volumes.put_files(Api(), volume, source, target, say)
    answer(as_json, {"sent": sent}, f"{counted(len(sent), 'file')} sent")


@volumes.command()
@click.argument("volume")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path), default=Path("."))
@as_json_option
@reports_errors
def get(volume: str, source: str, target: Path, as_json: bool) -> None:
    """Download a file or folder from a volume over S3."""
    from runner.cloud.runpod import volumes
    from runner.cloud.runpod.api import Api

    brought = volumes.get_files(Api(), volume, source, target, say)
    answer(as_json, {"brought": list(map(str, brought))}, f"{counted(len(brought), 'file')} downloaded")


@volumes.command()
@click.argument("volume")
@click.argument("prefix", default="")
@as_json_option
@reports_errors
def ls(volume: str, prefix: str, as_json: bool) -> None:
    """List files on a volume over S3."""
    from runner.cloud.runpod import volumes
    from runner.cloud.runpod.api import Api

    rows = volumes.list_files(Api(), volume, prefix)
    lines = [f"{row['size']:>14,}  {row['path']}\n" for row in rows]
    answer(as_json, rows, lambda: click.echo("".join(lines), nl=False))


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
