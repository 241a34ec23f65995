"""The report as JSON: the same facts for other programs; a number that is not finite is null."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from runner.report.run_report import comparison, figures
from runner.report.run_report.curves import rounded, thinned
from runner.report.run_report.facts import RunFacts


def as_json(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """`runs`, best first, with `metric`; of several also `differs` and, of a sweep, `sweep` and `best`."""
    ordered = comparison.by_result(runs) if len(runs) > 1 else list(runs)
    metric = ordered[0].metric
    content: dict[str, Any] = {"metric": metric, "runs": [_run(facts, metric) for facts in ordered]}
    if len(ordered) > 1:
        content["differs"] = {
            key: {facts.id: value for facts, value in zip(ordered, values, strict=True)}
            for key, values in comparison.differing(ordered)
        }
        content["sweep"] = comparison.sweep_of(ordered)
        content["best"] = ordered[0].id if comparison.result(ordered[0], metric) is not None else None
    found: dict[str, Any] = finite(content)
    return found


def _run(facts: RunFacts, metric: str) -> dict[str, Any]:
    return {
        "run_id": facts.id,
        "state": facts.state,
        "error": facts.status.get("error"),
        "result": comparison.result(facts, metric),
        "headline": dict(figures.headline(facts)),
        "seconds": facts.seconds,
        "usd": facts.cost_usd,
        "step": facts.step,
        "notes": facts.notes,
        "held_out": [change._asdict() for change in figures.changes(facts)],
        "plan": [row._asdict() for row in figures.comparisons(facts)],
        "answers": [vars(pair) for pair in facts.answers],
        "curves": {name: rounded(thinned(curve)) for name, curve in facts.training.items()},
        "held_out_curves": {name: rounded(thinned(curve)) for name, curve in facts.held_out.items()},
        "spec": {row.key: {"value": row.value, "place": row.place or None} for row in facts.spec_rows},
        "environment": facts.environment,
        "repeat": facts.repeat,
        "typed": facts.typed,
    }


def finite(content: Any) -> Any:
    """The content without NaN and infinities, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
