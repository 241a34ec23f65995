"""Errors of past runs' plans against what was measured, and a correction for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runner.report.text import ascii_fallback, duration
from runner.rundir.directory import all_runs

MEASURES = {"peak_gib": "memory", "tokens_per_second": "speed", "seconds": "time"}
"""Predicted measures, by their key in the part `plan` of `summary.json`, and in a word."""
CLOSE = 0.10
"""A median error up to this is called right: what a choice between two GPUs can bear. An assumption."""
MANY = 10
"""Times too much, from which a percentage says nothing."""
ENOUGH = 3
"""Runs from which a median is worth more than an anecdote."""


def calibration(output_dir: Path) -> dict[str, Any]:
    """`runs`: one row per finished run with a plan, oldest first; `groups`: medians by method and hardware; `says`.

    Errors are predicted / measured - 1: positive where too much was predicted.
    """
    rows = list(_rows(output_dir))
    return {"runs": rows, "groups": _groups(rows), "says": verdict(rows, output_dir)}


def _rows(output_dir: Path) -> Iterator[dict[str, Any]]:
    for run in all_runs(output_dir):
        summary = run.summary
        planned = summary.get("plan")
        if not planned:
            continue
        hw = summary["hw"]
        device = planned.get("device")
        yield {
            "run_id": run.id,
            "model": summary["model"],
            "method": summary["method"],
            # `local` and `cuda` name no hardware
            "hw": f"{hw} ({device})" if device and hw in ("local", "cuda") else hw,
            **{key: {k: planned[key][k] for k in ("predicted", "measured", "error")} for key in MEASURES},
        }


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs of one method on one hardware: how many, and the median error of each measure."""
    names = sorted({(row["method"], row["hw"]) for row in rows})
    found = []
    for method, hw in names:
        mine = [row for row in rows if (row["method"], row["hw"]) == (method, hw)]
        medians = {key: _median(mine, key) for key in MEASURES}
        found.append({"method": method, "hw": hw, "count": len(mine), **medians})
    return found


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    errors = [row[key]["error"] for row in rows if row[key]["error"] is not None]
    return round(median(errors), 4) if errors else None


def verdict(rows: list[dict[str, Any]], output_dir: Path) -> str:
    """One sentence: what to believe, hardware by hardware; with no runs, how to get one."""
    if not rows:
        return f"No finished run in {output_dir} has a plan beside its measurements yet. Start one: python -m runner"
    return "; ".join(_verdict(hw, [row for row in rows if row["hw"] == hw]) for hw in sorted({r["hw"] for r in rows}))


def _verdict(hw: str, rows: list[dict[str, Any]]) -> str:
    """`On local (CPU), 4 runs: believe time (±6%); memory is 1.7 × what the plan says`."""
    right, wrong = [], []
    for key, word in MEASURES.items():
        ratios = [r[key]["measured"] / r[key]["predicted"] for r in rows if r[key]["error"] is not None]
        error = _median(rows, key)
        if error is None or not ratios:
            continue
        if abs(error) <= CLOSE:
            right.append(f"{word} ({error:+.0%})")
        else:
            wrong.append(f"{word} is {median(ratios):.2g} × what the plan says")
    few = " (few to go by)" if len(rows) < ENOUGH else ""
    count = f"{len(rows)} run{'s' if len(rows) > 1 else ''}"
    parts = [f"believe {' and '.join(right)}"] if right else []
    parts += [", ".join(wrong)] if wrong else []
    return f"On {hw}, by the median of {count}{few}: {', but '.join(parts) or 'nothing was predicted'}"


def print_calibration(console: Console, found: Mapping[str, Any]) -> None:
    """The table of runs, the medians below it, and the sentence."""
    with ascii_fallback(console):
        if found["runs"]:
            console.print(_wide(found["runs"]) if console.width >= 120 else _narrow(found["runs"]))
            console.print()
            console.print(_table_of_groups(found["groups"]))
            console.print()
        console.print(escape(found["says"]), highlight=False, soft_wrap=True)


_FORMS: dict[str, Callable[[float], str]] = {
    "peak_gib": "{:.2f}".format,
    "tokens_per_second": "{:,.0f}".format,
    "seconds": duration,
}
_HEADS = {"peak_gib": "peak GiB", "tokens_per_second": "tokens/s", "seconds": "time"}


def _wide(rows: list[dict[str, Any]]) -> Table:
    """Predicted → measured, and the error."""
    table = _table("run", "hardware", right=[name for head in _HEADS.values() for name in (head, "error")])
    for row in rows:
        cells = []
        for key in MEASURES:
            cells += [f"{_said(key, row[key]['predicted'])} → {_said(key, row[key]['measured'])}"]
            cells += [_share(row[key]["error"])]
        table.add_row(escape(row["run_id"]), escape(row["hw"]), *cells)
    return table


def _narrow(rows: list[dict[str, Any]]) -> Table:
    """Measured, and the error of the plan; the run's id has model and method in it."""
    table = _table("run", right=[f"{head} (error)" for head in _HEADS.values()])
    for row in rows:
        cells = (f"{_said(key, row[key]['measured'])} ({_share(row[key]['error'])})" for key in MEASURES)
        table.add_row(escape(row["run_id"]), *cells)
    return table


def _table_of_groups(groups: list[dict[str, Any]]) -> Table:
    table = _table("method", "hardware", right=["runs", *(f"median error of {word}" for word in MEASURES.values())])
    for group in groups:
        errors = (_share(group[key]) for key in MEASURES)
        table.add_row(group["method"], escape(group["hw"]), str(group["count"]), *errors)
    return table


def _table(*left: str, right: list[str]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True)  # to be copied
    for name in right:
        table.add_column(name, justify="right")
    return table


def _said(key: str, value: float | None) -> str:
    return "–" if value is None else _FORMS[key](value)


def _share(error: float | None) -> str:
    """`+7%`; from ten times too much on `×714`, which one can read."""
    if error is None:
        return "–"
    return f"×{error + 1:,.0f}" if error >= MANY - 1 else f"{error:+.0%}"
