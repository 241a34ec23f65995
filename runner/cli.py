"""The command line: verbs, thin. No verb means `run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner import __version__
from runner.errors import CannotRunError, InterruptedRun, Problem, RunnerError
from runner.report.problems import dump, print_problems, problems_as_json

EPILOG = """
\b
Examples:
  python -m runner                                         train the demo model here, on the CPU if need be
  python -m runner model=mistral7b method=qlora4 hw=h100x3
  python -m runner recipes/mistral7b_qlora4_h100x3.yaml train.learning_rate=1e-4
  python -m runner -m method=full,freeze,lora,qlora4,qlora8 train.max_steps=5
  python -m runner show model=phi2                         the resolved run as YAML
  python -m runner explain train.learning_rate recipe=phi2_lora_rtx6000adax5
  python -m runner plan model=llama3_8b hw=rtx4090         memory, time and cost, before anything starts
  python -m runner fit model=llama2_70b method=lora        which hardware, ZeRO stage and micro batch
  python -m runner list models
  python -m runner runs                                    past runs
  python -m runner chat runs/<id>                          talk to a tuned model

Choices are written group=name (model, method, hw, deepspeed, objective, data, where, track),
values key=value; docs/reference.md has every key. Exit codes: 0 done, 1 the run failed,
2 the request was wrong, 3 it does not fit, not here, or not within the limits, 130 interrupted.
"""

Arguments = tuple[str, ...]


class Verbs(click.Group):
    """A group in which anything that is not a verb belongs to `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"--help", "-h", "--version"}
        if not args or (args[0] not in self.commands and args[0] not in own):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="runner")
def cli() -> None:
    """Fine-tune a language model: model × method × hardware × ZeRO stage → one resolved run."""


def composed(command: Callable[..., Any]) -> Callable[..., Any]:
    """Arguments that every verb with a run takes, and errors in words."""
    command = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE|SPEC.JSON] [KEY=VALUE]…")(
        command
    )
    command = click.option(
        "--config-dir", "config_dirs", multiple=True, type=click.Path(path_type=Path),
        help="Folder with groups of your own (model/mine.yaml, …); may be given more than once.",
    )(command)  # fmt: skip
    command = click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output.")(command)
    return spoken(command)


def spoken(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a RunnerError into words (or JSON) and its exit code."""

    @wraps(command)
    def wrapped(*args: Any, **options: Any) -> Any:
        try:
            return command(*args, **options)
        except RunnerError as error:
            if options.get("as_json"):
                click.echo(dump(problems_as_json(error)))
            print_problems(Console(stderr=True), error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(InterruptedRun.exit_code)

    return wrapped


def request_of(words: Arguments, config_dirs: tuple[Path, ...]) -> Any:
    """Words of the command line → what to compose: files by their ending, the rest `key=value`."""
    from runner.request import Request

    spec_file: Path | None = None
    overrides: list[str] = []
    problems: list[Problem] = []
    for word in words:
        folder = Path(word)
        if "=" in word or word.startswith("~"):
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            overrides.append(f"recipe={word}")
        elif word.endswith(".json") and spec_file is None:
            spec_file = folder
        elif (folder / "spec.json").is_file() and spec_file is None:
            spec_file = folder / "spec.json"
        else:
            problems.append(_stray(word))
    return Request(None, tuple(overrides), config_dirs, spec_file, tuple(problems))


def _stray(word: str) -> Problem:
    """A word that is no file, and neither `group=name` nor `key=value`."""
    from runner import catalogue
    from runner.suggest import known_keys, nearest

    if word in cli.commands:
        return Problem(f"{word!r} is not the first word", "command line", f"python -m runner {word} …")
    if word.endswith(".json"):
        return Problem(f"{word}: a run starts from one file", "command line", "name one of them")
    meant = {key: f"{key}=…" for key in sorted(known_keys())}
    meant |= {name: f"{group}={name}" for group in catalogue.GROUPS for name in catalogue.options(group)}
    meant |= {name: f"recipe={name}" for name in catalogue.recipes()} | {verb: verb for verb in cli.commands}
    near = nearest(word, meant)
    remedy = f"did you mean {near}?" if near else "write group=name, key=value, a recipe or a spec.json"
    return Problem(f"{word!r} is neither a verb nor a choice", "command line", remedy)


@cli.command()
@composed
@click.option(
    "-m",
    "--multirun",
    is_flag=True,
    help="Sweep: key=a,b runs once per value (hydra/launcher=joblib: in parallel).",
)
@click.option("-sc", "--shell-completion", metavar="install=bash|zsh|fish", help="Print a completion script; eval it.")
def run(
    words: Arguments,
    config_dirs: tuple[Path, ...],
    as_json: bool,
    multirun: bool,
    shell_completion: str | None,
) -> None:
    """Compose, validate and run (the verb may be left out)."""
    if shell_completion:
        from runner.completion import answer

        verbs = {name: [o for p in verb.params for o in p.opts if o[0] == "-"] for name, verb in cli.commands.items()}
        click.echo(answer(shell_completion, os.environ.get("COMP_LINE", ""), verbs), nl=False)
        return
    from runner import launch

    request = request_of(words, config_dirs)
    console = Console(stderr=as_json)
    sys.exit(launch.sweep(request, console, as_json) if multirun else launch.run(request, console, as_json))


@cli.command()
@composed
def show(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """The resolved run, as YAML; nothing is started."""
    from runner.launch import resolved

    spec, notes = resolved(request_of(words, config_dirs))
    content = spec.model_dump(mode="json")
    if as_json:
        click.echo(dump(content))
        return
    from omegaconf import OmegaConf

    click.echo(OmegaConf.to_yaml(OmegaConf.create(content)), nl=False)
    for note in notes:
        click.echo(f"# note: {note}")


@cli.command()
@composed
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the memory of every phase.")
@click.option("--deepspeed", "ds_json", is_flag=True, help="Print the resolved DeepSpeed JSON and nothing else.")
def plan(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, plot: Path | None, ds_json: bool) -> None:
    """Does it fit, where do the GiB go, how long, how much: before anything is rented or loaded.

    Exit code 0 if it fits, 3 if not, or if it takes more than where.max_usd or where.max_hours.
    """
    from runner import planning
    from runner.compose import compose, source_finder
    from runner.launch import asked, complete
    from runner.report.plan import print_plan
    from runner.report.plan_plot import plot_plan

    request = request_of(words, config_dirs)
    composed = compose(request)
    spec, notes = complete(composed, source_finder(request), needed=True)
    found = planning.plan(spec, notes)
    content = found.as_dict()
    if plot is not None:
        plot_plan(content, plot)
    if ds_json:
        click.echo(dump(found.deepspeed))
        for reason in found.reasons:
            click.echo(f"refused: {reason}", err=True)
    elif as_json:
        click.echo(dump(content))
    else:
        console = Console()
        print_plan(console, content)
        if found.reasons:
            console.print(f"→ {planning.advice(asked(composed, needed=True), found)}", highlight=False, soft_wrap=True)
        if plot is not None:
            console.print(f"Picture: {plot}", highlight=False, soft_wrap=True)
    sys.exit(CannotRunError.exit_code if found.reasons else 0)


@cli.command()
@composed
@click.option("--by", type=click.Choice(["usd", "time"]), default="usd", show_default=True, help="What to rank by.")
@click.option("--all", "everything", is_flag=True, help="Show what does not fit, too, and all of a long table.")
def fit(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, by: str, everything: bool) -> None:
    """What hardware, method or model: every one that is not named is tried, with its best ZeRO stage and batch."""
    from dataclasses import asdict

    from runner import fitting
    from runner.compose import compose, source_finder
    from runner.launch import asked
    from runner.report.plan import print_fit

    request = request_of(words, config_dirs)
    given = fitting.given_in(request)
    spec = fitting.opened(asked(compose(request), source_finder(request), needed=True), given)
    rows = [asdict(row) for row in fitting.fits(spec, given, by)]
    fit = [row for row in rows if row["fits"]]
    if as_json:
        click.echo(dump(rows))
    else:
        short = fit[:20] + [row for row in rows if not row["fits"]][: max(0, 12 - len(fit))]
        print_fit(Console(), rows if everything else short, fitting.title(spec, rows))
        if not everything and len(short) < len(rows):
            click.echo(f"… and {len(rows) - len(short)} more: --all")
    sys.exit(0 if fit else CannotRunError.exit_code)


@cli.command()
@composed
def table(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Memory by method and model size, from arithmetic, with what it assumes."""
    from runner import fitting
    from runner.launch import resolved
    from runner.report.plan import print_memory_table

    request = request_of(words, config_dirs)
    content = fitting.memory_table(fitting.opened(resolved(request)[0], fitting.given_in(request)))
    if as_json:
        click.echo(dump(content))
        return
    print_memory_table(Console(), content)


@cli.command()
@click.argument("key")
@composed
def explain(key: str, words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Where the value of KEY came from: command line, recipe, or which file and line."""
    from runner.compose import compose, places, source_finder
    from runner.launch import complete
    from runner.problems import value_of
    from runner.report.tables import print_origins

    request = request_of(words, config_dirs)
    spec = compose(request)
    value, final = value_of(spec, key), value_of(complete(spec, source_finder(request))[0], key)
    origins = places(request, key)
    if as_json:
        click.echo(dump({"key": key, "value": final, "composed": value, "origins": [vars(p) for p in origins]}))
        return
    print_origins(Console(), key, value, final, origins)


@cli.command(name="list")
@click.argument("what", required=False)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output.")
@spoken
def list_(what: str | None, as_json: bool) -> None:
    """What there is to choose from: models, methods, hw, deepspeed, objectives, data, where, track, recipes."""
    from runner.report.catalogue import listing, print_listing

    table = listing(what)
    if as_json:
        click.echo(dump(table.rows))
        return
    print_listing(Console(), table)


@cli.command()
@click.option("--output-dir", default="runs", type=click.Path(path_type=Path), help="Folder with the runs.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output.")
@spoken
def runs(output_dir: Path, as_json: bool) -> None:
    """Past runs: state, model, method, loss, time."""
    from runner.report.tables import print_runs, run_rows

    rows = run_rows(output_dir)
    if as_json:
        click.echo(dump(rows))
        return
    print_runs(Console(), rows, output_dir)


@cli.command()
@click.option("--output-dir", default="runs", type=click.Path(path_type=Path), help="Folder with the runs.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output.")
@spoken
def calibrate(output_dir: Path, as_json: bool) -> None:
    """Predicted against measured, over past runs."""
    from runner.report.calibrate import calibration, print_calibration

    found = calibration(output_dir)
    if as_json:
        click.echo(dump(found))
        return
    print_calibration(Console(), found)


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--prompt", help="Answer this one prompt and stop.")
@click.option("--base", is_flag=True, help="Talk to the model as it was before training.")
@click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer, in tokens.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output (with --prompt).")
@spoken
def chat(run_dir: Path, prompt: str | None, base: bool, max_new_tokens: int, as_json: bool) -> None:
    """Talk to the tuned model of a run."""
    from runner.execute.chat import chat as talk

    sys.exit(talk(run_dir, prompt, base, max_new_tokens, as_json))


def main() -> None:
    """Entry point of the console script and of `python -m runner`."""
    cli(prog_name="python -m runner" if sys.argv[0].endswith("__main__.py") else None)
