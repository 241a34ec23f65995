"""Lists, page by page, as RunPod's SDK walks them: `pagination: {hasNextPage, nextCursor}`, `?cursor=…`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from runner.emulator.errors import ApiProblem


def page(name: str, entries: Sequence[Any], cursor: str | None, size: int) -> dict[str, Any]:
    """`{name: [entries of the page], "pagination": …}`; a cursor says how many came before."""
    start = _start(cursor)
    end = start + size
    more = end < len(entries)
    pagination: dict[str, Any] = {"hasNextPage": more}
    if more:
        pagination["nextCursor"] = base64.urlsafe_b64encode(f"after:{end}".encode()).decode()
    return {name: list(entries[start:end]), "pagination": pagination}


def _start(cursor: str | None) -> int:
    if not cursor:
        return 0
    try:
        return int(base64.urlsafe_b64decode(cursor).decode().removeprefix("after:"))
    except ValueError:
        raise ApiProblem(400, "invalid cursor") from None
