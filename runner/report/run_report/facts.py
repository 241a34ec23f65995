"""What a report tells of one run, read from its directory: whatever is missing or damaged is left out and named."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

from runner.config import json_text
from runner.config.provenance import flattened
from runner.report.run_report.curves import Curve, held_out_curves, not_finite, training_curves
from runner.report.summary import metric_of
from runner.report.text import without_control_sequences
from runner.rundir.directory import ACTIVE, RunDir, display_path, text_of

ORIGINS = "origins.json"
"""Where each value of the spec came from: written by `runner.runs.origins`."""
MOST_ANSWERS = 200
"""Held-out prompts on the page."""
LOG_LINES = 60
"""Last lines of the log, of a run that is not done."""
BETTER_IS_MORE = ("exact_match", "num_exact", "reward", "reward_margin", "reward_accuracy", "reward_chosen")
NEEDED = ("spec.json", "status.json", "metrics.jsonl")


@dataclass(frozen=True)
class AnswerPair:
    """A held-out prompt, and what the model said before and after training."""

    prompt: str
    expected: str | None
    before: str | None
    after: str | None
    right_before: bool | None
    """None where nothing is expected, or it was not answered."""
    right_after: bool | None


@dataclass(frozen=True)
class SpecRow:
    """A key of the run, its value, and the place that set it."""

    key: str
    value: Any
    place: str
    """Empty where it was not recorded."""


@dataclass(frozen=True)
class RunFacts:
    """One run, as a report tells it."""

    run: RunDir
    state: str
    status: Mapping[str, Any]
    summary: Mapping[str, Any]
    spec: Mapping[str, Any]
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]
    training: dict[str, Curve]
    held_out: dict[str, Curve]
    answers: list[AnswerPair]
    spec_rows: list[SpecRow]
    typed: list[str]
    """Words of the command line that started it."""
    log: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The name of its directory."""
        return self.run.id

    @property
    def running(self) -> bool:
        """It is at work now."""
        return self.state in ACTIVE

    @property
    def seconds(self) -> float | None:
        """Duration, over all its starts."""
        return _number(self.summary.get("seconds")) or self.run.spent() or None

    @property
    def step(self) -> int | None:
        """Optimiser steps done."""
        steps = [steps[-1] for steps, _ in self.training.values() if steps]
        return max(steps) if steps else self.status.get("step")

    @property
    def cost_usd(self) -> float | None:
        """What it has cost; None on a machine of one's own."""
        return _number(part(self.status, "cost").get("usd"))

    @property
    def metric(self) -> str:
        """The key by which it is compared with others."""
        name = part(self.spec, "run").get("metric")
        return name if isinstance(name, str) and name != "auto" else "eval.after.loss"

    @property
    def more_is_better(self) -> bool:
        """The direction of the metric."""
        return part(self.spec, "run").get("metric_mode") == "max"

    @property
    def metric_value(self) -> float | None:
        """The metric; None for a run without a summary, or without that number."""
        value = metric_of(self.summary, self.metric)
        return value if math.isfinite(value) else None

    def name_of(self, group: str) -> str:
        """The choice of a group, such as `model`, as text."""
        value = part(self.spec, group).get("name") or self.status.get(group)
        return str(value) if value else "–"

    @property
    def data_name(self) -> str:
        """The data set, or the path of the file."""
        return str(self.status.get("data") or self.name_of("data"))

    @property
    def repeat(self) -> str:
        """The command that runs the same again."""
        return f"python -m runner {quote(display_path(self.run.spec_file))}"


def part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping in a mapping; empty where it is none."""
    found = content.get(name)
    return found if isinstance(found, Mapping) else {}


def gather(run: RunDir) -> RunFacts:
    """Read a run's directory, whatever state it is in."""
    status, summary, spec, origins = run.status, run.summary, run.read("spec.json"), run.read(ORIGINS)
    state, training = run.state(status), training_curves(run)
    typed = origins.get("typed")
    return RunFacts(
        run=run,
        state=state,
        status=status,
        summary=summary,
        spec=spec,
        plan=run.read("plan.json"),
        environment=run.read("environment.json"),
        training=training,
        held_out=held_out_curves(run),
        answers=_answers(run),
        spec_rows=_spec_rows(spec, part(origins, "places")),
        typed=[str(word) for word in typed] if isinstance(typed, list) else [],
        log=_log(run) if state != "done" else [],
        notes=_notes(run, state, training),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _spec_rows(spec: Mapping[str, Any], places: Mapping[str, Any]) -> list[SpecRow]:
    return [SpecRow(key, value, str(places.get(key, ""))) for key, value in flattened(dict(spec))]


def _notes(run: RunDir, state: str, training: Mapping[str, Curve]) -> list[str]:
    """What a reader has to know of the numbers."""
    found = []
    needed = NEEDED[:2] if state in ACTIVE else NEEDED  # the first step is yet to come
    missing = [name for name in needed if not (run.path / name).is_file()]
    if missing:
        found.append(f"Missing from the run's directory, so left out here: {', '.join(missing)}.")
    resumes = run.read("resumes.json").get("resumes")
    if isinstance(resumes, list) and resumes:
        after = [str(one.get("after_step")) for one in resumes if isinstance(one, dict)]
        found.append(f"Resumed {len(resumes)} times, after step {', '.join(after)}; steps done again count once.")
    if skipped := run.read("rewinds.json").get("count"):
        found.append(f"Rewound to a checkpoint {skipped} times after a loss spike.")
    for name in ("loss", "grad_norm"):
        if name in training and (steps := not_finite(training[name])):
            more = ", …" if len(steps) > 5 else ""
            found.append(f"{name} is not finite at {len(steps)} steps: {', '.join(map(str, steps[:5]))}{more}.")
    if state in ACTIVE:
        found.append(f"The run is going on: this is its state at {time.strftime('%Y-%m-%d %H:%M:%S')}.")
    return found


def _log(run: RunDir) -> list[str]:
    lines = text_of(run.path / "logs" / "run.log").splitlines()[-LOG_LINES:]
    trace = text_of(run.path / "logs" / "traceback.txt").splitlines()[-LOG_LINES:]
    return [without_control_sequences(line) for line in [*lines, *(["", *trace] if trace else [])]]


def _answers(run: RunDir) -> list[AnswerPair]:
    """Both files hold the same prompts in the same order; either may be missing, or cut short."""
    before, after = (_rows(run, when) for when in ("before", "after"))
    pairs = []
    for number in range(max(len(before), len(after))):
        then = before[number] if number < len(before) else {}
        now = after[number] if number < len(after) else {}
        if then and now and then.get("prompt") != now.get("prompt"):
            then = {}  # of other rows: the data were changed by a resume
        row = now or then
        pairs.append(
            AnswerPair(
                str(row.get("prompt", "")), _text(row.get("expected")), _text(then.get("answer")),
                _text(now.get("answer")), _right(then), _right(now),
            )
        )  # fmt: skip
    return pairs


def _rows(run: RunDir, when: str) -> list[dict[str, Any]]:
    return [json_text.object_of(line) for line in text_of(run.path / f"answers_{when}.jsonl").splitlines() if line]


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _right(row: Mapping[str, Any]) -> bool | None:
    exact = row.get("exact")
    return exact if isinstance(exact, bool) and row.get("expected") is not None else None
