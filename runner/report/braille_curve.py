"""Curve of numbers in text: braille dots, two by four in a character, or asterisks where there is no Unicode.

Of its own making: plotext is a compiled wheel for x86-64 of 0.5 MB, and this is all of it that a curve needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of a dot by row and column within a character, from U+2800 on (Unicode, Braille Patterns)."""
LOG_FROM = 20.0
"""Largest over smallest value from which the scale is logarithmic, as in loss.png."""

Points = Sequence[tuple[float, float]]
"""Steps, in ascending order, and values."""


def curve(points: Points, width: int, height: int, *, plain: bool = False) -> list[str]:
    """Lines of a plot of `width` by `height` characters, axes included; empty without a finite value.

    Of several points in one column of dots the mean is drawn; gaps are joined by a line.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return []
    values = [y for _, y in points]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > LOG_FROM
    labels = [_label(high), _label(low)]
    margin = max(map(len, labels))
    columns, rows = max(4, width - margin - 2), max(2, height - 1)
    across, down = (1, 1) if plain else (2, 4)
    scaled = [(x, math.log(y) if logarithmic else y) for x, y in points]
    dots = _dots(scaled, columns * across, rows * down)
    drawn = _plain(dots, columns, rows) if plain else _braille(dots, columns, rows)
    axis = "|" if plain else "│"
    shown = {0: labels[0], rows - 1: labels[1]} if low < high else {rows // 2: labels[0]}
    lines = [f"{shown.get(row, '').rjust(margin)} {axis}{text}".rstrip() for row, text in enumerate(drawn)]
    return [*lines, _below(points, margin, columns, logarithmic)]


def _dots(points: Points, columns: int, rows: int) -> set[tuple[int, int]]:
    """Dots that are set, as column and row from the top."""
    first, last = points[0][0], points[-1][0]
    low, high = min(y for _, y in points), max(y for _, y in points)
    sums: dict[int, tuple[float, int]] = {}
    for x, y in points:
        column = round((x - first) / (last - first) * (columns - 1)) if last > first else 0
        total, count = sums.get(column, (0.0, 0))
        sums[column] = total + y, count + 1
    dots: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    for column, (total, count) in sorted(sums.items()):
        share = (total / count - low) / (high - low) if high > low else 0.5
        here = column, min(rows - 1, max(0, round((1 - share) * (rows - 1))))
        dots |= _line(before or here, here)
        before = here
    return dots


def _line(start: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    shares = (step / length for step in range(length + 1))
    return {(round(start[0] + s * (end[0] - start[0])), round(start[1] + s * (end[1] - start[1]))) for s in shares}


def _braille(dots: set[tuple[int, int]], columns: int, rows: int) -> list[str]:
    cells = [[0] * columns for _ in range(rows)]
    for column, row in dots:
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    return ["".join(chr(0x2800 + bits) if bits else " " for bits in line) for line in cells]


def _plain(dots: set[tuple[int, int]], columns: int, rows: int) -> list[str]:
    return ["".join("*" if (column, row) in dots else " " for column in range(columns)) for row in range(rows)]


def _below(points: Points, margin: int, columns: int, logarithmic: bool) -> str:
    first, last = f"{points[0][0]:.0f}", f"{points[-1][0]:.0f}"
    middle = "step, log scale" if logarithmic else "step"
    room = columns - len(first) - len(last)
    if room < len(middle) + 2:
        middle = ""
    return f"{' ' * (margin + 2)}{first}{middle.center(max(1, room))}{last}".rstrip()


def _label(value: float) -> str:
    return f"{value:.4g}"
