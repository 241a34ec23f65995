"""Verbs that start a run or continue one: run, resume, join."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import Arguments, Command, as_json_option, reports_errors, request_of, stray, takes_words
from runner.errors import RequestError
from runner.launcher import inherited_ranks
from runner.report import terminal
from runner.report.text import dump


def renting(command: Command) -> Command:
    """Options of what may rent a pod."""
    detach = "where=runpod: return once the training has begun; see attach, logs, status and fetch."
    command = click.option("--detach", is_flag=True, help=detach)(command)
    return click.option("--yes", "-y", is_flag=True, help="where=runpod: rent without asking.")(command)


@click.command()
@takes_words
@click.option(
    "-m",
    "--multirun",
    is_flag=True,
    help="Sweep: key=a,b runs once per value. In parallel: hydra/launcher=joblib here, sweep.max_pods=N on pods.",
)
@renting
@click.option(
    "-sc",
    "--shell-completion",
    metavar="install=bash|zsh|fish",
    help="Print a completion script, to be passed to eval.",
)
@click.pass_context
def run(
    ctx: click.Context,
    words: Arguments,
    config_dirs: tuple[Path, ...],
    as_json: bool,
    multirun: bool,
    yes: bool,
    detach: bool,
    shell_completion: str | None,
) -> None:
    """Check a run and start it. The verb may be left out.

    \b
    Examples:
      python -m runner model=mistral7b method=qlora4 hw=h100x3
      python -m runner recipes/mistral7b_qlora4_h100x3.yaml train.learning_rate=1e-4 --json
      python -m runner -m method=full,lora train.max_steps=5
      python -m runner runs/<id>/spec.json
    """
    if shell_completion:
        from runner.cli import completion

        verbs = dict(completion.all_verbs(ctx.find_root()))
        click.echo(completion.answer(shell_completion, os.environ.get("COMP_LINE", ""), verbs), nl=False)
        return
    from runner.config.compose import compose

    terminal.outlive()
    inherited_ranks.refuse_copies()
    request = request_of(words, config_dirs)
    composed = None if multirun else compose(request)  # a typo ends here, before all that plans and trains is read
    from runner.rundir.launch_options import LaunchOptions
    from runner.runs import launch, sweep

    launch_options, console = LaunchOptions(yes, detach), Console(stderr=as_json)
    if composed is None:
        sys.exit(sweep.sweep(request, console, as_json, launch_options))
    sys.exit(launch.run(request, composed, console, as_json, launch_options))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@takes_words
@renting
def resume(
    run_dir: Path, words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, yes: bool, detach: bool
) -> None:
    """Continue a run from its newest complete checkpoint.

    \b
    Examples:
      python -m runner resume runs/<id>
      python -m runner resume runs/<id> train.max_steps=2000      for more steps than planned
      python -m runner resume runs/<id> hw=h100x3                 on other hardware, with the same global batch
      python -m runner resume runs/<id> data.path=moved.jsonl     the same rows in a file that was moved
    """
    from runner.rundir.directory import RunDir
    from runner.rundir.launch_options import LaunchOptions
    from runner.runs import launch

    terminal.outlive()
    inherited_ranks.refuse_copies()
    strays = [stray(word) for word in words if "=" not in word]
    if strays:
        raise RequestError(*strays)
    run, launch_options = RunDir.at(run_dir) or RunDir(run_dir), LaunchOptions(yes, detach)
    sys.exit(launch.resume(run, words, config_dirs, Console(stderr=as_json), as_json, launch_options))


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option(
    "--node-address", metavar="ADDRESS", help="Address of this machine, if not the one used towards the first machine."
)
@click.option("--node", type=click.IntRange(min=1), hidden=True)
@click.option("--attached", is_flag=True, hidden=True)
@as_json_option
@reports_errors
def join(run_dir: Path, node_address: str | None, node: int | None, attached: bool, as_json: bool) -> None:
    """Join a multi-node run, on every machine but the first.

    The first machine creates the run (hw.num_nodes=2 hw.rendezvous=HOST:29500) and waits 10 minutes for the others. All
    machines share run.output_dir under the same path. With hw.hostfile=FILE the first one starts the others over ssh.

    \b
    Examples:
      python -m runner join runs/<id>
      python -m runner join /shared/runs/<id> --node-address 10.0.0.2 --json
    """
    from runner.launcher.join import join as take_part

    terminal.outlive()
    code = take_part(run_dir, node_address, node, attached, Console(stderr=as_json))
    if as_json:
        click.echo(dump({"run_dir": str(run_dir), "exit_code": code}))
    sys.exit(code)
