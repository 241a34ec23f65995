"""Metrics of runs: the number behind a key of `summary.json`, and which of two is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from runner.rundir.directory import RunDir

HIGHER_IS_BETTER = (
    "exact_match", "num_exact", "reward", "reward_margin", "reward_accuracy", "reward_chosen", "tokens_per_second",
    "effective_tokens_per_second", "log_odds_ratio", "logps_chosen",
)  # fmt: skip
"""Last parts of metrics of which more is better, where no run's `run.metric_mode` says so."""


def value_of(summary: Mapping[str, Any], metric: str) -> float | None:
    """The number behind a dotted key of a summary; None where there is none, or NaN."""
    value: Any = summary
    for step in metric.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    return None if math.isnan(number) else number


def rank(value: float | None, mode: str) -> float:
    """Sort key of a metric's value: the best first, missing values last."""
    if value is None or math.isnan(value):
        return math.inf
    return -value if mode == "max" else value


def direction(metric: str, runs: Iterable[RunDir] = ()) -> str:
    """`min` or `max`: as the first run that is sorted by this metric says, else by the metric's name."""
    for run in runs:
        own = run.read("spec.json").get("run")
        if isinstance(own, dict) and own.get("metric") == metric and own.get("metric_mode") in ("min", "max"):
            return str(own["metric_mode"])
    name = metric.rpartition(".")[2]
    return "max" if name in HIGHER_IS_BETTER or name.startswith("reward_") else "min"
