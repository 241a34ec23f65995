"""Tables for people; every one has the same content in JSON behind `--json`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from runner.config.provenance import Origin, flattened
from runner.plan.plan import Plan
from runner.report.text import counted, duration
from runner.spec import RunSpec


def headline(spec: RunSpec, where: str) -> str:
    """The run that is about to start, in three lines."""
    train, hw = spec.train, spec.hw
    machine = f"{hw.num_gpus} × {hw.gpu or hw.name}" if hw.accelerator == "cuda" else f"CPU, {hw.num_cpus} cores"
    size = f", {spec.model.num_parameters / 1e9:,.2f} B parameters" if spec.model.num_parameters else ""
    compiled = ", compiled layers" if train.compile is True else ""
    model = f"{spec.model.title or spec.model.id}{size} ({spec.model.name})"
    return (
        f"Run     [bold]{escape(where)}[/bold]\n"
        f"Model   {escape(model)}, {spec.method.label}, {spec.data.name} data\n"
        f"On      {machine}, {train.arithmetic}, {train.attention} attention{compiled}, "
        f"batch {train.batch_size} × {train.max_length} tokens, learning rate {train.learning_rate:g}"
    )


def in_one_line(plan: Plan) -> str:
    """A plan for somebody who is about to wait for the run."""
    capacity = f" of {plan.capacity_gib:.1f}" if plan.capacity_gib else ""
    parts = [f"{plan.peak_gib['expected']:.1f}{capacity} GiB at the peak ({plan.peak_phase})"]
    if plan.zero_stage != "none":
        parts.append(plan.zero_stage)
    parts.append(counted(plan.num_steps, "step") if plan.num_steps else "as many steps as the data has")
    if plan.hours is not None:
        parts.append(f"about {duration(plan.hours * 3600)}")
    if plan.usd is not None:
        parts.append(f"${plan.usd:.2f}")
    return ", ".join(parts)


def print_origins(console: Console, key: str, value: object, final: object, places: list[Origin]) -> None:
    """The value of a key and the places that set it, the deciding one last; for a group, one line per key."""
    if isinstance(final, dict) and final:
        _print_group(console, key, value, final, places)
        return
    console.print(Text.assemble((key, "bold"), f" = {final}"), soft_wrap=True)
    if not places:
        console.print(f"  {_DEFAULT}", highlight=False)
    for place in places:
        label = place.value if place.key == key else f"{place.key} = {place.value}"
        console.print(Text.assemble(f"  {place.place}  ", (str(label), "dim")), soft_wrap=True)
    if final != value:
        console.print(f"  then {derived_from(key)}: {value} → {final}", highlight=False, markup=False)


_DEFAULT = "default in the schema (runner/spec/); nothing sets it"
_FROM = {"run": "the objective", "model": "its config.json", "where": "the plan"}
"""What decides the open values of a group, where it is not the hardware."""


def derived_from(key: str) -> str:
    """What decided a value that was open when it was composed."""
    return f"derived from {_FROM.get(key.partition('.')[0], 'the hardware')}"


def _print_group(console: Console, group: str, value: Any, final: dict[str, Any], places: list[Origin]) -> None:
    composed = dict(flattened(value, f"{group}."))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for column in range(3):  # a key or a line number that is cut in two is of no use
        table.add_column(overflow="fold", no_wrap=column != 1)
    for key, decided in flattened(final, f"{group}."):
        setting = [place.place for place in places if place.concerns(key)]
        where = derived_from(key) if decided != composed.get(key) else (setting or ["default"])[-1]
        table.add_row(Text(key), Text(str(decided)), Text(where, style="dim"))
    console.print(table)


def print_sweep(console: Console, rows: list[dict[str, Any]], metric: str, where: str) -> None:
    """The points of a sweep, best first."""
    varied = _varied(rows)
    table = Table(box=None, header_style="bold", title=f"Sweep by {metric}", title_justify="left")
    for name in (*varied, metric, "result", "run"):
        table.add_column(name, overflow="fold")
    for row in rows:
        values = dict(o.split("=", 1) for o in row["overrides"] if "=" in o)
        result = "[green]done[/green]" if row["exit_code"] == 0 else f"[red]{row.get('error') or 'failed'}[/red]"
        number = f"{row['metric']:.4f}" if row["metric"] is not None else "–"
        table.add_row(*(values.get(k, "") for k in varied), number, result, row["run_id"] or "–")
    console.print()
    console.print(table)
    console.print(f"\nAll of it: {where}/sweep.json", highlight=False)


def _varied(rows: list[dict[str, Any]]) -> list[str]:
    """Keys whose value differs between points."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for override in row["overrides"]:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1] or list(values)
