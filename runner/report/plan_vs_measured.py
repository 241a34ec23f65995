"""Predicted memory and time beside the measured: the part `plan` of `summary.json`. Sizes in GiB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.plan.memory import COLLECTIVES, CONTEXT, GIB

TRAINING = ("forward", "backward", "step")
"""Phases of a plan that are measured as one."""


def beside_plan(
    plan: Mapping[str, Any], peaks: Mapping[str, Any], tokens_per_second: float, seconds: float | None
) -> dict[str, Any]:
    """Predicted, measured, and `error` = predicted / measured - 1, for memory, speed and time (None: not measured).

    `peaks` is `runner.train.memory_stats.Peaks.as_dict`. On a GPU torch's allocator sees its own memory only: what it
    reserved is compared with the plan less its terms `process` and `collectives`, what it allocated with the plan
    less `allocator_slack` as well.
    """
    on_gpu = peaks["reserved"] is not None
    hours = plan["hours"]
    found: dict[str, Any] = {
        "peak_gib": _peak(plan, peaks, on_gpu),
        "phases": _phases(plan, peaks["phases"], on_gpu),
        "tokens_per_second": pair(plan["tokens_per_second"], tokens_per_second),
        "seconds": pair(None if hours is None else hours * 3600, seconds),
    }
    if on_gpu:
        terms = plan["phases"][plan["peak_phase"]]
        found["outside_gib"] = pair(_outside(terms), peaks["outside"])
        found["host_ram_gib"] = pair(plan["host_ram_gib"], peaks["resident"])
    return found


def pair(predicted: float | None, measured: float | None) -> dict[str, float | None]:
    """Two numbers and how far the first is from the second; positive where too much was predicted."""
    known = predicted is not None and measured
    error = round(predicted / measured - 1, 4) if known and predicted is not None and measured else None
    return {"predicted": _rounded(predicted), "measured": _rounded(measured), "error": error}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _peak(plan: Mapping[str, Any], peaks: Mapping[str, Any], on_gpu: bool) -> dict[str, float | None]:
    total = plan["peak_gib"]
    if not on_gpu:
        return {**pair(total["expected"], peaks["resident"]), "low": total["low"], "high": total["high"]}
    terms = plan["phases"][plan["peak_phase"]]
    predicted = sum(terms.values()) - _outside(terms)
    several = "collectives" in terms
    low, high = (
        total[case] - (CONTEXT[case] + (COLLECTIVES[case] if several else 0.0)) / GIB for case in ("low", "high")
    )
    allocated = pair(predicted - terms.get("allocator_slack", 0.0), peaks["allocated"])
    return {
        **pair(predicted, peaks["reserved"]),
        "low": _rounded(low),
        "high": _rounded(high),
        **{f"{name}_allocated": value for name, value in allocated.items()},
    }


def _outside(terms: Mapping[str, float]) -> float:
    return terms.get("process", 0.0) + terms.get("collectives", 0.0)


def _phases(plan: Mapping[str, Any], measured: Mapping[str, float], on_gpu: bool) -> dict[str, dict[str, float | None]]:
    """Phase by phase; the passes of training as one."""
    sums = {name: sum(terms.values()) - on_gpu * _outside(terms) for name, terms in plan["phases"].items()}
    sums["train"] = max(sums[name] for name in TRAINING)
    return {name: pair(sums.get(name), size) for name, size in measured.items()}
