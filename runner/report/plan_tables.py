"""Tables over many plans: what fits where, and the memory of every method and model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.report.plan_terms import gib, recomputed
from runner.report.text import ascii_fallback, duration

UNKNOWN = "–"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table of options."""

    header: str
    cell: Callable[[Row], str]
    number: bool = True
    rank: int = 0
    """A terminal too narrow for all does without the highest first."""


def _named(key: str) -> Column:
    return Column(key, lambda row: str(row[key]), number=False)


def _known(key: str, words: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: UNKNOWN if row[key] is None else words(row[key])


def _memory(row: Row) -> str:
    return gib(row["peak_gib"]) + (f" of {gib(row['capacity_gib'])}" if row["capacity_gib"] is not None else "")


_CHOICES = ("model", "method", "hw")
_STAGE = Column("ZeRO", lambda row: str(row["zero_stage"]), number=False, rank=1)
_GPUS = Column("GPUs", lambda row: str(row["num_gpus"]), rank=6)
_BATCH = Column("batch", lambda row: f"{row['micro_batch']} × {row['accumulation']}", rank=4)
_RECOMPUTED = Column("recomputes", lambda row: recomputed(row["checkpointing"]), number=False, rank=7)
_MEMORY = Column("GiB", _memory)
_FITTING = (
    _GPUS,
    _STAGE,
    _BATCH,
    _RECOMPUTED,
    _MEMORY,
    Column("tokens/s", _known("tokens_per_second", lambda speed: f"{speed:,.0f}"), rank=3),
    Column("time", _known("hours", lambda hours: duration(3600 * hours)), rank=2),
    Column("cost", _known("usd", lambda usd: f"${usd:,.2f}")),
    Column(
        "$/M tokens", _known("usd_per_million_tokens", lambda usd: f"{usd:.3f}" if usd < 1 else f"{usd:,.2f}"), rank=5
    ),
)
_NOTE = Column("what makes it fit", lambda row: row["note"] or UNKNOWN, number=False)


def print_fit(console: Console, rows: Sequence[Row], title: str) -> None:
    """The options in the order given, those that fit first; of the others what to change.

    A choice that is the same in all rows is said once, beside the title (unless the title says it).
    """
    same = [key for key in _CHOICES if len(rows) > 1 and len({row[key] for row in rows}) == 1]
    choices = tuple(_named(key) for key in _CHOICES if key not in same)
    with ascii_fallback(console):
        heading = Text(title, style="bold")
        for said in (f"{key}={rows[0][key]}" for key in same):
            if said not in title:
                heading.append(f"  {said}", style="not bold dim")
        console.print(heading)
        fitting, others = [row for row in rows if row["fits"]], [row for row in rows if not row["fits"]]
        if fitting:
            console.print(Text(f"\nFits ({len(fitting)})", style="bold green"))
            told = {_GPUS} if len({row["num_gpus"] for row in rows}) == 1 else set()
            _print(console, [c for c in (*choices, *_FITTING) if c not in told], fitting)
        if others:
            console.print(Text(f"\nDoes not fit ({len(others)})", style="bold red"))
            _print(console, (*choices, _STAGE, _MEMORY, _NOTE), others)
        if not rows:
            console.print(Text("\nNothing to choose from", style="yellow"))


def _print(console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """A table without the columns there is no room for, or nothing known; the last one folds where it is text."""
    cells = {column: [column.cell(row) for row in rows] for column in columns}
    widths = {c: max(cell_len(c.header), *(cell_len(cell) for cell in cells[c])) for c in columns}
    if _NOTE in columns:
        widths[_NOTE] = min(widths[_NOTE], 30)
    unknown = [c for c in columns if set(cells[c]) == {UNKNOWN}]
    shown = [c for c in columns if c not in unknown]
    while sum(widths[c] + 2 for c in shown) - 2 > console.width and any(c.rank for c in shown):
        shown.remove(max(shown, key=lambda c: c.rank))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for column in shown:
        table.add_column(column.header, justify="right" if column.number else "left", overflow="fold",
                         no_wrap=column.number)  # fmt: skip
    for index in range(len(rows)):
        table.add_row(*(Text(cells[column][index]) for column in shown))
    console.print(table, highlight=False)
    legend = {"batch": "micro batch × accumulation on each GPU"} if _BATCH in shown else {}
    if unknown:
        legend[", ".join(column.header for column in unknown)] = "not known"
    if any(UNKNOWN in cells[column] for column in shown):
        legend[UNKNOWN] = "not known"
    if legend:
        console.print(Text("; ".join(f"{sign}: {words}" for sign, words in legend.items()), style="dim"))


def print_memory_table(console: Console, table: Mapping[str, Any]) -> None:
    """GiB by method and model: a row per method, or, where the models need more room than there is, per model."""
    columns = [str(name) for name in table["columns"]]
    methods = [str(row["method"]) for row in table["rows"]]
    cells = [[UNKNOWN if size is None else gib(size) for size in row["cells"]] for row in table["rows"]]
    first, across, down = "method", columns, methods
    room = max(map(len, [first, *methods])) + sum(max(5, len(name)) + 2 for name in columns)
    if room > console.width:
        first, across, down, cells = "model", methods, columns, [list(column) for column in zip(*cells, strict=True)]
    view = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    view.add_column(first, no_wrap=True)  # names, to be copied
    for name in across:
        view.add_column(name, justify="right", overflow="fold")
    for name, sizes in zip(down, cells, strict=True):
        view.add_row(Text(name), *map(Text, sizes))
    with ascii_fallback(console):
        console.print(Text(table["title"], style="bold"))
        console.print(view, highlight=False)
        if any(UNKNOWN in sizes for sizes in cells):
            console.print(Text(f"{UNKNOWN}: does not work, or not known", style="dim"))
        for assumption in table["assumptions"]:
            console.print(Text(assumption, style="dim"))
