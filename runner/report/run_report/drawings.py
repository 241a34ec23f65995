"""Drawings of the report as SVG: bars of planned and measured figures, and a sweep's parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from runner.report.run_report.elements import Html, el
from runner.report.run_report.figures import Comparison, number

WIDTH, HEIGHT, MARGIN, TOP = 1000, 300, 70, 34
WIDE_RANGE = 20.0
"""Largest through smallest value from which an axis is logarithmic."""


def bars(rows: Sequence[Comparison]) -> Html | None:
    """Planned (outline) and measured (filled) memory by phase, on one scale."""
    shown = [row for row in rows if row.planned.endswith("GiB") or row.measured.endswith("GiB")]
    highest = max((max(r.planned_number or 0.0, r.measured_number or 0.0) for r in shown), default=0.0)
    if not highest:
        return None
    scale, lines = 100 / highest, []
    for row in shown:
        rects = []
        if row.measured_number is not None:
            rects.append(el("rect", x=0, y=2, width=f"{row.measured_number * scale:.2f}", height=8, class_="measured"))
        if row.planned_number is not None:
            rects.append(el("rect", x=0, y=0, width=f"{row.planned_number * scale:.2f}", height=12, class_="planned"))
        drawn = el("svg", *rects, viewBox="0 0 100 12", preserveAspectRatio="none", aria_hidden="true")
        lines.append(
            el(
                "div",
                el("span", row.name),
                drawn,
                el("span", f"{row.planned} → {row.measured}", class_="n"),
                class_="bar",
            )
        )
    return el("div", *lines, class_="bars")


class Point(NamedTuple):
    """A run of a sweep: its values on each axis, None where it has none."""

    label: str
    values: list[Any]
    best: bool


def parallel_coordinates(axes: Sequence[str], points: Sequence[Point]) -> Html | None:
    """A line per run through its values on vertical axes, the last of which is the metric; the best run stands out."""
    if len(axes) < 2 or not points:
        return None
    gap = (WIDTH - 2 * MARGIN) / (len(axes) - 1)
    drawn: list[Html] = []
    ticks: list[Html] = []
    scales = [_Axis([point.values[i] for point in points]) for i in range(len(axes))]
    for place, (name, scale) in enumerate(zip(axes, scales, strict=True)):
        x = MARGIN + place * gap
        drawn.append(el("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - TOP, class_="axis"))
        drawn.append(
            el("text", name.rpartition(".")[2].replace("_", " "), x=x, y=16, text_anchor="middle", class_="name")
        )
        for label, height in scale.ticks():
            ticks.append(el("text", label, x=x + 6, y=f"{height + 4:.1f}", class_="tick"))
    for point in sorted(points, key=lambda p: p.best):
        at = [(MARGIN + i * gap, scales[i].height(v)) for i, v in enumerate(point.values) if v is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        shown = el(
            "title", f"{point.label}: " + ", ".join(f"{a} {_label(v)}" for a, v in zip(axes, point.values, strict=True))
        )
        drawn.append(el("polyline", shown, points=path, class_="best" if point.best else "run"))
    title = f"Parallel coordinates of {len(points)} runs"
    svg = el("svg", *drawn, *ticks, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title, class_="parallel")
    return el("div", svg, class_="scroll")


class _Axis:
    """The scale of an axis: linear, logarithmic over a wide range, or one place for each value that is no number."""

    def __init__(self, values: Sequence[Any]) -> None:
        known = [v for v in values if v is not None]
        self.names = None if all(_is_number(v) for v in known) else sorted({_label(v) for v in known})
        numbers = [float(v) for v in known if _is_number(v)]
        self.low, self.high = min(numbers, default=0.0), max(numbers, default=0.0)
        self.log = self.low > 0 and self.high / self.low > WIDE_RANGE

    def height(self, value: Any) -> float:
        if self.names is not None:
            share = (self.names.index(_label(value)) + 0.5) / len(self.names)
        elif self.high == self.low:
            share = 0.5
        elif self.log:
            share = math.log(float(value) / self.low) / math.log(self.high / self.low)
        else:
            share = (float(value) - self.low) / (self.high - self.low)
        return HEIGHT - TOP - share * (HEIGHT - 2 * TOP)

    def ticks(self) -> list[tuple[str, float]]:
        if self.names is not None:
            return [(name[:24], self.height(name)) for name in self.names[:12]]
        return [(number(v), self.height(v)) for v in dict.fromkeys((self.low, self.high))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _label(value: Any) -> str:
    return number(value) if _is_number(value) else "–" if value is None else str(value)
