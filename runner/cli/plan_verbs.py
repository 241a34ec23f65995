"""Verbs of the plan: plan, fit, table, calibrate."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from runner.cli.options import (
    Arguments,
    answer,
    as_json_option,
    one_run,
    output_dir_option,
    reports_errors,
    request_of,
    say,
    say_unread,
    takes_words,
)
from runner.errors import CannotRunError
from runner.report.text import dump


@click.command()
@takes_words
@one_run
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Plot the memory of every phase.")
@click.option("--deepspeed", "ds_json", is_flag=True, help="Print the resolved DeepSpeed JSON and nothing else.")
def plan(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, plot: Path | None, ds_json: bool) -> None:
    """Predict memory, time and cost of a run; nothing is started.

    Exit code 0 if it fits, 3 if it does not or takes more than where.max_usd or where.max_hours.

    \b
    Examples:
      python -m runner plan model=llama2_70b method=qlora4 hw=rtx4090x2
      python -m runner plan model=mistral7b method=full hw=h100x3 --json
      python -m runner plan model=hub model.id=org/name hw=a100 --plot plan.png
    """
    from runner.config.compose import Sources, compose
    from runner.machine import writable
    from runner.report.plan_text import print_plan
    from runner.report.plots import plot_plan
    from runner.resolve import plan_inputs
    from runner.resolve.steps import resolve, with_facts
    from runner.runs import inputs, unread_keys

    request = request_of(words, config_dirs)
    composed = compose(request)
    spec, notes = resolve(composed, Sources(request), needed=True)
    inputs.check_files(spec)
    notes += unread_keys.unread_key_notes("plan", request, notes)
    notes += [f"{p.what}: a run is refused; {p.remedy}" for p in writable.problems(spec)]
    found = plan_inputs.plan(spec, notes)
    if plot is not None:
        plot_plan(found, plot)
    if ds_json:
        click.echo(dump(found.deepspeed))
        for reason in found.reasons:
            say(f"refused: {reason}")
    elif as_json:
        click.echo(dump(found.as_dict()))
    else:
        console = Console()
        print_plan(console, found, {"model": spec.model.title, "hw": spec.hw.title})
        if found.reasons:
            advice = plan_inputs.advice(with_facts(composed, needed=True), found)
            console.print(f"→ {advice}", highlight=False, soft_wrap=True)
        if plot is not None:
            console.print(f"Picture: {plot}", highlight=False, soft_wrap=True)
    sys.exit(CannotRunError.exit_code if found.reasons else 0)


@click.command()
@takes_words
@one_run
@click.option(
    "--by", type=click.Choice(["usd", "time"]), default="usd", show_default=True, help="Rank by cost or by time."
)
@click.option("--all", "everything", is_flag=True, help="Show every row, also those that do not fit.")
def fit(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, by: str, everything: bool) -> None:
    """List the hardware, methods or models that fit, best first.

    Each row has its best ZeRO stage and micro batch. Where no model or hardware is named, all of the catalogue are
    tried; where no method is named, full, freeze, lora, qlora4 and qlora8.

    \b
    Examples:
      python -m runner fit model=llama2_70b method=lora
      python -m runner fit model=llama3_8b hw=rtx4090 --all
      python -m runner fit model=llama3_8b --by time --json
    """
    from dataclasses import asdict

    from runner.config.compose import Sources, compose
    from runner.report.plan_tables import print_fit
    from runner.resolve import fit as search
    from runner.resolve.steps import with_facts

    request = request_of(words, config_dirs)
    given = search.named_in(request)
    spec = search.with_default_length(with_facts(compose(request), Sources(request), needed=True), given)
    say_unread("fit", request)
    found = search.fit_rows(spec, given, by, request.folders)
    rows = [asdict(row) for row in found]
    fit = [row for row in rows if row["fits"]]
    if as_json:
        click.echo(dump(rows))
    else:
        short = fit[:20] + [row for row in rows if not row["fits"]][: max(0, 12 - len(fit))]
        print_fit(Console(), rows if everything else short, search.title(spec, found))
        if not everything and len(short) < len(rows):
            click.echo(f"… and {len(rows) - len(short)} more: --all")
    sys.exit(0 if fit else CannotRunError.exit_code)


@click.command()
@takes_words
@one_run
def table(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Print memory by method and model size, with the assumptions.

    \b
    Examples:
      python -m runner table
      python -m runner table train.max_length=2048 --json
    """
    from runner.report.plan_tables import print_memory_table
    from runner.resolve import fit
    from runner.resolve.steps import resolved

    request = request_of(words, config_dirs)
    fit.refuse_for_table(request)
    content = fit.memory_table(fit.with_default_length(resolved(request)[0], fit.named_in(request)))
    answer(as_json, content, lambda: print_memory_table(Console(), content))


@click.command()
@output_dir_option
@as_json_option
@reports_errors
def calibrate(output_dir: Path, as_json: bool) -> None:
    """Compare the plans of past runs with what was measured.

    \b
    Examples:
      python -m runner calibrate
      python -m runner calibrate --output-dir /data/runs --json
    """
    from runner.report.plan_accuracy import calibration, print_calibration

    found = calibration(output_dir)
    answer(as_json, found.as_dict(), lambda: print_calibration(Console(), found))
