"""Filters and orders of the list of runs, as `runs` takes them on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import get_args

from runner.errors import Problem, RequestError
from runner.report.metric import rank
from runner.report.run_list import RunRow
from runner.rundir.json_files import State

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
COLUMNS = tuple(RunRow.__annotations__)
"""What `--sort` takes."""


@dataclass(frozen=True)
class RunFilter:
    """Conditions that a run must meet, all of them; of several values of one kind any."""

    states: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """Names, or patterns such as `llama*`."""
    methods: tuple[str, ...] = ()
    since: float | None = None
    """Unix time of the earliest creation."""
    text: str | None = None
    """Part of its id, model, method, objective, data or error, in any case."""

    def matching(self, rows: list[RunRow]) -> list[RunRow]:
        """The rows that meet all conditions, in the same order."""
        return [row for row in rows if self._meets(row)]

    def _meets(self, row: RunRow) -> bool:
        told = (row["run_id"], row["model"], row["method"], row["objective"], row["data"], row["error"])
        return (
            (not self.states or row["state"] in self.states)
            and _any_like(row["model"], self.models)
            and _any_like(row["method"], self.methods)
            and (self.since is None or (row["created"] or 0.0) >= self.since)
            and (self.text is None or self.text.casefold() in " ".join(str(t) for t in told if t).casefold())
        )

    def check(self) -> None:
        """RequestError for a state that no run can be in."""
        known = (*get_args(State), "unknown")
        problems = [
            Problem(f"--state {state}: no run is ever in it", "command line", f"one of {', '.join(known)}")
            for state in self.states
            if state not in known
        ]
        if problems:
            raise RequestError(*problems)

    def why_none(self, rows: list[RunRow]) -> Iterator[str]:
        """For filters that leave no row: the values that runs have."""
        for column, asked in (("state", self.states), ("model", self.models), ("method", self.methods)):
            if asked:
                there = sorted({str(row.get(column)) for row in rows if row.get(column)})
                yield f"--{column} {' '.join(asked)}: runs have {', '.join(there) or 'none'}"
        if self.since is not None:
            yield f"--since {datetime.fromtimestamp(self.since):%Y-%m-%d %H:%M}"
        if self.text is not None:
            yield f"--text {self.text}"


def moment(words: str, now: datetime) -> float:
    """`2h`, `7d` or `2026-11-30` (with `T12:00`) as a Unix time; RequestError for anything else."""
    if found := re.fullmatch(r"(\d{1,6}(?:\.\d+)?)\s*([mhdw])", words.strip()):
        return (now - timedelta(**{_UNITS[found[2]]: float(found[1])})).timestamp()
    try:
        return datetime.fromisoformat(words.strip()).timestamp()
    except (ValueError, OverflowError, OSError):
        remedy = "write --since 2h, 7d, 2w, or a date such as " + f"{now:%Y-%m-%d}"
        raise RequestError(Problem(f"--since {words} is no time", "command line", remedy)) from None


def ordered(rows: list[RunRow], column: str, reverse: bool) -> list[RunRow]:
    """Rows by a column, the smallest first, or with `reverse` the largest; those without a value last."""
    having = [row for row in rows if row.get(column) is not None]
    having.sort(key=lambda row: _key(row.get(column)), reverse=reverse)
    return having + [row for row in rows if row.get(column) is None]


def best_first(rows: list[RunRow], mode: str) -> list[RunRow]:
    """Rows by their `metric`, the best first."""
    return sorted(rows, key=lambda row: rank(row.get("metric"), mode))


def _key(value: object) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, int | float) else (0.0, str(value).casefold())


def _any_like(value: str | None, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(str(value or "").lower(), pattern.lower()) for pattern in patterns)
