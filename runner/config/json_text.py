"""JSON of others: parsed, or refused with one kind of error."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100
"""Levels of nesting. Rows of the Hub have about 8; a recursive walk of some hundred ends in a RecursionError."""


def loads(text: str | bytes, **how: Any) -> Any:
    """As `json.loads`. JSONDecodeError also for text that is nested too deeply or has a number of over 4,300 digits:
    Python's parser raises other errors there."""
    try:
        found = json.loads(text, **how)
    except RecursionError:
        raise _refused(text, f"nested deeper than {DEEPEST} levels") from None
    except ValueError as error:
        if "set_int_max_str_digits" not in str(error):  # of a hook, say
            raise
        raise _refused(text, "a number of more than 4,300 digits") from None
    if _brackets(text) > DEEPEST and _is_deep(found):
        raise _refused(text, f"nested deeper than {DEEPEST} levels")
    return found


def object_of(text: str | bytes) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    try:
        found = loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class RepeatedKeyError(ValueError):
    """A key that occurs twice in one object: all but the last of its values would be ignored."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` that raises RepeatedKeyError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKeyError(f"the key {repeated(pairs)!r} occurs twice")
    return found


def repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first key that stands there more than once."""
    keys = [key for key, _ in pairs]
    return next(key for key in keys if keys.count(key) > 1)


def _refused(text: str | bytes, what: str) -> json.JSONDecodeError:
    return json.JSONDecodeError(what, text if isinstance(text, str) else text.decode("utf-8", "replace"), 0)


def _brackets(text: str | bytes) -> int:
    return text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")


def _is_deep(value: object) -> bool:
    """Level by level: 50 ns a value."""
    level = [value]
    for _ in range(DEEPEST):
        parts = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [inner for part in parts for inner in part if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True
