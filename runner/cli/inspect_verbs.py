"""Verbs that only look: show, explain, list, doctor."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import (
    Arguments,
    answer,
    as_json_option,
    config_dirs_option,
    one_run,
    reports_errors,
    request_of,
    say,
    say_unread,
    takes_words,
)
from runner.errors import Problem, RequestError


@click.command()
@takes_words
@one_run
def show(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Print the resolved run as YAML; nothing is started.

    The output is a recipe: saved to a file, it starts the same run.

    \b
    Examples:
      python -m runner show model=phi2 method=lora hw=rtx4090
      python -m runner show model=phi2 > mine.yaml; python -m runner mine.yaml train.max_steps=5
      python -m runner show recipe=mistral7b_qlora4_h100x3 --json
    """
    from runner.config import conf_files
    from runner.resolve.steps import resolved
    from runner.runs.unread_keys import taken_back

    request = request_of(words, config_dirs)
    spec, notes = resolved(request)
    notes += taken_back(request)
    content = spec.model_dump(mode="json")

    def print_yaml() -> None:
        click.echo(conf_files.dump_yaml(content), nl=False)
        for note in notes:
            click.echo(f"# note: {' '.join(note.split())}")

    answer(as_json, content, print_yaml)


@click.command()
@click.argument("key")
@takes_words
@one_run
def explain(key: str, words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Show where a value comes from: command line, or file and line.

    \b
    Examples:
      python -m runner explain train.learning_rate recipe=phi2_lora_rtx6000adax5
      python -m runner explain train.micro_batch_size model=llama3_8b hw=a100 --json
    """
    if "=" in key:
        remedy = f"python -m runner explain {key.partition('=')[0]} {key}"
        raise RequestError(Problem(f"{key} changes a value: the key to explain comes first", "command line", remedy))
    from runner.config.compose import Sources, compose, origins_of_key
    from runner.config.validation import value_of
    from runner.report.tables import print_origins
    from runner.resolve.steps import resolve

    request = request_of(words, config_dirs)
    spec = compose(request)
    value, final = value_of(spec, key), value_of(resolve(spec, Sources(request))[0], key)
    origins = origins_of_key(request, key)
    facts = {"key": key, "value": final, "composed": value, "origins": [vars(p) for p in origins]}
    answer(as_json, facts, lambda: print_origins(Console(), key, value, final, origins))


@click.command(name="list")
@click.argument("what", required=False)
@config_dirs_option
@as_json_option
@reports_errors
def list_(what: str | None, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """List the choices of one group, or the groups.

    Groups: models, methods, hw, deepspeed, objectives, data, where, track, recipes.

    \b
    Examples:
      python -m runner list
      python -m runner list models
      python -m runner list hw --json
    """
    from runner.report.catalog_tables import listing, print_listing

    table = listing(what, config_dirs)
    answer(as_json, table.rows, lambda: print_listing(Console(), table))


@click.command()
@takes_words
@one_run
@click.option(
    "--bandwidth", is_flag=True,
    help="Measure an all-reduce as well: NCCL over the GPUs, gloo over two processes on a CPU (10 s and more).",
)  # fmt: skip
def doctor(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, bandwidth: bool) -> None:
    """Check this machine: driver, GPUs, disk, packages, keys.

    Every finding has a remedy. With the arguments of a run, also check what that run needs. torch is imported only for
    --bandwidth. Exit code 0 without a problem, 3 with one.

    \b
    Examples:
      python -m runner doctor
      python -m runner doctor model=llama3_8b method=qlora4 hw=rtx4090
      python -m runner doctor --bandwidth --json
    """
    from runner.doctor.checks import examine_machine, findings_as_json, print_findings
    from runner.doctor.finding import DoctorTarget, exit_code

    run = None
    if words or config_dirs:
        from runner.resolve.plan_inputs import plan_if_known  # Hydra: 0.2 s
        from runner.resolve.steps import resolved

        request = request_of(words, config_dirs)
        spec, notes = resolved(request)
        run = DoctorTarget(spec, plan_if_known(spec, notes))
        say_unread("doctor", request)
    if bandwidth:
        say("Measuring an all-reduce …")
    found = examine_machine(run, bandwidth=bandwidth)
    answer(as_json, findings_as_json(found, run), lambda: print_findings(Console(), found))
    sys.exit(exit_code(found))
