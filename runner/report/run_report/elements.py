"""HTML elements whose every text is escaped: what comes from data, models and logs cannot become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from runner.report.text import without_control_sequences

VOID = ("meta", "input", "br")


class Html(str):
    """Markup that is finished; any other text is escaped where it is put into an element."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as escaped text; lone surrogates, which UTF-8 does not have, and control characters go."""
    if isinstance(value, Html):
        return value
    plain = without_control_sequences(str(value)).encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(plain, quote=True))


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """An element: `el("p", "a < b", class_="note")`. None among children and attributes is left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{words}>")
    return Html(f"<{name}{words}>{joined(children)}</{name}>")


def joined(parts: Iterable[object]) -> Html:
    """Parts one after the other, each escaped unless it is markup."""
    return Html("".join(text(part) for part in parts if part is not None))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> Html:
    """A table that scrolls by itself where the screen is narrow; columns in `numeric` are aligned right."""
    side = ["n" if place in numeric else None for place in range(len(head))]

    def line(name: str, cells: Sequence[object]) -> Html:
        scope = "col" if name == "th" else None
        return el("tr", *(el(name, c, class_=s, scope=scope) for c, s in zip(cells, side, strict=True)))

    body = [line("td", cells) for cells in rows]
    return el("div", el("table", el("thead", line("th", head)), el("tbody", *body)), class_="scroll")


def definitions(rows: Iterable[tuple[str, object]]) -> Html:
    """Names and values in two columns."""
    return el("dl", *(el("div", el("dt", name), el("dd", value)) for name, value in rows))


def section(title: str, *children: object, note: str | None = None) -> Html | None:
    """A section with its heading; None where there is nothing to show in it."""
    shown = [child for child in children if child is not None]
    if not shown:
        return None
    words = el("p", note, class_="note") if note else None
    slug = "".join(c if c.isalnum() else "-" for c in title.lower())
    return el("section", el("h2", title), words, *shown, id=f"s-{slug}")
