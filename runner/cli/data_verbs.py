"""`data`: preview, count and prepare a data set before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from runner.cli.options import Arguments, answer, one_run, request_of, say_unread, takes_words
from runner.errors import RequestError


@click.group()
def data() -> None:
    """Inspect or prepare a data set before training.

    \b
    Examples:
      python -m runner data preview data.path=my.jsonl
      python -m runner data stats   data.path='shards/*.parquet' model=qwen3_0_6b --plot lengths.png
      python -m runner data prepare data.path=my.jsonl train.max_length=2048
    """


def _composed(verb: str, words: Arguments, config_dirs: tuple[Path, ...]) -> Any:
    """The run that the words describe; those that `verb` does not read are named."""
    from runner.config.compose import compose

    request = request_of(words, config_dirs)
    spec = compose(request)
    say_unread(f"data {verb}", request)
    return spec


@data.command()
@takes_words
@one_run
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=0), help="How many rows to show.")
@click.option("--row", type=click.IntRange(min=1), help="Show this one (1-based, of those that are right).")
def preview(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, rows: int, row: int | None) -> None:
    """Show the format, rows with their learned tokens, and mistakes.

    Rows are printed as the chat template renders them, learned tokens in green. torch is not imported. Exit code 0
    without a mistake, 2 with one (with data.on_error=skip only if no row is right).

    \b
    Examples:
      python -m runner data preview data.path=my.jsonl
      python -m runner data preview data.path=my.jsonl model=llama3_8b --row 17
      python -m runner data preview objective=dpo data.path=pairs.jsonl --json
    """
    from runner.data.inspect.preview import preview as look
    from runner.report.data_tables import print_preview

    found = look(_composed("preview", words, config_dirs), rows, row)
    answer(as_json, found, lambda: print_preview(Console(), found))
    if found["problems"] and (found["on_error"] == "stop" or not found["num_rows"]):
        sys.exit(RequestError.exit_code)


@data.command()
@takes_words
@one_run
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Plot the lengths.")
def stats(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool, plot: Path | None) -> None:
    """Show lengths, duplicates and the effect of train.max_length.

    For several values of train.max_length: how many rows are cut and how full packed sequences are. One is suggested.

    \b
    Examples:
      python -m runner data stats data.path=my.jsonl
      python -m runner data stats data.path=my.jsonl model=qwen3_0_6b --plot lengths.png --json
    """
    from runner.data.inspect.stats import stats as count
    from runner.report.data_tables import print_stats
    from runner.report.plots import plot_lengths

    found = count(_composed("stats", words, config_dirs))
    if plot is not None:
        plot_lengths(found, plot)
    answer(as_json, found, lambda: print_stats(Console(), found))
    if plot is not None and not as_json:
        click.echo(f"Picture: {plot}")


@data.command()
@takes_words
@one_run
def prepare(words: Arguments, config_dirs: tuple[Path, ...], as_json: bool) -> None:
    """Tokenise, pack and cache the rows of a run now.

    A run with the same data, model, objective, train.max_length, train.packing and train.seed then starts training at
    once; its other keys may differ. With where=runpod the tokens are uploaded to the pod.

    \b
    Examples:
      python -m runner data prepare data.path=my.jsonl train.max_length=2048
      python -m runner data prepare recipes/mistral7b_qlora4_h100x3.yaml --json
    """
    from runner.runs.worker_tasks import prepare as tokenise

    sys.exit(tokenise(_composed("prepare", words, config_dirs), as_json))
