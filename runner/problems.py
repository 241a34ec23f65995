"""pydantic's errors in a user's words: one `Problem` per key, with what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.errors import Problem
from runner.spec import RunSpec
from runner.suggest import nearest, nearest_key, parts_of

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list such as [a,b]",
    "dict": "a mapping",
    "model": "a mapping of keys",
}


def problems_of(error: ValidationError, source_of: Callable[[str], str | None]) -> list[Problem]:
    """One problem per offending key; `source_of(key)` tells where its value came from."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_key_of(detail["loc"], detail["type"] == "extra_forbidden"), []).append(detail)
    found: list[Problem] = []
    for key, details in by_key.items():
        found += _explain(key, details, source_of)
    return found


def _explain(key: str, details: list[ErrorDetails], source_of: Callable[[str], str | None]) -> list[Problem]:
    first = details[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        near = nearest_key(key)
        remedy = f"did you mean {near}?" if near and near != key else "see docs/reference.md for every key"
        return [Problem(f"unknown key {key}", source_of(key), remedy)]
    if kind == "missing":
        return [Problem(f"{key} is missing", None, f"write {key}=…")]
    if kind == "value_error":
        texts = str(first["ctx"]["error"]).split("\n")
        prefix = "" if not key or any(_names_a_key(t) for t in texts) else f"{key}={first['input']}: "
        return [_split_remedy(prefix + text, source_of(_subject(text) or key)) for text in texts]
    if kind == "union_tag_invalid":
        key, value = f"{key}.name", first["ctx"]["tag"]
        names = [n.strip("' ") for n in str(first["ctx"]["expected_tags"]).split(",")]
        return [Problem(f"{key}={value} is none of {', '.join(names)}", source_of(key), _did_you_mean(value, names))]
    expected = " or ".join(dict.fromkeys(_expected(d) for d in details))
    choices = [c for d in details if d["type"] == "literal_error" for c in _choices(d)]
    value = _shown(first["input"])
    return [Problem(f"{key}={value}: expected {expected}", source_of(key), _did_you_mean(value, choices))]


def _did_you_mean(value: Any, choices: list[str]) -> str | None:
    near = nearest(str(value), choices)
    return f"did you mean {near}?" if near else None


def _expected(detail: ErrorDetails) -> str:
    kind, ctx = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        choices = _choices(detail)
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in bounds:
        return f"{kind.replace('_', ' ').replace(' equal', ' or equal to')} {ctx[bounds[kind]]:g}".replace(
            "greater than or equal to", "at least"
        ).replace("less than or equal to", "at most")
    return _EXPECTED.get(kind.split("_")[0], detail["msg"][0].lower() + detail["msg"][1:])


def _choices(detail: ErrorDetails) -> list[str]:
    return [c.strip("' ") for c in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(",")]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _names_a_key(text: str) -> bool:
    return _subject(text) is not None


def _subject(text: str) -> str | None:
    """The dotted key a message of the schema opens with, such as `train.max_length`."""
    word = text.split(" ", 1)[0].split("=", 1)[0].rstrip(":")
    group = word.split(".", 1)[0]
    return word if "." in word and group in RunSpec.model_fields else None


def _split_remedy(text: str, source: str | None) -> Problem:
    what, _, remedy = text.partition("; ")
    return Problem(what, source, remedy or None)


def _key_of(loc: tuple[int | str, ...], unknown: bool) -> str:
    """The dotted key behind pydantic's location, without its union tags."""
    keys: list[str] = []
    parts: list[type[BaseModel]] = [RunSpec]
    for position, step in enumerate(loc):
        field = next((p.model_fields[step] for p in parts if step in p.model_fields), None)  # type: ignore[index]
        if field is not None:
            keys.append(str(step))
            parts = list(parts_of(field.annotation))
        elif unknown and position == len(loc) - 1:
            keys.append(str(step))
    return ".".join(keys)
