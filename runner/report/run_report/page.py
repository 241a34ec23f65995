"""The report as one HTML page: no network, every text escaped, and scripts allowed by their hash alone."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.paths import VENDOR
from runner.report.run_report import comparison, curves, figures
from runner.report.run_report.drawings import Point, bars, parallel_coordinates
from runner.report.run_report.elements import Html, definitions, el, joined, section, table, text
from runner.report.run_report.facts import MOST_ANSWERS, AnswerPair, RunFacts, SpecRow, part

OWN = Path(__file__).parent
LONGEST = 2000
"""Characters of a prompt or an answer that are shown."""
ROWS_OF_A_COMPARISON = 60
"""Runs whose curves are drawn over one another; the tables have all."""
MOST_AXES = 8


def page(runs: Sequence[RunFacts]) -> str:
    """The page of one run, or of several side by side."""
    runs = comparison.by_result(runs) if len(runs) > 1 else list(runs)
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    title = runs[0].id if len(runs) == 1 else f"{len(runs)} runs"
    style = _file(VENDOR / "uplot" / "uPlot.min.css") + _file(OWN / "report.css")
    scripts = [_file(VENDOR / "uplot" / "uPlot.iife.min.js"), _file(OWN / "report.js")]
    allowed = f"style-src {_hash(style)}; script-src {' '.join(map(_hash, scripts))}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    data = el("script", Html(_embedded(_data(runs))), type="application/json", id="data")
    code = joined(el("script", Html(script)) for script in scripts)
    main = el("main", *[part for part in body if part is not None])
    foot = el("footer", "Made by ", el("code", "python -m runner report"), ". This file needs no network.")
    return f"<!doctype html>\n{el('html', head, el('body', main, foot, data, code), lang='en')}\n"


def _file(file: Path) -> str:
    return file.read_text("utf-8")


def _hash(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _embedded(content: object) -> str:
    """JSON that no text in it can end: `<` is written as its escape."""
    plain = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(runs: Sequence[RunFacts]) -> dict[str, Any]:
    drawn = runs[:ROWS_OF_A_COMPARISON]
    names = list(dict.fromkeys(name for facts in drawn for name in (*facts.training, *facts.held_out)))
    names.sort(key=lambda name: list(curves.TITLES).index(name) if name in curves.TITLES else len(curves.TITLES))
    every = [curve for facts in drawn for curve in (*facts.training.values(), *facts.held_out.values())]
    most = curves.of_a_page(every)
    lines = [
        {
            "label": label,
            "train": {name: curves.rounded(curves.thinned(c, most)) for name, c in facts.training.items()},
            "held": {name: curves.rounded(curves.thinned(c, most)) for name, c in facts.held_out.items()},
        }
        for label, facts in zip(comparison.labels(drawn), drawn, strict=True)
    ]
    charts = []
    for name in names[: len(curves.TITLES) + curves.MOST_OWN]:
        title, unit = curves.TITLES.get(name, (name.replace("_", " ").capitalize(), ""))
        charts.append({"key": name, "title": title, "unit": unit})
    return {"charts": charts, "runs": lines}


def _one(facts: RunFacts) -> list[Html | None]:
    subject = f"{facts.name_of('model')} · {facts.name_of('method')} · {Path(facts.data_name).name}"
    return [
        el("header", el("p", facts.id, class_="id"), el("h1", subject), _state(facts)),
        _problem(facts),
        *(el("p", note, class_="note") for note in facts.notes),
        _results(facts),
        definitions(figures.headline(facts)),
        _curves(facts.training or facts.held_out),
        _changes(facts),
        _answers(facts.answers),
        _plan(facts),
        section("Data", _definitions(figures.data_statistics(facts))),
        _repeat(facts),
        _settings(facts.spec_rows),
        section("Environment", _definitions(figures.environment(facts))),
        section("End of the log", el("pre", "\n".join(facts.log))) if facts.log else None,
    ]


def _definitions(rows: Sequence[tuple[str, str]]) -> Html | None:
    return definitions(rows) if rows else None


def _state(facts: RunFacts) -> Html:
    kind = "good" if facts.state == "done" else "going" if facts.running else "bad"
    return el("span", facts.state, class_=f"state {kind}")


def _problem(facts: RunFacts) -> Html | None:
    error = facts.status.get("error")
    if not error or facts.state == "done":
        return None
    return el("p", error, class_="problem", dir="auto")


def _results(facts: RunFacts) -> Html | None:
    """The held-out metrics in large figures, else the loss."""
    tiles = []
    for change in figures.changes(facts)[:3]:
        mark = {True: "better", False: "worse", None: ""}[change.better]
        tiles.append(_tile(change.name, change.before, change.after, mark))
    train = part(facts.summary, "train")
    if "loss_first" in train and len(tiles) < 4:
        tiles.append(
            _tile("Training loss", figures.number(train["loss_first"]), figures.number(train["loss_last"]), "")
        )
    return el("div", *tiles, class_="tiles") if tiles else None


def _tile(name: str, before: str, after: str, mark: str) -> Html:
    shown = [el("span", before, class_="before"), " → "] if before != "–" else []
    return el(
        "div",
        el("span", name, class_="name"),
        el("span", *shown, el("b", after), class_="value"),
        class_=f"tile {mark}",
    )


def _curves(known: object) -> Html | None:
    if not known:
        return section("Curves", el("p", "No step was finished, so there is nothing to draw yet.", class_="note"))
    smoothing = el(
        "label",
        "Smoothing ",
        el("input", type="range", id="smoothing", min="0", max="100", value="35"),
        el("output", id="smoothed"),
    )
    log = el("label", el("input", type="checkbox", id="log"), " Logarithmic")
    reset = el("button", "Whole run", type="button", id="reset")
    hint = el("span", "Drag to zoom, double-click for the whole run.", class_="hint")
    return section(
        "Curves",
        el("div", smoothing, log, reset, hint, class_="controls"),
        el("div", id="charts"),
        el("noscript", el("p", "The curves need JavaScript; everything else is here without it.", class_="note")),
    )


def _changes(facts: RunFacts) -> Html | None:
    rows = [[change.name, change.before, change.after, _verdict(change)] for change in figures.changes(facts)]
    return section(
        "Held-out rows, before and after", table(["", "before", "after", "change"], rows, (1, 2, 3)) if rows else None
    )


def _verdict(change: figures.Change) -> Html:
    mark = {True: "better", False: "worse", None: None}[change.better]
    words = f" {mark}" if mark else ""
    return el("span", f"{change.change}{words}", class_=mark)


def _answers(pairs: Sequence[AnswerPair]) -> Html | None:
    if not pairs:
        return None
    shown = [_answer(pair) for pair in pairs[:MOST_ANSWERS]]
    options = [
        el("option", words, value=value)
        for value, words in (
            ("all", "All"), ("better", "Became right"), ("wrong", "Wrong after training"), ("worse", "Became wrong"),
        )
    ]  # fmt: skip
    choice = el("label", "Show ", el("select", *options, id="which"))
    left = len(pairs) - len(shown)
    note = f"{left} more are in answers_before.jsonl and answers_after.jsonl." if left > 0 else None
    count = el("output", f"{len(shown)} prompts", id="counted")
    return section(
        "Answers, before and after",
        el("div", choice, count, class_="controls"),
        el("div", *shown, id="answers"),
        note=note,
    )


def _answer(pair: AnswerPair) -> Html:
    became = "all"
    if pair.right_after is not None:
        became = "right" if pair.right_after else "wrong"
        if pair.right_before is not None and pair.right_before != pair.right_after:
            became = "better" if pair.right_after else "wrong worse"
    expected = _said("Expected", pair.expected, None) if pair.expected is not None else None
    return el(
        "article",
        el("p", _short(pair.prompt), class_="prompt", dir="auto"),
        el(
            "div",
            _said("Before", pair.before, pair.right_before),
            _said("After", pair.after, pair.right_after),
            class_="pair",
        ),
        None if pair.right_after else expected,
        data_became=became,
    )


def _said(title: str, answer: str | None, right: bool | None) -> Html:
    mark = {True: ("✓ right", "better"), False: ("✗ wrong", "worse"), None: ("", None)}[right]
    words = _short(answer) if answer else ("(empty)" if answer is not None else "(not answered)")
    head = el("span", title, " ", el("span", mark[0], class_=mark[1]), class_="name")
    return el("div", head, el("p", words, dir="auto", class_=None if answer else "none"), class_="said")


def _short(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} … ({len(words) - LONGEST:,} more characters)"


def _plan(facts: RunFacts) -> Html | None:
    rows = figures.comparisons(facts)
    if not rows:
        return None
    head = ["", "planned", "measured", "planned / measured − 1"]
    listed = table(head, [[r.name, r.planned, r.measured, r.error] for r in rows], (1, 2, 3))
    drawn = bars(rows)
    note = "Bars: measured memory; outlines: the plan." if drawn else None
    return section("Plan beside measured", drawn, listed, note=note)


def _repeat(facts: RunFacts) -> Html:
    typed = [el("p", "As it was typed:"), el("pre", figures.typed(facts))] if facts.typed else []
    return section("Repeat it", el("pre", facts.repeat), *typed) or Html("")


def _settings(rows: Sequence[SpecRow]) -> Html | None:
    """The spec as YAML, each line with the place that set it; the values that somebody chose first."""
    if not rows:
        return None
    places = any(row.place for row in rows)
    note = None if places else "Where the values came from was not recorded with this run."
    lines: list[object] = []
    open_: list[str] = []
    for row in rows:
        *groups, name = row.key.split(".")
        same = 0
        while same < min(len(groups), len(open_)) and groups[same] == open_[same]:
            same += 1
        for depth in range(same, len(groups)):
            lines.append(el("div", el("span", "  " * depth + f"{groups[depth]}:", class_="key")))
        open_ = groups
        written = json.dumps(row.value, ensure_ascii=False)
        chosen = "chosen" if row.place not in ("", "default") else None
        code = el("span", el("span", "  " * len(groups) + f"{name}: ", class_="key"), written)
        lines.append(el("div", code, el("span", row.place, class_="place") if row.place else None, class_=chosen))
    default = sum(row.place == "default" for row in rows)
    hide = (
        el("label", el("input", type="checkbox", id="chosen"), f" Without the {default} defaults") if default else None
    )
    yaml = el("div", *lines, class_="yaml")
    folded = el(
        "details", el("summary", f"{len(rows)} keys, as YAML"), hide, yaml, open_="" if len(rows) < 40 else None
    )
    return section("Settings", folded, note=note)


def _several(runs: Sequence[RunFacts]) -> list[Html | None]:
    labels, metric, best = comparison.labels(runs), runs[0].metric, runs[0]
    sweep, found = comparison.sweep_of(runs), comparison.differing(runs)
    value = comparison.result(best, metric)
    about = (
        f"Best by {metric}: {labels[0]}, {figures.number(value)}" if value is not None else f"No run has {metric} yet"
    )
    tile = _tile(metric, "–", figures.number(value), "better") if value is not None else None
    note = None
    if len(runs) > ROWS_OF_A_COMPARISON:
        note = f"The curves are those of the best {ROWS_OF_A_COMPARISON}; the tables have all {len(runs)} runs."
    drawn = _parallel(runs, labels, found, metric) if sweep else None
    known = any(facts.training or facts.held_out for facts in runs)
    return [
        el("header", el("p", sweep or "comparison", class_="id"), el("h1", f"{len(runs)} runs"), el("p", about)),
        el("div", tile, class_="tiles") if tile else None,
        section("Parallel coordinates", drawn),
        section("Results", _result_table(runs, labels, metric), note=note),
        section("What differs", _difference_table(labels, found)),
        _curves(known),
        _repeat(best) if value is not None else None,
    ]


def _parallel(
    runs: Sequence[RunFacts], labels: Sequence[str], found: Sequence[tuple[str, list[Any]]], metric: str
) -> Html | None:
    """The first keys that differ, and the metric, of every run."""
    shown, points = found[:MOST_AXES], []
    for place, (label, facts) in enumerate(zip(labels, runs, strict=True)):
        value = comparison.result(facts, metric)
        best = place == 0 and value is not None
        points.append(Point(label, [*(values[place] for _, values in shown), value], best))
    return parallel_coordinates([*(key for key, _ in shown), metric], points)


def _result_table(runs: Sequence[RunFacts], labels: Sequence[str], metric: str) -> Html:
    rows = []
    for label, facts in zip(labels, runs, strict=True):
        train, took = part(facts.summary, "train"), dict(figures.headline(facts))
        name = el("span", el("span", class_="swatch"), label, title=facts.id)
        value = figures.number(comparison.result(facts, metric))
        last = figures.number(train.get("loss_last"))
        rows.append([name, _state(facts), value, last, took.get("Steps", "–"), took.get("Time", "–"), took["Cost"]])
    return table(["run", "state", metric, "last loss", "steps", "time", "cost"], rows, (2, 3, 4, 5, 6))


def _difference_table(labels: Sequence[str], found: Sequence[tuple[str, list[Any]]]) -> Html:
    if not found:
        return el("p", "No key differs: the runs have the same settings.", class_="note")
    keys = [key for key, _ in found]
    rows = [[label, *(_value(values[i]) for _, values in found)] for i, label in enumerate(labels)]
    return table(["run", *keys], rows)


def _value(value: Any) -> Html:
    return text("–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
