"""Errors of past runs' plans against what was measured, and a correction for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runner.report.text import ascii_fallback, counted, duration
from runner.rundir.directory import all_runs

MEASURES = {"peak_gib": "memory", "tokens_per_second": "speed", "seconds": "time"}
"""Predicted measures, by their key in the part `plan` of `summary.json`, and in a word."""
CLOSE = 0.10
"""A median error up to this is called right: what a choice between two GPUs can bear. An assumption."""
MANY = 10
"""Times too much, from which a percentage says nothing."""
ENOUGH = 3
"""Runs from which a median is worth more than an anecdote."""


class Pair(TypedDict):
    """A figure of the plan beside the measurement; `error` is predicted / measured - 1."""

    predicted: float | None
    measured: float | None
    error: float | None


@dataclass(frozen=True)
class RunAccuracy:
    """A finished run with a plan."""

    run_id: str
    model: str
    method: str
    hw: str
    measures: dict[str, Pair]

    def as_dict(self) -> dict[str, object]:
        """For JSON: each measure beside the other keys."""
        named = {"run_id": self.run_id, "model": self.model, "method": self.method, "hw": self.hw}
        return {**named, **self.measures}


@dataclass(frozen=True)
class GroupAccuracy:
    """Runs of one method on one hardware: how many, and the median error of each measure."""

    method: str
    hw: str
    count: int
    medians: dict[str, float | None]

    def as_dict(self) -> dict[str, object]:
        """For JSON: each median beside the other keys."""
        return {"method": self.method, "hw": self.hw, "count": self.count, **self.medians}


@dataclass(frozen=True)
class Calibration:
    """Runs, oldest first; medians by method and hardware; and what to believe, in a sentence."""

    runs: list[RunAccuracy]
    groups: list[GroupAccuracy]
    says: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        rows = [row.as_dict() for row in self.runs]
        return {"runs": rows, "groups": [group.as_dict() for group in self.groups], "says": self.says}


def calibration(output_dir: Path) -> Calibration:
    """Every finished run below `output_dir` that has a plan. Errors are positive where too much was predicted."""
    rows = list(_rows(output_dir))
    return Calibration(rows, _groups(rows), verdict(rows, output_dir))


def _rows(output_dir: Path) -> Iterator[RunAccuracy]:
    for run in all_runs(output_dir):
        summary = run.summary
        planned = summary.get("plan")
        if not planned:
            continue
        hw = summary["hw"]
        device = planned.get("device")
        # `local` and `cuda` name no hardware
        named = f"{hw} ({device})" if device and hw in ("local", "cuda") else hw
        measures = {
            key: Pair(predicted=pair["predicted"], measured=pair["measured"], error=pair["error"])
            for key, pair in ((key, planned[key]) for key in MEASURES)
        }
        yield RunAccuracy(run.id, summary["model"], summary["method"], named, measures)


def _groups(rows: list[RunAccuracy]) -> list[GroupAccuracy]:
    found = []
    for method, hw in sorted({(row.method, row.hw) for row in rows}):
        mine = [row for row in rows if (row.method, row.hw) == (method, hw)]
        found.append(GroupAccuracy(method, hw, len(mine), {key: _median(mine, key) for key in MEASURES}))
    return found


def _median(rows: list[RunAccuracy], key: str) -> float | None:
    errors = [error for row in rows if (error := row.measures[key]["error"]) is not None]
    return round(median(errors), 4) if errors else None


def verdict(rows: list[RunAccuracy], output_dir: Path) -> str:
    """One sentence: what to believe, hardware by hardware; with no runs, how to get one."""
    if not rows:
        return f"No finished run in {output_dir} has a plan beside its measurements yet. Start one: python -m runner"
    return "; ".join(_verdict(hw, [row for row in rows if row.hw == hw]) for hw in sorted({row.hw for row in rows}))


def _verdict(hw: str, rows: list[RunAccuracy]) -> str:
    """`On local (CPU), 4 runs: believe time (±6%); memory is 1.7 × what the plan says`."""
    right, wrong = [], []
    for key, word in MEASURES.items():
        ratios = [
            pair["measured"] / pair["predicted"]
            for pair in (row.measures[key] for row in rows)
            if pair["error"] is not None and pair["measured"] is not None and pair["predicted"] is not None
        ]
        error = _median(rows, key)
        if error is None or not ratios:
            continue
        if abs(error) <= CLOSE:
            right.append(f"{word} ({error:+.0%})")
        else:
            wrong.append(f"{word} is {median(ratios):.2g} × what the plan says")
    few = " (few to go by)" if len(rows) < ENOUGH else ""
    parts = [f"believe {' and '.join(right)}"] if right else []
    parts += [", ".join(wrong)] if wrong else []
    return (
        f"On {hw}, by the median of {counted(len(rows), 'run')}{few}: {', but '.join(parts) or 'nothing was predicted'}"
    )


def print_calibration(console: Console, found: Calibration) -> None:
    """The table of runs, the medians below it, and the sentence."""
    with ascii_fallback(console):
        if found.runs:
            console.print(_wide(found.runs) if console.width >= 120 else _narrow(found.runs))
            console.print()
            console.print(_table_of_groups(found.groups))
            console.print()
        console.print(escape(found.says), highlight=False, soft_wrap=True)


_FORMS: dict[str, Callable[[float], str]] = {
    "peak_gib": "{:.2f}".format,
    "tokens_per_second": "{:,.0f}".format,
    "seconds": duration,
}
_HEADS = {"peak_gib": "peak GiB", "tokens_per_second": "tokens/s", "seconds": "time"}


def _wide(rows: list[RunAccuracy]) -> Table:
    """Predicted → measured, and the error."""
    table = _table("run", "hardware", right=[name for head in _HEADS.values() for name in (head, "error")])
    for row in rows:
        cells = []
        for key, pair in row.measures.items():
            cells += [f"{_said(key, pair['predicted'])} → {_said(key, pair['measured'])}", _share(pair["error"])]
        table.add_row(escape(row.run_id), escape(row.hw), *cells)
    return table


def _narrow(rows: list[RunAccuracy]) -> Table:
    """Measured, and the error of the plan; the run's id has model and method in it."""
    table = _table("run", right=[f"{head} (error)" for head in _HEADS.values()])
    for row in rows:
        cells = (f"{_said(key, pair['measured'])} ({_share(pair['error'])})" for key, pair in row.measures.items())
        table.add_row(escape(row.run_id), *cells)
    return table


def _table_of_groups(groups: list[GroupAccuracy]) -> Table:
    table = _table("method", "hardware", right=["runs", *(f"median error of {word}" for word in MEASURES.values())])
    for group in groups:
        errors = map(_share, group.medians.values())
        table.add_row(group.method, escape(group.hw), str(group.count), *errors)
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
