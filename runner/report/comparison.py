"""Comparison of runs: the keys of their specs that differ, and their results, the best by the runs' metric first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from runner.config.provenance import flattened
from runner.report.metric import direction, rank, value_of
from runner.rundir.directory import RunDir, display_path

FACTS_OF_A_CHOICE = ("model", "hw")
"""Groups whose other keys follow from `name`: with another one, a dozen facts of a catalogue file differ."""


class Result(TypedDict):
    """Result of a run; None for what it has not measured."""

    run_id: str
    """Name of its directory."""
    folder: str
    """Its directory, as typed from here."""
    state: str
    """State as in `status.json`, or `killed`."""
    metric: float | None
    """Value of the comparison's metric."""
    steps: int | None
    """Optimiser steps done."""
    loss_first: float | None
    """Training loss of the first step."""
    loss_last: float | None
    """Training loss of the last step."""
    held_out_loss_before: float | None
    """Held-out loss before training."""
    held_out_loss_after: float | None
    """Held-out loss after training; of a run without a summary the last one that was measured."""
    exact_match_before: float | None
    """Share of held-out prompts answered exactly before training."""
    exact_match_after: float | None
    """The same, after training."""
    tokens_per_second: float | None
    """Positions computed per second."""
    peak_memory_gib: float | None
    """Peak memory."""
    seconds: float | None
    """Duration so far."""
    usd: float | None
    """Cost of the pods of a rented run."""


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other, best first."""

    metric: str
    """Key of `summary.json` that they are sorted by."""
    mode: str
    """`min` or `max`: the better direction of the metric."""
    results: list[Result]
    """One per run."""
    differing: dict[str, list[Any]]
    """Keys of `spec.json` whose values differ; one value per run, `ABSENT` where its spec lacks the key."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the reader, such as runs whose own metric is another one."""

    def chosen(self) -> dict[str, list[Any]]:
        """`differing` without facts that follow from another model or other hardware."""
        renamed = [group for group in FACTS_OF_A_CHOICE if f"{group}.name" in self.differing]
        return {
            key: values
            for key, values in self.differing.items()
            if key.partition(".")[0] not in renamed or key.endswith(".name")
        }

    def as_dict(self) -> dict[str, Any]:
        """As `compare --json` prints it."""
        ids = [result["folder"] for result in self.results]
        differs = {
            key: {run: value for run, value in zip(ids, values, strict=True) if value is not ABSENT}
            for key, values in self.differing.items()
        }
        runs = [{key: _finite(value) for key, value in result.items()} for result in self.results]
        return {
            "metric": self.metric, "metric_mode": self.mode, "runs": runs, "differs": differs, "notes": self.notes,
        }  # fmt: skip


class _Absent:
    """Type of `ABSENT`."""

    def __repr__(self) -> str:
        return "–"


ABSENT = _Absent()
"""In place of a value: the run's spec does not have the key, as of another method or version."""


def compare(runs: Sequence[RunDir], metric: str | None = None) -> Comparison:
    """Compare `runs` by `metric`, or by the metric of the first one's `run.metric`."""
    specs = [run.read("spec.json") for run in runs]
    own = [_own_metric(spec) for spec in specs]
    name, mode = own[0]
    notes = []
    if metric is not None:
        mode = next((mode for name, mode in own if name == metric), direction(metric))
        name = metric
    elif others := sorted({other for other, _ in own if other != name}):
        notes.append(f"sorted by {name}; of other runs run.metric is {', '.join(others)}")
    results = [result_of(run, name) for run in runs]
    order = sorted(range(len(runs)), key=lambda place: rank(results[place]["metric"], mode))
    if all(result["metric"] is None for result in results):
        notes.append(f"no run has measured {name}: in the order given")
    differing = _differing([dict(flattened(specs[place])) for place in order])
    notes += [f"{runs[place].id} has no readable spec.json" for place in order if not specs[place]]
    return Comparison(name, mode, [results[place] for place in order], differing, notes)


def result_of(run: RunDir, metric: str) -> Result:
    """The result of a run, from its summary; of one without, as far as its metrics tell."""
    summary, status = run.summary, run.status
    lines, held = (list(run.metrics()), list(run.evals())) if not summary else ([], [])
    first, last = (lines[0], lines[-1]) if lines else ({}, {})
    train: Mapping[str, Any] = summary.get("train", {})
    measured: Mapping[str, Any] = summary.get("eval", {})
    before, after = (_object(measured.get(when)) for when in ("before", "after"))
    cost: Mapping[str, Any] = summary.get("cost") or status.get("cost") or {}
    return {
        "run_id": run.id,
        "folder": display_path(run.path),
        "state": run.state(status),
        "metric": value_of(summary, metric),
        "steps": train.get("steps", last.get("step", status.get("step"))),
        "loss_first": _number(train.get("loss_first", first.get("loss"))),
        "loss_last": _number(train.get("loss_last", last.get("loss"))),
        "held_out_loss_before": _number(before.get("loss")),
        "held_out_loss_after": _number(after.get("loss", held[-1].get("loss") if held else None)),
        "exact_match_before": _number(before.get("exact_match")),
        "exact_match_after": _number(after.get("exact_match")),
        "tokens_per_second": _number(train.get("tokens_per_second", last.get("tokens_per_second"))),
        "peak_memory_gib": _number(summary.get("peak_memory_gib", last.get("memory_gib"))),
        "seconds": _number(summary.get("seconds")) or run.spent() or None,
        "usd": _number(cost.get("usd")),
    }


def numbers_of(summary: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a summary's numbers, which are its metrics."""
    for key, value in flattened(dict(summary)):
        if _number(value) is not None:
            yield key


def _own_metric(spec: Mapping[str, Any]) -> tuple[str, str]:
    own = _object(spec.get("run"))
    metric = own.get("metric")
    metric = metric if isinstance(metric, str) and metric != "auto" else "eval.after.loss"
    mode = own.get("metric_mode")
    return metric, mode if mode in ("min", "max") else direction(metric)


def _differing(specs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Values of the keys that are not the same in all specs; one that cannot be read has no say."""
    keys = dict.fromkeys(key for spec in specs for key in spec)
    found = {key: [spec.get(key, ABSENT) for spec in specs] for key in keys}
    readable = [place for place, spec in enumerate(specs) if spec]
    return {key: values for key, values in found.items() if _differ([values[place] for place in readable])}


def _differ(values: list[Any]) -> bool:
    """JSON tells true from 1, and 1 from 1.0 only in how it was written."""
    first = values[0]
    return any((isinstance(value, bool), value) != (isinstance(first, bool), first) for value in values[1:])


def _object(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _finite(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
