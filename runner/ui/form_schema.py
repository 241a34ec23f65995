"""The form: every key of the schema with its kind, its words, its bounds, its default and the sentence under it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, TypedDict

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from runner.config import conf_files
from runner.config.field_sentences import meaning
from runner.config.schema_keys import parts_of
from runner.spec import RunSpec


class Field(TypedDict):
    """A key as the form shows it."""

    key: str
    kind: Literal["choice", "number", "text"]
    words: list[str]
    """Words allowed for it: all of a `choice`, or beside a number or a text."""
    optional: bool
    """It may be null."""
    default: Any
    sentence: str
    bounds: dict[str, float]
    """`ge`, `gt`, `le`, `lt`."""


class Section(TypedDict):
    """A group of keys."""

    group: str
    sentence: str
    fields: list[Field]


@cache
def form() -> list[Section]:
    """All sections, in the order of the schema. Keys of a group that has variants are there once."""
    return [_section(name, field) for name, field in RunSpec.model_fields.items()]


def _section(group: str, field: FieldInfo) -> Section:
    found: dict[str, Field] = {}
    for part in parts_of(field.annotation):
        for name, inner in part.model_fields.items():
            if name in ("aliases", "title") or (name == "name" and group in conf_files.GROUPS):
                continue  # a choice's own names; which choice it is stands above the form
            one = _field(f"{group}.{name}", part, name, inner)
            if (known := found.setdefault(one["key"], one)) is not one:
                known["words"] = list(dict.fromkeys([*known["words"], *one["words"]]))
    return {"group": group, "sentence": meaning(RunSpec, group), "fields": list(found.values())}


def _field(key: str, part: type[BaseModel], name: str, field: FieldInfo) -> Field:
    kinds = list(_leaves(field.annotation))
    words = [word for kind in kinds for word in _words(kind)]
    rest = [kind for kind in kinds if kind is not type(None) and kind is not bool and not _words(kind)]
    plain = {kind for kind in rest if isinstance(kind, type)}
    number = bool(rest) and plain <= {int, float} and len(plain) == len(set(rest))
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return {
        "key": key,
        "kind": "choice" if not rest else "number" if number else "text",
        "words": list(dict.fromkeys(words)),
        "optional": type(None) in kinds,
        "default": default if isinstance(default, str | int | float | bool | None) else str(default),
        "sentence": meaning(part, name),
        "bounds": _bounds(field.metadata),
    }


def _leaves(annotation: object) -> Iterator[Any]:
    """The types inside a union; a list or a mapping is one."""
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            if typing.get_origin(annotation) is not typing.Annotated or inner is typing.get_args(annotation)[0]:
                yield from _leaves(inner)
    else:
        yield annotation


def _words(kind: object) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    return list(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else []


def _bounds(metadata: list[Any]) -> dict[str, float]:
    return {name: getattr(one, name) for one in metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)}
