"""The table of verbs, and the arguments and error handling that they share."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from rich.console import Console

from runner.errors import InterruptedRun, Problem, RequestError, RunnerError
from runner.report.text import dump, print_problems, problems_as_json

if TYPE_CHECKING:
    from runner.config.command_line import Request

VERBS = {
    "run": "run_verbs",
    "resume": "run_verbs",
    "join": "run_verbs",
    "show": "inspect_verbs",
    "plan": "plan_verbs",
    "fit": "plan_verbs",
    "table": "plan_verbs",
    "explain": "inspect_verbs",
    "list": "inspect_verbs",
    "runs": "history_verbs",
    "watch": "history_verbs",
    "compare": "history_verbs",
    "ui": "ui_verb",
    "report": "report_verbs",
    "data": "data_verbs",
    "calibrate": "plan_verbs",
    "doctor": "inspect_verbs",
    "pods": "pod_verbs",
    "gpus": "runpod_verbs",
    "volumes": "runpod_verbs",
    "attach": "remote_verbs",
    "logs": "remote_verbs",
    "status": "remote_verbs",
    "fetch": "remote_verbs",
    "chat": "model_verbs",
    "eval": "model_verbs",
    "merge": "model_verbs",
    "export": "model_verbs",
    "emulate": "runpod_verbs",
    "push": "model_verbs",
    "deploy": "model_verbs",
}
"""Verb → module of this package, in the order of `--help`. There it is a click command of that name, or `list_`."""

Arguments = tuple[str, ...]
Command = TypeVar("Command", bound=Callable[..., Any])
"""A function that click makes a command of."""
as_json_option = click.option("--json", "as_json", is_flag=True, help="Answer in JSON on standard output.")
output_dir_option = click.option(
    "--output-dir", default="runs", type=click.Path(path_type=Path), show_default=True, help="Folder with the runs."
)

config_dirs_option = click.option(
    "--config-dir", "config_dirs", multiple=True, type=click.Path(path_type=Path),
    help="Folder with groups (model/mine.yaml, …) and recipes of your own; may be given more than once.",
)  # fmt: skip

say = partial(click.echo, err=True)
"""A line for people, beside the answer."""


def answer(as_json: bool, facts: object, shown: str | Callable[[], None]) -> None:
    """The facts in JSON, or as people read them: a text, or a function that prints them."""
    if as_json:
        click.echo(dump(facts))
    elif isinstance(shown, str):
        click.echo(shown)
    else:
        shown()


def confirm(question: str, yes: bool) -> None:
    """Ask at a terminal, unless `yes` was typed; anything but a yes ends the process."""
    if not yes and sys.stdin.isatty():
        click.confirm(question, abort=True, err=True)


class Finite(click.FloatRange):
    """A number within bounds; `nan`, which is within any, and `inf` are none."""

    def convert(self, value: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As a float range does."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


def takes_words(command: Command) -> Command:
    """Arguments that every verb with a run takes, and errors in words."""
    words = click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RECIPE|SPEC.JSON] [KEY=VALUE]…")
    return reports_errors(as_json_option(config_dirs_option(words(command))))


ADD_M = "add -m to run once per value"


def one_run(command: Command) -> Command:
    """Refuse `-m` in words, for a verb that answers for one run."""

    @click.option("-m", "--multirun", is_flag=True, hidden=True)
    @wraps(command)
    def wrapped(*args: object, multirun: bool, **options: object) -> object:
        if multirun:
            what = f"-m sweeps over several runs, and {command.__name__} answers for one"
            remedy = "name one value for each key; python -m runner -m … plans every point before the first one starts"
            raise RequestError(Problem(what, "command line", remedy))
        try:
            return command(*args, **options)
        except RequestError as error:
            raise type(error)(*map(_without_sweep, error.problems)) from None

    return cast(Command, wrapped)


def _without_sweep(problem: Problem) -> Problem:
    """Several values for a key, where `-m` would be refused next."""
    remedy = (problem.remedy or "").replace(ADD_M, "name one value", 1)
    return replace(problem, remedy=remedy or None)


def reports_errors(command: Command) -> Command:
    """Turn a RunnerError into words (or JSON) and its exit code."""

    @wraps(command)
    def wrapped(*args: object, **options: object) -> object:
        try:
            return command(*args, **options)
        except RunnerError as error:
            if options.get("as_json"):
                click.echo(dump(problems_as_json(error)))
            print_problems(Console(stderr=True), error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(InterruptedRun.exit_code)

    return cast(Command, wrapped)


def request_of(words: Arguments, config_dirs: tuple[Path, ...]) -> Request:
    """Words of the command line → what to compose: files by their ending, the rest `key=value`."""
    from runner.config.command_line import Request

    spec_file: Path | None = None
    overrides: list[str] = []
    problems: list[Problem] = []
    for place, word in enumerate(words):
        folder = Path(word)
        named = word.endswith((".yaml", ".yml", ".json")) and os.path.isfile(word)  # whatever its name holds
        if ("=" in word or word.startswith("~")) and not named:
            overrides.append(word)
        elif word.endswith((".yaml", ".yml")):
            overrides.append(f"recipe={word}")
        elif word.endswith(".json") and spec_file is None:
            spec_file = folder
        elif os.path.isfile(folder / "spec.json") and spec_file is None:
            spec_file = folder / "spec.json"
        elif not problems or "/" in words[0]:  # what follows a verb that does not exist is that verb's
            problems.append(stray(word, first=place == 0))
    # Where a repeated run goes on and what is recorded of it is no part of what it trains.
    return Request(None, tuple(overrides), config_dirs, spec_file, tuple(problems), ("where", "track"))


def say_unread(verb: str, request: Request) -> None:
    """Name the typed words that change nothing of the answer, where they do not get into JSON."""
    from runner.runs import unread_keys

    for note in unread_keys.unread_key_notes(verb, request):
        say(f"Note    {note}")


def _no_recipe(word: str, file: Path) -> Problem:
    """A file or folder that is there, and that no run starts from."""
    from runner.data.readers.files import kind_of_file

    if os.path.isdir(file):
        remedy = f"a folder of choices: --config-dir {word}; of rows: data.path={word}; a model: model.id={word}"
        return Problem(f"{word} is a folder without a spec.json", "command line", remedy)
    if kind_of_file(word):
        return Problem(f"{word} holds rows, and no recipe", "command line", f"write data.path={word}")
    remedy = f"call it {file.with_suffix('.yaml') if os.path.isfile(file) else 'my.yaml'}, if it is a recipe"
    return Problem(f"{word} is no recipe: the name of one ends in .yaml", "command line", remedy)


_MEANT = {
    "train": "run", "finetune": "run", "fine-tune": "run", "start": "run", "sft": "run", "launch": "run",
    "serve": "deploy", "api": "deploy", "evaluate": "eval", "test": "eval", "benchmark": "eval", "infer": "chat",
    "inference": "chat", "generate": "chat", "predict": "chat", "talk": "chat", "continue": "resume",
    "restart": "resume", "upload": "push", "publish": "push", "preprocess": "data prepare", "prepare": "data prepare",
    "preview": "data preview", "stats": "data stats", "check": "plan", "validate": "plan", "dry-run": "plan",
    "estimate": "plan", "config": "show", "print": "show", "ls": "list", "models": "list", "recipes": "list recipes",
    "history": "runs", "diff": "compare", "leaderboard": "runs", "monitor": "watch", "follow": "watch",
    "delete": "runs delete", "rm": "runs delete", "restore": "runs restore", "undelete": "runs restore",
    "price": "gpus", "prices": "gpus", "terminate": "pods terminate", "kill": "pods terminate",
    "stop": "pods stop", "ssh": "pods ssh", "tunnel": "pods tunnel", "up": "pods up", "reap": "pods reap",
    "sync": "fetch", "download": "fetch", "tail": "logs", "convert": "export", "fuse": "merge", "help": "--help",
    "version": "--version",
}  # fmt: skip
"""Names of our verbs in other tools."""


def stray(word: str, first: bool = False) -> Problem:
    """A word that is no file, and neither `group=name` nor `key=value`; the `first` one may be meant as a verb."""
    from runner.config import conf_files
    from runner.config.did_you_mean import nearest
    from runner.config.schema_keys import known_keys

    if word in VERBS:
        return Problem(f"{word!r} is not the first word", "command line", f"python -m runner {word} …")
    if word.endswith(".json"):
        return Problem(f"{word}: a run starts from one file", "command line", "name one of them")
    if os.path.exists(file := Path(word)):
        return _no_recipe(word, file)
    if "/" in word:
        why = "correct it" if word.startswith("/") else f"the path is relative to {Path.cwd()}"
        return Problem(f"there is no file or folder {word}", "command line", why)
    key, colon, value = word.partition(":")
    if colon and value and key in {*conf_files.GROUPS, *known_keys()}:
        return Problem(f"{word!r} is neither a verb nor a choice", "command line", f"did you mean {key}={value}?")
    choices = {name: f"{group}={name}" for group in conf_files.GROUPS for name in conf_files.options(group)}
    choices |= {name: f"recipe={name}" for name in conf_files.recipes()}
    if first and word not in choices and (verb := _MEANT.get(word) or nearest(word, list(VERBS), cutoff=0.7)):
        instead = "leave it out: no verb means run" if verb == "run" else f"did you mean {verb}?"
        return Problem(f"there is no verb {word!r}", "command line", instead)
    meant = {key: f"{key}=…" for key in sorted(known_keys())} | choices | {verb: verb for verb in VERBS}
    near = nearest(word, meant)
    remedy = f"did you mean {near}?" if near else "write group=name, key=value, a recipe or a spec.json"
    return Problem(f"{word!r} is neither a verb nor a choice", "command line", remedy)
