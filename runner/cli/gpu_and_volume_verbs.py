"""The verbs `gpus` and `volumes`: GPUs to rent, and network volumes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import as_json_option, reports_errors
from runner.report.text import counted, dump
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
    from runner.cli.options import request_of
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
    if as_json:
        click.echo(dump(rows))
    else:
        print_gpus(Console(), rows, cloud)


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
    if as_json:
        click.echo(dump(rows))
    else:
        print_volumes(Console(), rows)


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
    facts = {**asdict(made), "usd_per_month": usd}
    _answer(as_json, f"volume {made.id} ({made.name}) in {made.data_center}: ${usd:.2f} a month until deleted", facts)


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
        click.confirm(
            f"Delete {found.name} ({found.id}, {found.size_gb} GB) and all that is on it?", abort=True, err=True
        )
    keeping.delete(api, found)
    _answer(as_json, f"volume {found.id} is gone", {"id": found.id, "state": "gone"})


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

    sent = volumes.put_files(Api(), volume, source, target, lambda line: click.echo(line, err=True))
    _answer(as_json, f"{counted(len(sent), 'file')} sent", {"sent": sent})


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

    brought = volumes.get_files(Api(), volume, source, target, lambda line: click.echo(line, err=True))
    _answer(as_json, f"{counted(len(brought), 'file')} downloaded", {"brought": [str(file) for file in brought]})


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
    if as_json:
        click.echo(dump(rows))
        return
    for row in rows:
        click.echo(f"{row['size']:>14,}  {row['path']}")


def _answer(as_json: bool, said: str, facts: dict[str, object]) -> None:
    click.echo(dump(facts) if as_json else said)
