"""Several runs beside one another: the keys that differ, their results by the metric, and their sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.report.run_report.facts import RunFacts
from runner.report.summary import metric_of
from runner.rundir.directory import RunDir

NO_DIFFERENCE = ("run.name", "run.output_dir", "run.report")
"""Keys of a run's folder and files: they change nothing that was trained."""
MOST_KEYS_OF_A_LABEL = 3
LONGEST_LABEL = 60


def by_result(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """The best first, by the metric of the first run; those without a result last, in the order given."""
    more = runs[0].more_is_better

    def rank(facts: RunFacts) -> tuple[bool, float]:
        value = result(facts, runs[0].metric)
        return (value is None, 0.0 if value is None else -value if more else value)

    return sorted(runs, key=rank)


def result(facts: RunFacts, metric: str) -> float | None:
    """A number of a run's summary; None without one."""
    value = metric_of(facts.summary, metric)
    return value if math.isfinite(value) else None


def differing(runs: Sequence[RunFacts]) -> list[tuple[str, list[Any]]]:
    """Keys whose value is not the same in all runs, with the values run by run; None where a run has no such key."""
    rows = [{row.key: row.value for row in facts.spec_rows} for facts in runs]
    keys = dict.fromkeys(key for one in rows for key in one)
    return [
        (key, [one.get(key) for one in rows])
        for key in keys
        if key not in NO_DIFFERENCE and any(one.get(key) != rows[0].get(key) for one in rows)
    ]


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """Short names: the values that differ, where they are few and tell the runs apart; else the ends of the ids."""
    if len(runs) < 2:
        return [facts.id for facts in runs]
    found = differing(runs)
    if 0 < len(found) <= MOST_KEYS_OF_A_LABEL:
        told = [
            ", ".join(f"{key.rpartition('.')[2]} {_word(values[i])}" for key, values in found) for i in range(len(runs))
        ]
        if len(set(told)) == len(runs) and max(map(len, told)) <= LONGEST_LABEL:
            return told
    words = [facts.id.split("-") for facts in runs]
    shared = 0
    while all(len(w) > shared + 1 and w[shared] == words[0][shared] for w in words):
        shared += 1
    return ["-".join(w[shared:]) for w in words]


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep_of(runs: Sequence[RunFacts]) -> str | None:
    """The sweep that all runs are points of."""
    names = {facts.status.get("sweep") for facts in runs}
    name = names.pop() if len(names) == 1 else None
    return str(name) if name and len(runs) > 1 else None


def points_of(folder: Path) -> list[RunDir]:
    """The runs of a sweep's folder, `<output_dir>/sweeps/<id>`; empty where it is none, or has started none."""
    names = [RunDir(folder).read(file.name).get("run_id") for file in sorted(folder.glob("point-*.json"))]
    places = [folder.absolute().parent.parent / str(name) for name in names if name]
    return [RunDir(place) for place in places if place.is_dir()]
