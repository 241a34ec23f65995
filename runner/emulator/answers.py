"""Answers in the forms that RunPod sends: pages of a list, and problems (RFC 9457)."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Any, TypeVar

T = TypeVar("T")

Json = dict[str, Any]
"""A JSON object."""
MEDIA_TYPE = "application/problem+json"


class ApiProblem(Exception):
    """Ends a request with an error answer."""

    def __init__(self, status: int, detail: str, errors: list[str] | None = None, retry_after: int | None = None):
        self.status, self.detail, self.errors = status, detail, errors or []
        self.retry_after = retry_after
        super().__init__(f"{status} {detail}")

    def content(self) -> Json:
        """The body."""
        title = {422: "Unprocessable Entity"}.get(self.status) or HTTPStatus(self.status).phrase
        found: Json = {"title": title, "status": self.status, "detail": self.detail}
        return {**found, "errors": self.errors} if self.errors else found

    def headers(self) -> dict[str, str]:
        """HTTP headers."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def known(entries: Mapping[str, T], identity: str, what: str) -> T:
    """The entry of that id; ApiProblem 404 where there is none."""
    if identity not in entries:
        raise ApiProblem(404, f"{what} not found")
    return entries[identity]


def epoch(name: str, text: str) -> float:
    """Seconds since the epoch of a query parameter that is a date-time (RFC 3339); ApiProblem 422 where it is none."""
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        raise ApiProblem(422, "Request validation failed.", [f"{name}: {text!r} is not a date-time"]) from None


def page(name: str, entries: Sequence[object], cursor: str | None, size: int) -> Json:
    """`{name: [entries of the page], "pagination": …}`; a cursor says how many came before."""
    start = _start(cursor)
    end = start + size
    more = end < len(entries)
    pagination: Json = {"hasNextPage": more}
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
