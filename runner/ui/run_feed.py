"""Live facts of a run, read from its directory: state, new lines of metrics, new text of its log."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import Any

from runner.config import json_text
from runner.report.text import without_control_sequences
from runner.rundir import json_files
from runner.rundir.directory import ACTIVE, RunDir
from runner.ui.safe_json import to_json

EVERY_SECONDS = 0.5
"""Between two looks at the files: 200 pages make 400 looks a second, of 0.1 ms each."""
LOG_TAIL = 64 * 1024
"""Bytes of the log that a page begins with."""
PING_SECONDS = 15.0
COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "step_seconds", "time")
RECENT = 50
"""Steps whose median duration is that of the next ones."""


@dataclass
class Tail:
    """Whole new lines of a growing file; `restarted` is True where it has become shorter."""

    run: RunDir
    name: str
    at: int = 0
    restarted: bool = False

    def read(self) -> bytes:
        """What has come since, up to the last line break."""
        file = self.run.path / self.name
        try:
            size = file.stat().st_size
            if size < self.at:
                self.at, self.restarted = 0, True
            if size == self.at:
                return b""
            with file.open("rb") as stream:
                stream.seek(self.at)
                text = stream.read()
        except OSError:
            return b""
        whole = text[: text.rfind(b"\n") + 1]
        self.at += len(whole)
        return whole


@lru_cache(32)
def _told(run_id: str, end: int, text: bytes) -> tuple[str, bool, tuple[float, ...]]:
    """Columns of lines as JSON, whether there are any, and the durations of the last steps. Cached: 200 pages that open
    a run of 10,000 steps at once would read its lines 200 times, 0.2 s each."""
    found = metric_columns(text, json_files.MetricsLine, COLUMNS)
    return to_json(found), bool(found["step"]), tuple(s for s in found["step_seconds"] if s)[-RECENT:]


def metric_columns(text: bytes, kind: type, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """JSON lines as columns; what is missing or no number is null."""
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for line in text.split(b"\n"):
        try:
            found = json_text.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            continue
        if not isinstance(found, dict) or "step" not in (right := json_files.of_type(found, kind)):
            continue
        for name in names:
            value = right.get(name)
            columns[name].append(value if isinstance(value, int | float) and math.isfinite(value) else None)
    return columns


@dataclass
class Snapshots:
    """Facts of a run, read at most twice a second however many pages look at it."""

    found: dict[str, tuple[float, dict[str, Any]]] = field(default_factory=dict)

    def of(self, run: RunDir) -> dict[str, Any]:
        """The facts, half a second old at most."""
        known = self.found.get(run.id)
        if known is None or time.monotonic() - known[0] > EVERY_SECONDS * 0.9:
            if len(self.found) > 1000:
                self.found.clear()
            known = self.found[run.id] = (time.monotonic(), snapshot(run))
        return known[1]


def snapshot(run: RunDir) -> dict[str, Any]:
    """State, step, time left, memory and cost of a run."""
    status = run.status
    state = run.state(status)
    beat = json_files.of_type(run.read("logs/rank0.json"), json_files.Heartbeat)
    active = state in ACTIVE
    phase = beat.get("phase") if active else None
    started = status.get("started") if active else None
    plan = run.read("plan.json") if active else {}
    seconds = max(0.0, time.time() - started) if started else None
    cost = dict(status.get("cost") or {})
    hourly = plan.get("usd_per_hour") if status.get("pid") is None else None  # of a pod: there is no process here
    if active and not cost and seconds and isinstance(hourly, int | float):
        cost = {"usd": hourly * seconds / 3600, "so_far": True}
    return {
        "run_id": run.id,
        "state": state,
        "active": active,
        "phase": phase,
        "step": beat.get("step") if active else status.get("step"),
        "num_steps": status.get("num_steps") or plan.get("num_steps"),
        "seconds": (seconds or 0.0) + float(status.get("spent", 0.0)) if active else run.summary.get("seconds"),
        "usd": cost.get("usd"),
        "model": status.get("model"),
        "method": status.get("method"),
        "data": status.get("data"),
        "objective": status.get("objective"),
        "created": status.get("created"),
        "error": status.get("error"),
        "has_model": (run.path / "model").is_dir(),
    }


async def events(run: RunDir, snapshots: Snapshots) -> AsyncIterator[str]:
    """Server-sent events of a run until it has ended and all is told: `state`, `metrics`, `evals`, `log`, `end`."""
    metrics, evals, log = Tail(run, "metrics.jsonl"), Tail(run, "evals.jsonl"), Tail(run, "logs/run.log")
    try:
        log.at = max(0, (run.path / log.name).stat().st_size - LOG_TAIL)
    except OSError:
        log.at = 0
    last, told = "", time.monotonic()
    steps: list[float] = []
    while True:
        facts = dict(snapshots.of(run))
        lines = metrics.read()
        columns, more, durations = _told(run.id, metrics.at, lines)
        steps = [*steps, *durations][-RECENT:]
        if facts["active"] and steps and facts["num_steps"] and facts["step"] is not None:
            facts["left_seconds"] = max(0, facts["num_steps"] - facts["step"]) * median(steps)
        if (text := to_json(facts)) != last:
            last, told = text, time.monotonic()
            yield event("state", text)
        if metrics.restarted:
            metrics.restarted = False
            yield event("restart", "{}")
        if more:
            told = time.monotonic()
            yield event("metrics", columns)
        losses = metric_columns(evals.read(), json_files.EvalLine, ("step", "loss"))
        if losses["step"]:
            yield event("evals", to_json(losses))
        if said := log.read():
            yield event("log", to_json(without_control_sequences(said.decode("utf-8", errors="replace"))))
        if not facts["active"]:
            yield event("end", to_json({"state": facts["state"]}))
            return
        if time.monotonic() - told > PING_SECONDS:
            told = time.monotonic()
            yield ": alive\n\n"
        await asyncio.sleep(EVERY_SECONDS)


def event(name: str, text: str) -> str:
    """One server-sent event; the text is one line of JSON."""
    return f"event: {name}\ndata: {text}\n\n"
