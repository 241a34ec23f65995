"""How old each kept result and price is: days, and commits since that touched what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date

from benchmarks.bench import ROOT, Benchmark, git
from runner.config.conf_files import load_choice, options

MOST_DAYS = 60
MOST_COMMITS = 100
"""About two weeks of this project's work: more of it, and nobody knows whether a figure still holds."""
MOST_PRICE_DAYS = 120


@dataclass(frozen=True)
class Age:
    """One result's."""

    name: str
    measured: date
    days: int
    commits: int | None
    """That touched what it measures, since; None where git does not tell (no clone, or a shallow one)."""

    @property
    def old(self) -> bool:
        """It has to be measured again before a release."""
        return self.days > MOST_DAYS or (self.commits or 0) > MOST_COMMITS

    def __str__(self) -> str:
        commits = "commits unknown" if self.commits is None else f"{self.commits} commits"
        remedy = f": python -m benchmarks {self.name}" if self.old else ""
        return f"{self.name}: measured {self.measured}, {self.days} days and {commits} ago{remedy}"


def ages(benchmarks: Iterable[Benchmark], today: date | None = None) -> Iterator[Age]:
    """Of all results that are kept. One without a commit of its own counts from the commit that brought it."""
    shallow = git("rev-parse", "--is-shallow-repository") != "false"
    for benchmark in benchmarks:
        if not benchmark.file.is_file():
            continue
        result = json.loads(benchmark.file.read_text("utf-8"))
        measured = date.fromisoformat(result["date"])
        file = benchmark.file.relative_to(ROOT).as_posix()
        commit = None if shallow else result.get("commit") or git("log", "-1", "--format=%h", "--", file)
        count = git("rev-list", "--count", f"{commit}..HEAD", "--", *benchmark.measures) if commit else None
        days = ((today or date.today()) - measured).days
        yield Age(benchmark.name, measured, days, None if count is None else int(count))


@dataclass(frozen=True)
class PriceAge:
    """That of the price of one hardware profile, from `price_date`: a day, then where it is from."""

    name: str
    written: str
    days: int

    @property
    def old(self) -> bool:
        """It has to be looked up again before a release."""
        return self.days > MOST_PRICE_DAYS

    def __str__(self) -> str:
        remedy = f": look it up again in conf/hw/{self.name}.yaml" if self.old else ""
        return f"{self.name}: price of {self.written}, {self.days} days ago{remedy}"


def prices(today: date | None = None) -> Iterator[PriceAge]:
    """Of all profiles that have a price.

    Raises:
        ValueError: a price without a day and a source.
    """
    for name in options("hw"):
        values = load_choice("hw", name)
        if not values.get("usd_per_hour"):
            continue
        day, _, source = str(values.get("price_date") or "").partition(", ")
        if not source:
            raise ValueError(f"conf/hw/{name}.yaml: price_date needs a day and a source, as `2026-11-09, runpod.io`")
        yield PriceAge(name, f"{day}, {source}", ((today or date.today()) - date.fromisoformat(day)).days)
