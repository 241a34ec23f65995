"""The report as Markdown, for a pull request or an issue: figures and tables, no curves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from runner.report.run_report import comparison, figures
from runner.report.run_report.facts import RunFacts
from runner.report.text import without_control_sequences

MOST_ANSWERS = 5


def markdown(runs: Sequence[RunFacts]) -> str:
    """One run, or several side by side."""
    parts = _one(runs[0]) if len(runs) == 1 else _several(comparison.by_result(runs))
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(value: object) -> str:
    """A text in which nothing is markup: no tag, link, mention or end of a cell."""
    plain = " ".join(without_control_sequences(str(value)).encode("utf-8", "replace").decode().split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#])|(?<!\w)_|_(?!\w)", lambda found: "\\" + found[0], plain).replace("@", "@\u200b")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]], numeric: bool = True) -> str:
    listed = [[escaped(cell) for cell in row] for row in rows]
    side = ["---", *(["---:" if numeric else "---"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in ([escaped(h) for h in head], side, *listed))


def _code(words: str) -> str:
    return f"```sh\n{words.replace('```', '` ` `')}\n```"


def _one(facts: RunFacts) -> list[str]:
    parts = [f"### {escaped(facts.id)}: {facts.state}"]
    if facts.status.get("error") and facts.state != "done":
        parts.append(f"> {escaped(facts.status['error'])}")
    parts += [f"> {escaped(note)}" for note in facts.notes]
    parts.append(_table(["", ""], figures.headline(facts), numeric=False))
    if changes := figures.changes(facts):
        rows = [(c.name, c.before, c.after, c.change) for c in changes]
        parts += ["**Held out**", _table(["", "before", "after", "change"], rows)]
    if rows := [(r.name, r.planned, r.measured, r.error) for r in figures.comparisons(facts)]:
        parts += ["**Plan**", _table(["", "planned", "measured", "error"], rows)]
    shown = [pair for pair in facts.answers if pair.after is not None][:MOST_ANSWERS]
    if shown:
        marks = {True: "✓", False: "✗", None: ""}
        cells = [
            (
                p.prompt[:200],
                f"{marks[p.right_before]} {(p.before or '–')[:200]}",
                f"{marks[p.right_after]} {(p.after or '–')[:200]}",
            )
            for p in shown
        ]
        title = f"**Answers** ({len(shown)} of {len(facts.answers)})"
        parts += [title, _table(["prompt", "before", "after"], cells, numeric=False)]
    return [*parts, "Repeat it:", _code(facts.repeat)]


def _several(runs: Sequence[RunFacts]) -> list[str]:
    labels, metric = comparison.labels(runs), runs[0].metric
    rows = []
    for label, facts in zip(labels, runs, strict=True):
        known = dict(figures.headline(facts))
        value = figures.number(comparison.result(facts, metric))
        rows.append((label, facts.state, value, known.get("Steps", "–"), known.get("Time", "–"), known["Cost"]))
    parts = [f"### {len(runs)} runs, by {escaped(metric)}"]
    parts.append(_table(["run", "state", metric, "steps", "time", "cost"], rows))
    if found := comparison.differing(runs):
        cells = [[label, *(_value(values[i]) for _, values in found)] for i, label in enumerate(labels)]
        parts += ["**What differs**", _table(["run", *(key for key, _ in found)], cells, numeric=False)]
    return parts


def _value(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
