"""The verb `pods`: list, start, stop, terminate and enter rented pods."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner.cli.options import (
    Arguments,
    Finite,
    answer,
    as_json_option,
    confirm,
    one_run,
    reports_errors,
    request_of,
    say,
    takes_words,
)
from runner.errors import Problem
from runner.report.text import dump, without_control_sequences

all_option = click.option(
    "--all", "everything", is_flag=True, help="Also list the account's other pods. No verb changes them."
)

env_option = click.option(
    "-e", "--env", multiple=True, metavar="NAME",
    help="Pass this variable's value to shells and notebooks in the pod, over SSH into its memory.",
)  # fmt: skip


@click.group(invoke_without_command=True)
@all_option
@as_json_option
@click.pass_context
def pods(context: click.Context, everything: bool, as_json: bool) -> None:
    """List and manage the pods of this project.

    Shows state, cost so far, age and deadline. Pods that a crashed launcher left half-created are ended first.

    \b
    Examples:
      python -m runner pods
      python -m runner pods --all                      the account's other pods as well
      python -m runner pods terminate <run>            a run's id, its folder, or the pod's id
      python -m runner pods tunnel <run>               TensorBoard and Jupyter at 127.0.0.1, over SSH
      python -m runner pods top <run>                  utilisation of its GPUs
      python -m runner pods reap                       end pods that no run uses
      python -m runner pods up hw=rtx4090 --hours 3    a pod without a run
      python -m runner pods start <run> --hours 2      start a stopped pod
      python -m runner pods templates pytorch          templates for where.template
    """
    if context.invoked_subcommand is None:
        _list(everything=everything, as_json=as_json)


@reports_errors
def _list(everything: bool, as_json: bool) -> None:
    from runner.cloud import fleet
    from runner.report.pod_tables import print_pods

    apis, ledger = _all_ready()
    rows = fleet.rows_of_all(apis, ledger, everything=everything)
    answer(as_json, [asdict(row) for row in rows], lambda: print_pods(Console(), rows))


@pods.command(name="list")
@all_option
@as_json_option
def list_(everything: bool, as_json: bool) -> None:
    """Same as `pods` without a verb."""
    _list(everything=everything, as_json=as_json)


@pods.command()
@click.argument("run")
@as_json_option
@reports_errors
def stop(run: str, as_json: bool) -> None:
    """Stop the pod of RUN and keep its volume disk.

    The disk is paid for until the pod is terminated; the GPU and the container disk are released.

    \b
    Example:
      python -m runner pods stop mistral7b-qlora4-20261125-164234-ab12
    """
    from runner.cloud import fleet

    api, ledger = _ready(run)
    pod_id = fleet.stop(api, ledger, run)
    per_day = next((row.usd_per_day_stopped for row in fleet.pod_rows(api, ledger) if row.pod_id == pod_id), 0.0)
    said = f"pod {pod_id} is stopped, and costs about ${per_day:.2f} a day until it is terminated"
    answer(as_json, {"pod_id": pod_id, "state": "stopped", "usd_per_day": per_day}, said)


@pods.command()
@click.argument("run")
@click.option(
    "--hours", type=Finite(min=0, min_open=True), required=True, help="Hours after which the pod stops itself."
)
@env_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@as_json_option
@reports_errors
def start(run: str, hours: float, env: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Start the stopped pod of RUN, for SSH and Jupyter.

    The pod stops itself after --hours and keeps its disk. A run that uses it needs no `start`: where.pod=RUN.

    \b
    Example:
      python -m runner pods start mistral7b-qlora4-20261125-164234-ab12 --hours 2
    """
    from runner.cloud import fleet, pod_shell, reuse_pod
    from runner.cloud.interactive import check_hours, describe

    check_hours(hours)
    values = pod_shell.env_values(env)
    api, ledger = _ready(run)
    name, pod_id, _ = fleet.find_pod(api, ledger, run)
    entry = ledger.entry(name)
    if entry is not None:
        say(f"pod {pod_id}, ${entry.usd_per_hour * hours:.2f} for {hours:g} hours at most")
    confirm("Start it?", yes)
    rented = reuse_pod.start(api, ledger, run, hours, say, values)
    facts = {"pod_id": rented.pod.id, "usd_per_hour": rented.usd_per_hour, "deadline": rented.deadline}
    said = describe(rented.pod.id, rented.usd_per_hour, rented.deadline, "stops")
    answer(as_json, {**facts, "run_id": rented.run_id, "state": "running"}, said)


@pods.command()
@click.argument("run")
@as_json_option
@reports_errors
def terminate(run: str, as_json: bool) -> None:
    """Terminate every pod of RUN and confirm that it is gone.

    Data that is only on the pod's disk is lost. Works also while another process follows the run, and with either the
    ledger or RunPod's list of pods unavailable. Exit code 1, with the pod's id and its page in the console, if the end
    cannot be confirmed.

    \b
    Example:
      python -m runner pods terminate mistral7b-qlora4-20261125-164234-ab12
    """
    from runner.cloud import fleet

    api, ledger = _ready(run, settle=False)  # nothing comes before it
    ended = fleet.terminate(api, ledger, run, say=say)
    said = "\n".join(f"pod {pod_id} is gone, confirmed by two polls" for pod_id in ended)
    facts: dict[str, Any] = {"pod_id": ended[0]} if len(ended) == 1 else {"pod_ids": ended}
    answer(as_json, {**facts, "state": "gone"}, said)


@pods.command(context_settings={"ignore_unknown_options": True})
@click.argument("run")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@reports_errors
def ssh(run: str, command: Arguments) -> None:
    """Open a shell in the pod of RUN, or run one COMMAND.

    \b
    Examples:
      python -m runner pods ssh <run>
      python -m runner pods ssh <run> nvidia-smi
    """

    from runner.cloud.pod_shell import open_shell

    api, ledger = _ready(run)
    sys.exit(open_shell(api, ledger, run, command))


@pods.command()
@click.argument("run")
@click.option("-p", "--port", "ports", multiple=True, help="LOCAL:POD, or one number for both. Default: 6006 and 8888.")
@reports_errors
def tunnel(run: str, ports: tuple[str, ...]) -> None:
    """Forward TensorBoard and Jupyter of the pod of RUN.

    Port 6006 (TensorBoard, started in the pod if needed) and 8888 (Jupyter) appear at 127.0.0.1, over SSH, until
    Ctrl-C. RunPod's proxy addresses are public and have no password, so they are not used.

    \b
    Examples:
      python -m runner pods tunnel <run>
      python -m runner pods tunnel <run> -p 9000:8888
    """
    from runner.cloud.pod_shell import open_tunnel

    api, ledger = _ready(run)
    open_tunnel(api, ledger, run, ports, say)


@pods.command()
@click.argument("run")
@click.option("--every", type=Finite(min=0.5), default=2.0, show_default=True, metavar="SECONDS", help="Interval.")
@click.option("--once", is_flag=True, help="Print once and exit.")
@as_json_option
@reports_errors
def top(run: str, every: float, once: bool, as_json: bool) -> None:
    """Show utilisation, memory and power of the GPUs of RUN's pod.

    \b
    Examples:
      python -m runner pods top <run>
      python -m runner pods top <run> --once --json
    """
    from runner.cloud.pod_shell import connect_to, gpu_usage
    from runner.report.pod_tables import watch_gpus

    api, ledger = _ready(run)
    connection = connect_to(api, ledger, run)
    try:
        if as_json:
            click.echo(dump([asdict(gpu) for gpu in gpu_usage(connection)]))
        else:
            watch_gpus(Console(), lambda: gpu_usage(connection), None if once or not sys.stdout.isatty() else every)
    finally:
        connection.close()


@pods.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Follow until the pod is gone.")
@click.option("--tail", default=100, show_default=True, help="Number of earlier lines.")
@click.option("--source", type=click.Choice(["container", "system"]), help="Only this source. Default: both.")
@reports_errors
def logs(run: str, follow: bool, tail: int, source: str | None) -> None:
    """Print RunPod's log of the pod: image pull, container start.

    The training's own log is printed by `python -m runner logs`.

    \b
    Example:
      python -m runner pods logs -f <run>
    """
    from runner.cloud import fleet

    api, ledger = _ready(run)
    _, pod_id, _ = fleet.find_pod(api, ledger, run)
    for line in api.logs(pod_id, source=source, tail=tail, follow=follow):
        click.echo(without_control_sequences(line))


@pods.command()
@click.option("--all", "everything", is_flag=True, help="Every pod of this project that no process here follows.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@as_json_option
@reports_errors
def reap(everything: bool, yes: bool, as_json: bool) -> None:
    """End pods that no run uses, or that are past their deadline.

    Only pods whose name begins with `runner-` are considered. A detached run within its deadline is kept; --all ends it
    as well, also one that was rented from another machine.

    \b
    Examples:
      python -m runner pods reap
      python -m runner pods reap --all --yes
    """
    from runner.cloud import fleet
    from runner.cloud.provider_errors import StillThereError

    apis, ledger = _all_ready()
    found = [(api, fleet.unowned_pods(api, ledger, everything=everything, say=say)) for api in apis]
    for name, pod_id, why in (pod for _, pods in found for pod in pods):
        say(f"pod {pod_id} ({name}): {why}")
    count = sum(len(pods) for _, pods in found)
    confirm(f"End {count}?", yes or not count)
    ended: list[str] = []
    failures: list[Problem] = []
    for api, pods in found:
        try:
            ended += fleet.reap(api, ledger, pods)
        except StillThereError as error:  # the other accounts' pods are ended all the same
            failures += error.problems
    if failures:
        raise StillThereError(*failures)
    stopped = [] if everything else [pod for api in apis for pod in fleet.stopped_pods_with_a_run(api, ledger)]
    for pod_id, run_id in stopped:
        say(
            f"pod {pod_id} is stopped, with run {run_id}, and its disk costs money: python -m runner fetch {run_id} "
            f"downloads the run, python -m runner pods terminate {pod_id} ends the pod"
        )
    said = f"{len(ended)} ended, confirmed by two polls" if ended else "nothing to end"
    answer(as_json, {"ended": ended, "stopped": [pod_id for pod_id, _ in stopped]}, said)


@pods.command()
@click.argument("text", nargs=-1)
@as_json_option
@reports_errors
def templates(text: tuple[str, ...], as_json: bool) -> None:
    """List RunPod's templates for pods, the account's own first.

    With TEXT, only templates that contain all its words in their name, image or id. A run uses one by where.template=ID
    or its exact name.

    \b
    Examples:
      python -m runner pods templates
      python -m runner pods templates pytorch 2.8
    """
    from runner.cloud.runpod.api import Api
    from runner.cloud.runpod.offers import search_templates
    from runner.report.pod_tables import print_templates

    rows = search_templates(Api(), " ".join(text))
    answer(as_json, rows, lambda: print_templates(Console(), rows, " ".join(text)))


@pods.command()
@takes_words
@one_run
@click.option(
    "--hours", type=Finite(min=0, min_open=True), required=True, help="Hours after which the pod ends itself."
)
@env_option
@click.option("-y", "--yes", is_flag=True, help="Do not ask before renting.")
def up(
    words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, hours: float, env: tuple[str, ...], yes: bool
) -> None:  # fmt: skip
    """Rent a pod without a run, for SSH and Jupyter.

    Deadline and price are checked and enforced as for a run.

    \b
    Examples:
      python -m runner pods up hw=rtx4090 --hours 3
      python -m runner pods up hw=rtx4090 --hours 3 --env HF_TOKEN
      python -m runner pods up hw=rtx4090 where.cloud=community where.max_usd=2 --hours 3 --yes
    """
    from runner.cloud import interactive, pod_shell
    from runner.cloud.providers import provider_of
    from runner.resolve.steps import resolved

    values = pod_shell.env_values(env)
    request = request_of(("where=runpod", *words), config_dirs)
    spec = interactive.spec_for(resolved(request)[0], hours)
    api = provider_of(spec)
    _settle(api, _ledger())
    offer = interactive.first_offer(api, spec, hours)
    say(f"{offer.described}; ${offer.usd_per_hour * hours:.2f} for {hours:g} hours at most")
    confirm("Rent it?", yes)
    made = interactive.rent_interactive(spec, hours, say, values)
    answer(as_json, made.as_dict(), made.described)


def _ready(word: str, settle: bool = True) -> tuple[Any, Any]:
    """Account and ledger for the run or pod that a word names, in order: what crashed launchers left is settled, and
    said. A ledger that cannot be used is said, and done without: what is listed can be ended."""
    from runner.cloud.providers import cloud_of, connect

    ledger = _ledger()
    api = connect(cloud_of(word, ledger.entries()))
    if settle:
        _settle(api, ledger)
    return api, ledger


def _all_ready() -> tuple[list[Any], Any]:
    """The same for every account whose key is here."""
    from runner.cloud.providers import accounts

    ledger, apis = _ledger(), accounts()
    for api in apis:
        _settle(api, ledger)
    return apis, ledger


def _settle(api: Any, ledger: Any) -> None:
    from runner.cloud.reconcile import reconcile

    for note in reconcile(api, ledger):
        say(f"Note    {note}")


def _ledger() -> Any:
    from runner.cloud.ledger import Ledger

    ledger, error = Ledger.or_copy()
    for problem in error.problems if error else ():
        say(f"Note    {problem.what}; {problem.remedy}")
    return ledger
