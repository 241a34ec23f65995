"""The plan as text: whether it fits, memory by phase, time and cost."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.plan.plan import Plan
from runner.report.plan_terms import (
    FAMILIES,
    PHASES,
    STAGES,
    Family,
    cells,
    gib,
    heading,
    present,
    recomputed,
    segments,
    term_of,
)
from runner.report.text import ascii_fallback, duration

BAR = 50
_BESIDE_BAR = 26  # `backward  `, the mark, ` 43.0 GiB`, ` peak`

_PARTS = {
    "setup": "set-up", "download": "download", "load": "loading", "training": "training",
    "evaluation": "evaluation", "save": "saving",
}  # fmt: skip


def print_plan(console: Console, plan: Plan, titles: Mapping[str, str | None] = MappingProxyType({})) -> None:
    """A plan: the answer in a sentence, a bar per phase, the peak's terms, time and money."""
    with ascii_fallback(console):
        console.print(Text(heading(plan, titles), style="bold"))
        console.print(_answer(plan))
        console.print()
        _print_bars(console, plan)
        console.print()
        _print_peak(console, plan)
        console.print()
        _print_facts(console, plan)
        _print_notes(console, plan)


def _answer(plan: Plan) -> Text:
    """Does it fit?"""
    peak, capacity = plan.peak_gib, plan.capacity_gib
    over = capacity is not None and peak["expected"] > capacity
    if not plan.fits:
        room = f"{gib(capacity)} GiB" if over and capacity else "main memory"
        text = Text(f"Does not fit in {room}", style="bold red")
    elif capacity is None:
        text = Text("Not known whether it fits", style="bold yellow")
    elif plan.reasons:
        text = Text("Fits, but is refused", style="bold red")
    else:
        text = Text("Fits", style="bold green")
    of = "" if over else " GiB" if capacity is None else f" of {gib(capacity)} GiB"
    each = " on each GPU" if plan.num_gpus > 1 else ""
    answer = (
        f": {gib(peak['expected'])}{of} expected{each} at the peak, {PHASES[plan.peak_phase]} "
        f"({gib(peak['low'])}–{gib(peak['high'])})"
    )
    return text.append(answer, style="not bold default")


def _print_bars(console: Console, plan: Plan) -> None:
    """One bar per phase against the capacity, all to the same scale."""
    fills = _fills(console)
    width = max(10, min(BAR, console.width - _BESIDE_BAR))
    totals = {name: sum(terms.values()) for name, terms in plan.phases.items()}
    capacity = plan.capacity_gib
    scale = max(*totals.values(), capacity or 0.0)
    mark = min(round(width * capacity / scale), width - (scale > capacity)) if capacity else None
    if mark is not None and capacity is not None:
        label = f"{gib(capacity)} GiB"
        there = f"{label} ┐".rjust(mark + 1) if mark > len(label) else f"{'┌':>{mark + 1}} {label}"
        console.print(Text(" " * 10 + there, style="dim"))
    for phase in PHASES:
        line = Text(f"{phase:<10}")
        bar = _bar(segments(plan.phases[phase]), scale, width, mark, fills)
        number = Text(f" {gib(totals[phase]):>5} GiB")
        if phase == plan.peak_phase:
            number.append(" peak")
            line.stylize("bold")
            number.stylize("bold")
        if capacity and totals[phase] > capacity:
            number.stylize("red")
        console.print(line + bar + number, no_wrap=True, overflow="ignore", crop=False)
    legend = [Text.assemble(fills[family], f" {family.name}") for family in present(plan)]
    console.print(_packed(legend, "  ", console.width))


def _fills(console: Console) -> dict[Family, Text]:
    """One cell of every family: a block in its colour, or a character of its own where colours are few or none."""
    coloured = console.color_system in ("256", "truecolor") and not console.no_color
    shapes = {f: f.letter if console.options.ascii_only else "█" if coloured else f.fill for f in FAMILIES}
    return {family: Text(shape, style=family.colour) for family, shape in shapes.items()}


def _bar(
    sizes: Mapping[Family, float], scale: float, width: int, mark: int | None, fills: Mapping[Family, Text]
) -> Text:
    """`width` cells and one for the mark at the capacity, which stands before cell `mark`: at the end if all fit."""
    bar = Text()
    for family, count in zip(sizes, cells(list(sizes.values()), scale, width), strict=True):
        bar.append_text(Text(fills[family].plain * count, style=fills[family].style))
    bar.append(" " * (width - len(bar)))
    if mark is None:
        return bar
    return bar[:mark] + Text("│", style="dim" if mark == width else "bold red") + bar[mark:]


def _packed(entries: list[Text], separator: str, width: int) -> Text:
    """The entries on as few lines as they fit on, broken only between two of them."""
    lines = [Text()]
    for index, entry in enumerate(entries):
        last = index == len(entries) - 1
        if lines[-1] and lines[-1].cell_len + entry.cell_len + len(separator.rstrip()) * (not last) > width:
            lines[-1].rstrip()
            lines.append(Text())
        lines[-1].append_text(entry).append("" if last else separator)
    return Text("\n").join(lines)


def _print_peak(console: Console, plan: Plan) -> None:
    """The terms of the phase that needs most, largest first."""
    fills, phase = _fills(console), plan.peak_phase
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column()
    table.add_column(f"At the peak, {PHASES[phase]}")
    table.add_column("GiB", justify="right", no_wrap=True)
    terms = {name: size for name, size in plan.phases[phase].items() if size > 0}
    for name, size in sorted(terms.items(), key=lambda term: -term[1]):
        words, family = term_of(name)
        table.add_row(fills[family], Text(words), f"{size:.2f}" if size >= 0.005 else "<0.01")
    console.print(table, highlight=False)


def _print_facts(console: Console, plan: Plan) -> None:
    """One labelled line per fact."""
    room = console.width - len("Main memory") - 2
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, words in (
        ("ZeRO", _zero(plan)),
        *([("Products", ["tf32 of fp32"])] if plan.precision == "tf32" else []),
        ("Attention", plan.attention.split()),
        *([("Compiles", ["the", "layers;", "the", "time", "is", "that", "without"])] if plan.compiled else []),
        *([("Recomputes", _recomputes(plan))] if plan.num_gpus or plan.checkpointing else []),
        ("Batch", _batch(plan)),
        ("Trains", [f"{plan.trainable_parameters:,} parameters"]),
        ("Main memory", [*_sizes(plan.host_ram_gib, plan.host_ram), *_of_pod(plan)]),
        ("Disk", _sizes(plan.disk_gib, plan.disk)),
        ("Work", _work(plan)),
        ("Time", _time(plan)),
        ("Cost", _cost(plan)),
    ):
        table.add_row(Text(label), _packed(list(map(Text, words)), " ", room))
    console.print(table, highlight=False)


def _of_pod(plan: Plan) -> list[str]:
    """Main memory and vCPUs of a rented machine, which nobody can choose: they come with the GPUs."""
    has = [f"{plan.host_capacity_gib:.0f} GiB"] if plan.host_capacity_gib else []
    has += [f"{plan.host_cpus} vCPUs"] if plan.host_cpus else []
    return [f"(a pod has {' and '.join(has)} at least)"] if has and plan.where != "local" else []


_PROCESS = ("process", "processes")
_WHY_STAGE, _WHY_CHECKPOINTED = "deepspeed=auto", "train.gradient_checkpointing=auto"
"""Beginnings of the notes that say why something was taken (runner/plan/auto_values.py)."""


def _zero(plan: Plan) -> list[str]:
    return _with_reason(STAGES.get(plan.zero_stage, plan.zero_stage), plan, _WHY_STAGE)


def _recomputes(plan: Plan) -> list[str]:
    return _with_reason(f"{recomputed(plan.checkpointing)} of the layers in the backward pass", plan, _WHY_CHECKPOINTED)


def _with_reason(words: str, plan: Plan, beginning: str) -> list[str]:
    return "; ".join([words, *(note for note in plan.notes if note.startswith(beginning))]).split()


def _batch(plan: Plan) -> list[str]:
    micro, accumulation, batch = plan.micro_batch, plan.accumulation, plan.batch
    count, (one, many) = batch // (micro * accumulation), ("GPU", "GPUs") if plan.num_gpus else _PROCESS
    return [
        f"{micro} × {accumulation} × {count} {one if count == 1 else many} =",
        f"{batch} sequence{'s' * (batch != 1)} of {plan.max_length:,} tokens a step",
        f"(micro batch × accumulation × {many})",
    ]


def _sizes(total: float, parts: Mapping[str, float]) -> list[str]:
    """`21.0 GiB: saving 13.5, processes 7.5`."""
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shown = [f"{name.replace('_', ' ')} {gib(size)}" for name, size in largest if size >= 0.05]
    return _sum(f"{gib(total)} GiB", shown)


def _sum(total: str, parts: list[str]) -> list[str]:
    if len(parts) < 2:
        return [total]
    return [f"{total}:", *(f"{part}," for part in parts[:-1]), parts[-1]]


def _work(plan: Plan) -> list[str]:
    steps, tokens, speed = plan.num_steps, plan.tokens_total, plan.tokens_per_second
    if steps is None:
        size = ["steps not known: the size of the data is not;"]
    elif tokens is None:
        size = [f"{steps:,} step{'s' * (steps != 1)};"]
    else:
        size = [f"{steps:,} step{'s' * (steps != 1)},", f"{tokens:,} tokens;"]
    seconds = plan.step_seconds
    if speed is None or seconds is None:
        return [*size, "speed not known: no figures for this hardware"]
    step = f"{seconds:.2g} s a step" if seconds < 10 else f"{duration(seconds)} a step"
    return [*size, f"{speed:,.0f} tokens/s,", step]


def _time(plan: Plan) -> list[str]:
    if plan.hours is None:
        return [_unknown(plan)]
    parts = {_PARTS.get(name, name): 3600 * hours for name, hours in (plan.hours_parts or {}).items()}
    return _sum(duration(3600 * plan.hours), [f"{name} {duration(s)}" for name, s in parts.items() if s >= 0.5])


def _cost(plan: Plan) -> list[str]:
    if plan.usd is None:
        return [_unknown(plan) if plan.hours is None else "not known: no price for this hardware"]
    rate = [f"at ${plan.usd_per_hour:,.2f} an hour"] if plan.usd_per_hour is not None else []
    source = [f"(price: {plan.price_source})"] if plan.price_source else []
    return [f"${plan.usd:,.2f}{',' * bool(rate)}", *rate, *source]


def _unknown(plan: Plan) -> str:
    """Why there is no time."""
    missing = "the speed of this hardware" if plan.tokens_per_second is None else "the number of steps"
    return f"not known, as {missing} is not"


def _print_notes(console: Console, plan: Plan) -> None:
    """Print assumptions, then the reasons for a refusal."""
    notes = [note for note in plan.notes if not note.startswith((_WHY_STAGE, _WHY_CHECKPOINTED))]
    if notes:
        console.print()
    for note in notes:
        _hanging(console, "• ", note, "dim")
    if plan.reasons:
        console.print()
        console.print(Text("Refused", style="bold red"))
    for reason in plan.reasons:
        _hanging(console, "• ", reason, "red")


def _hanging(console: Console, bullet: str, words: str, style: str) -> None:
    """A paragraph whose further lines are indented."""
    grid = Table.grid(padding=0)
    grid.add_row(Text(bullet, style=style), Text(words, style=style))
    console.print(grid)
