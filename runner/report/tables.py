"""Tables for people; every one has the same content in JSON behind `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from runner.provenance import Origin
from runner.report.summary import duration, metric_of
from runner.rundir import all_runs
from runner.spec import RunSpec


def headline(spec: RunSpec, where: str) -> str:
    """What is about to run, in three lines."""
    train, hw = spec.train, spec.hw
    machine = f"{hw.num_gpus} × {hw.gpu or hw.name}" if hw.accelerator == "cuda" else f"CPU, {hw.num_cpus} cores"
    size = f", {spec.model.num_parameters / 1e9:,.2f} B parameters" if spec.model.num_parameters else ""
    return (
        f"Run     [bold]{where}[/bold]\n"
        f"Model   {spec.model.title or spec.model.id} ({spec.model.name}{size}) with {spec.method.name}, {spec.data.name} data\n"
        f"On      {machine}, {train.precision}, batch {train.batch_size} × {train.max_length} tokens, "
        f"learning rate {train.learning_rate:g}"
    )


def print_origins(console: Console, key: str, value: Any, final: Any, places: list[Origin]) -> None:
    """The value of a key and the places that set it, the deciding one last."""
    console.print(f"[bold]{key}[/bold] = {final}", highlight=False)
    if not places:
        console.print("  default in the schema (runner/spec.py); nothing sets it", highlight=False)
    for place in places:
        shown = place.value if not place.key.endswith(key) or place.key == key else f"{place.key}={place.value}"
        label = shown if place.key == key else f"{place.key} = {place.value}"
        console.print(f"  {place.place}  [dim]{label}[/dim]", highlight=False)
    if final != value:
        console.print(f"  then derived from the hardware: {value} → {final}", highlight=False)


def run_rows(output_dir: Path) -> list[dict[str, Any]]:
    """One row per run below `output_dir`, oldest first."""
    rows = []
    for run in all_runs(output_dir):
        status, summary = run.read("status.json"), run.read("summary.json")
        last: dict[str, Any] = {}
        for last in run.metrics():
            pass
        started, updated = status.get("started"), status.get("updated")
        rows.append(
            {
                "run_id": run.id,
                "state": run.state(),
                "model": status.get("model"),
                "method": status.get("method"),
                "step": last.get("step"),
                "num_steps": status.get("num_steps"),
                "loss": last.get("loss"),
                "exact_match": summary.get("eval", {}).get("after", {}).get("exact_match"),
                "seconds": summary.get("seconds") or (updated - started if started and updated else None),
                "created": status.get("created"),
                "error": status.get("error"),
            }
        )
    return rows


_STATE_STYLE = {"done": "green", "failed": "red", "killed": "red", "interrupted": "yellow"}


def print_runs(console: Console, rows: list[dict[str, Any]], output_dir: Path) -> None:
    """The table of past runs, the newest last."""
    if not rows:
        console.print(f"No runs in {output_dir} yet. Start one: [bold]python -m runner[/bold]", highlight=False)
        return
    table = Table(box=None, header_style="bold")
    for name, justify in (("run", "left"), ("state", "left"), ("model", "left"), ("method", "left"),
                          ("steps", "right"), ("loss", "right"), ("exact", "right"), ("time", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        style = _STATE_STYLE.get(row["state"], "cyan")
        table.add_row(
            row["run_id"],
            f"[{style}]{row['state']}[/{style}]",
            row["model"] or "",
            row["method"] or "",
            str(row["step"] or "–"),
            f"{row['loss']:.4f}" if row["loss"] is not None else "–",
            f"{row['exact_match']:.0%}" if row["exact_match"] is not None else "–",
            duration(row["seconds"]) if row["seconds"] else "–",
        )
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


__all__ = ["headline", "metric_of", "print_origins", "print_runs", "print_sweep", "run_rows"]
