"""A comparison as a table: runs as columns, as rows or one below the other, whichever the terminal has room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from runner.report.comparison import FACTS_OF_A_CHOICE, Comparison, Result
from runner.report.text import ascii_fallback, counted, duration, without_control_sequences

Rows = list[tuple[str, list[str]]]
"""Name and one text per run."""
_LONGEST = 60
"""Characters of a value in a table: a path, a list of layers."""
_STATE_STYLE = {"done": "green", "failed": "red", "killed": "red", "interrupted": "yellow"}


def print_comparison(console: Console, found: Comparison, *, every_key: bool = False) -> None:
    """Print the runs, best first, what differs between them, and how they came out."""
    differing = found.differing if every_key else found.chosen()
    keys: Rows = [(key, [_value(value) for value in values]) for key, values in differing.items()]
    with ascii_fallback(console):
        console.print(Text(f"By {found.metric}, {_BETTER[found.mode]} first", style="bold"), soft_wrap=True)
        for number, result in enumerate(found.results, 1):
            state = result["state"]
            line = Text.assemble(
                f"{number:>3}  {without_control_sequences(result['folder'])}  ",
                (state, _STATE_STYLE.get(state, "cyan")),
            )
            console.print(line, soft_wrap=True)
        console.print()
        for lines in _laid_out(keys, list(_results(found)), len(found.results), console.width):
            console.print(lines, soft_wrap=True)
        for note in _notes(found, every_key):
            console.print(f"Note    {note}", style="dim", markup=False, highlight=False, soft_wrap=True)


_BETTER = {"min": "the least", "max": "the most"}


def _notes(found: Comparison, every_key: bool) -> Iterator[str]:
    yield from map(without_control_sequences, found.notes)
    if not found.differing:
        yield "the specs are equal: the runs differ by what they ran on, or by chance"
    left = {} if every_key else {key for key in found.differing if key not in found.chosen()}
    for group in FACTS_OF_A_CHOICE:
        if number := sum(key.startswith(f"{group}.") for key in left):
            yield f"{counted(number, 'fact')} of {group} that follow from {group}.name left out: --all shows them"


def _results(found: Comparison) -> Iterator[tuple[str, list[str]]]:
    """Rows of results that at least one run has."""
    results = found.results

    def row(name: str, cell: Callable[[Result], str]) -> Iterator[tuple[str, list[str]]]:
        cells = [cell(result) for result in results]
        if any(text != "–" for text in cells):
            yield name, cells

    yield from row(found.metric, lambda r: _rounded(r["metric"]))
    if found.metric != "eval.after.loss":
        yield from row("held-out loss", lambda r: _pair(r["held_out_loss_before"], r["held_out_loss_after"]))
    else:
        yield from row("held-out loss before", lambda r: _rounded(r["held_out_loss_before"]))
    yield from row("exact", lambda r: _pair(r["exact_match_before"], r["exact_match_after"], "{:.0%}"))
    yield from row("train loss", lambda r: _pair(r["loss_first"], r["loss_last"]))
    yield from row("steps", lambda r: str(r["steps"] or "–"))
    yield from row("tokens/s", lambda r: _rounded(r["tokens_per_second"], "{:,.0f}"))
    yield from row("peak GiB", lambda r: _rounded(r["peak_memory_gib"], "{:.1f}"))
    yield from row("time", lambda r: duration(r["seconds"]) if r["seconds"] else "–")
    yield from row("cost", lambda r: _rounded(r["usd"], "${:.2f}"))


def _laid_out(keys: Rows, results: Rows, runs: int, width: int) -> Iterator[Text]:
    numbers = [str(number) for number in range(1, runs + 1)]
    columns = _table([("", numbers), *keys, ("", [""] * runs), *results] if keys else [("", numbers), *results])
    if all(cell_len(line.plain) <= width for line in columns):
        yield from columns
        return
    both = keys + results
    rows = _table([("", [name for name, _ in both]), *((n, [c[i] for _, c in both]) for i, n in enumerate(numbers))])
    if all(cell_len(line.plain) <= width for line in rows):
        yield from rows
        return
    for place, number in enumerate(numbers):
        yield Text(number, style="bold")
        for name, cells in both:
            yield Text(f"  {name}  {cells[place]}")


def _table(rows: Rows) -> list[Text]:
    first = max(cell_len(name) for name, _ in rows)
    widths = [max(map(cell_len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    lines = []
    for place, (name, cells) in enumerate(rows):
        told = "  ".join(" " * (size - cell_len(cell)) + cell for cell, size in zip(cells, widths, strict=True))
        line = f"{name}{' ' * (first - cell_len(name))}  {told}"
        lines.append(Text(line.rstrip(), style="" if place else "bold"))
    return lines


def _value(value: Any) -> str:
    text = without_control_sequences("true" if value is True else "false" if value is False else str(value))
    text = "null" if value is None else " ".join(text.split())
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _rounded(number: float | None, form: str = "{:.4f}") -> str:
    return "–" if number is None else form.format(number)


def _pair(before: float | None, after: float | None, form: str = "{:.4f}") -> str:
    if before is None:
        return _rounded(after, form)
    return f"{_rounded(before, form)} → {_rounded(after, form)}"
