"""A data set as people look at it before they train on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.report.text import counted

SHOWN_PROBLEMS = 20
LEARNED, GIVEN = "bold green", "dim"
BAR = "█"
BAR_WIDTH = 40


def print_preview(console: Console, found: Mapping[str, Any]) -> None:
    """Files with their formats, rows with what is learned in green, and every mistake with its file and row."""
    for file in (*found["files"], *found["held_out_files"]):
        wrong = f", {file['num_wrong']:,} wrong" if file["num_wrong"] else ""
        held = ", held out" if file in found["held_out_files"] else ""
        rows = f"{file['format'] or 'unknown'}, {counted(file['num_rows'], 'row')}"
        console.print(f"{file['name']}: {rows}{wrong}{held}", highlight=False, markup=False)
        for words, names in (("are not read", file["left_out"]), ("only reward functions get", file["rewarded"])):
            line = f"  columns that {words}: {', '.join(names)}"
            console.print(line, highlight=False, markup=False, soft_wrap=True) if names else None
    unit = "tokens" if found["tokenizer"] else "turns: the model's tokenizer is not on this machine"
    learned = "⟦in brackets⟧" if console.color_system is None else "green"
    console.print(Text.assemble("Learned for ", found["objective"], ": ", (learned, LEARNED), f" (by {unit})"))
    for row in found["rows"]:
        console.print()
        console.print(Text(f"── {row['where']} ", style="bold"), soft_wrap=True)
        _print_row(console, row["segments"])
    _print_problems(console, found["problems"], found["on_error"])


def _print_row(console: Console, segments: list[dict[str, Any]]) -> None:
    text, part = Text(), None
    for piece in segments:
        if piece.get("part") != part:
            part = piece.get("part")
            text.append(f"\n{part}:\n" if len(text) else f"{part}:\n", style="bold")
        shown = _visible(piece["text"])
        shown = f"⟦{shown}⟧" if piece["trained"] and console.color_system is None else shown
        text.append(shown, style=LEARNED if piece["trained"] else GIVEN)
    console.print(text, soft_wrap=True)
    counts = [piece["tokens"] for piece in segments]
    if counts and None not in counts:
        learned = sum(piece["tokens"] for piece in segments if piece["trained"])
        console.print(f"   {sum(counts):,} tokens, {learned:,} learned", style="italic", highlight=False)


def _visible(text: str) -> str:
    """Control characters as symbols; a terminal would obey them."""
    return "".join(c if c == "\n" or ord(c) >= 32 else chr(0x2400 + ord(c)) for c in text)


def _print_problems(console: Console, problems: list[dict[str, Any]], policy: str | None = None) -> None:
    if not problems:
        return
    rows = len({problem["source"] for problem in problems})
    fate = {"stop": "; training would stop", "skip": "; training skips them"}.get(policy or "", "")
    count = f"{counted(len(problems), 'mistake')} in {counted(rows, 'row')}{fate}"
    console.print(f"\n{count}", style="bold red", highlight=False)
    for problem in problems[:SHOWN_PROBLEMS]:
        line = Text("  • ").append(f"{problem['source']}: " if problem["source"] else "", style="dim")
        console.print(line.append(problem["what"]), soft_wrap=True)
        if problem["remedy"]:
            console.print(Text(f"    → {problem['remedy']}", style="green"), soft_wrap=True)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"  and {len(problems) - SHOWN_PROBLEMS:,} more: --json has all", highlight=False)


def print_stats(console: Console, found: Mapping[str, Any]) -> None:
    """Counts, a histogram, and a table of longest lengths."""
    length, twice = found["length"], found["duplicates"]
    learned = f", {found['num_learned']:,} of them learned" if found["num_learned"] is not None else ""
    lines = [
        f"Rows      {found['num_rows']:,} to train on, {found['num_held_out']:,} held out",
        f"Tokens    {found['num_tokens']:,}{learned} ({found['how']})",
        f"Length    median {length['median']:,.0f}, mean {length['mean']:,.0f}, 90% {length['p90']:,.0f}, "
        f"99% {length['p99']:,.0f}, longest {length['max']:,.0f}",
        f"Suggested train.max_length={found['suggested_max_length']} leaves 99% of the rows whole "
        f"(now {found['max_length']})",
        f"Twice     {counted(twice['rows'], 'row')}, {counted(twice['prompts'], 'prompt')}; "
        f"rows to train on that are held out as well: {twice['held_out_in_train']:,}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    for line in bars(found["histogram"]):
        console.print(line, highlight=False)
    console.print()
    console.print(_lengths(found["at_length"], found["max_length"]))
    _print_problems(console, found["problems"])


def bars(histogram: list[dict[str, int]]) -> list[str]:
    """The histogram, a line per class."""
    most = max(one["rows"] for one in histogram)
    width = len(f"{histogram[-1]['to']:,}")
    return [
        f"{one['from']:>{width},} – {one['to'] - 1:>{width},}  "
        f"{BAR * max(round(BAR_WIDTH * one['rows'] / most), bool(one['rows']))} {one['rows']:,}".rstrip()
        for one in histogram
    ]


def _lengths(rows: list[dict[str, Any]], now: int) -> Table:
    table = Table(title="At a longest length of …", title_justify="left", box=None, pad_edge=False)
    for name in ("tokens", "rows cut", "tokens cut", "packed sequences", "full", "full if padded"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['max_length']:,}", f"{row['rows_cut']:,}", f"{row['tokens_cut']:,}", f"{row['packed_sequences']:,}",
            f"{row['packed_share']:.0%}", f"{row['padded_share']:.0%}",
            style="bold" if row["max_length"] == now else "",
        )  # fmt: skip
    return table
