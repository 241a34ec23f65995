"""Curves of a run: the numbers of `metrics.jsonl` and `evals.jsonl` over the steps, thinned to what a screen shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from runner.rundir.directory import RunDir

Curve = tuple[list[int], list[float | None]]
"""Steps and values; None where the value is not finite."""

TITLES = {
    "loss": ("Loss", ""),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "tokens_per_second": ("Throughput", "tokens/s"),
    "memory_gib": ("Memory", "GiB"),
}
"""The curves of every run, in order, with their units; an objective's own follow."""
NOT_DRAWN = ("step", "epoch", "time", "step_seconds", "effective_tokens_per_second", "skipped")
MOST_OF_A_CURVE = 2000
"""Points of a curve that are kept at most: about one for each pixel of a wide screen."""
MOST_OF_A_PAGE = 14_000
"""Points of all curves together: about 200 kB of the page."""
LEAST_OF_A_CURVE = 60
"""Points of a curve that are kept in any case, of 60 runs on one page, say."""
MOST_OWN = 12
"""Curves of an objective's own metrics."""


def training_curves(run: RunDir) -> dict[str, Curve]:
    """Every number of `metrics.jsonl` by its name, those of `TITLES` first."""
    found = _curves(run.metrics())
    own = [name for name in found if name not in TITLES]
    return {name: found[name] for name in (*TITLES, *own[:MOST_OWN]) if name in found}


def held_out_curves(run: RunDir) -> dict[str, Curve]:
    """Every number of `evals.jsonl` by its name."""
    return _curves(run.evals())


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """By name. A step that stands there twice, in a run that was killed and went on, counts as it came last."""
    by_step: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        if type(step := line.get("step")) is int:
            by_step[step] = line
    curves: dict[str, Curve] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name not in NOT_DRAWN and type(value) in (int, float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(value) if math.isfinite(value) else None)
    return curves


def not_finite(curve: Curve) -> list[int]:
    """Steps whose value is NaN or infinite."""
    return [step for step, value in zip(*curve, strict=True) if value is None]


def thinned(curve: Curve, most: int = MOST_OF_A_CURVE) -> Curve:
    """At most `most` points: the lowest and the highest of each stretch, so that no spike is lost, and one that is not
    finite, so that the gap stays."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    stretches = max(1, (most - 2) // 2)
    kept: set[int] = {0, len(steps) - 1}
    for number in range(stretches):
        stretch = range(number * len(steps) // stretches, (number + 1) * len(steps) // stretches)
        finite = [i for i in stretch if values[i] is not None]
        if finite:
            kept |= {min(finite, key=lambda i: values[i] or 0.0), max(finite, key=lambda i: values[i] or 0.0)}
        if len(finite) < len(stretch) and len(finite) < 2:
            kept.add(next(i for i in stretch if values[i] is None))
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def of_a_page(curves: Sequence[Curve]) -> int:
    """Points that each of the curves of one page may have."""
    long = sum(len(steps) > LEAST_OF_A_CURVE for steps, _ in curves)
    return max(LEAST_OF_A_CURVE, min(MOST_OF_A_CURVE, MOST_OF_A_PAGE // max(1, long)))


def rounded(curve: Curve) -> list[list[float | None]]:
    """For JSON: five significant digits."""
    steps, values = curve
    return [list(steps), [None if value is None else float(f"{value:.5g}") for value in values]]
