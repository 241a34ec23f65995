"""The keys of the schema: which there are, what each accepts, and how a value of one is typed."""

from __future__ import annotations

import re
import shlex
import types
import typing
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from runner.config import conf_files
from runner.spec import RunSpec


@cache
def _annotations() -> dict[str, list[object]]:
    """Every dotted key of the schema with its types, one per variant of a union that has it."""
    found: dict[str, list[Any]] = {}
    for key, annotation in _walk(RunSpec, ""):
        found.setdefault(key, []).append(annotation)
    return found


def known_keys() -> Collection[str]:
    """Every dotted key of the schema, all variants of a union together."""
    return _annotations().keys()


def default_of(key: str) -> object:
    """The value of a key that nothing sets; None for one that is unknown, has to be set, or is null then."""
    group, _, leaf = key.partition(".")
    field = RunSpec.model_fields.get(group)
    for part in parts_of(field.annotation) if field else ():
        if (found := part.model_fields.get(leaf)) and not found.is_required():
            return found.get_default(call_default_factory=True)
    return None


def allowed_words(key: str) -> list[str]:
    """Words allowed after `key=` where only some are: `auto`, `true`, `cosine`."""
    return [word for annotation in _annotations().get(key, []) for word in _words(annotation)]


def _words(annotation: object) -> Iterator[str]:
    if annotation is bool:
        yield from ("true", "false")
    elif typing.get_origin(annotation) is typing.Literal:
        yield from map(str, typing.get_args(annotation))
    elif typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _words(inner)


def accepts_list(key: str) -> bool:
    """A list may be written after `key=`."""
    return any("list[" in str(annotation) for annotation in _annotations().get(key, []))


def accepts_text(key: str) -> bool:
    """Any text may be written after `key=`."""
    return any("str" in str(annotation).replace("list[str]", "") for annotation in _annotations().get(key, []))


def only_text(key: str) -> bool:
    """Return True if the key accepts only text or null."""
    return set(_annotations().get(key, ())) <= {str, str | None} and key in known_keys()


def only_number(key: str) -> type[int] | type[float] | None:
    """The type of number that has to be written after `key=`, or a word of the schema such as `auto`; None for a key
    that takes a truth value or any text."""
    found = " ".join(
        annotation.__name__ if isinstance(annotation, type) else str(annotation)
        for annotation in _annotations().get(key, [])
    )
    if re.search(r"\b(bool|str|list|dict)\b", found):
        return None
    return float if "float" in found else int if "int" in found else None


def mapping_keys() -> set[str]:
    """Keys whose value is a mapping with names that the schema does not have, such as `method.arguments`."""
    return {key for key, kinds in _annotations().items() if any(typing.get_origin(kind) is dict for kind in kinds)}


def parts_of(annotation: object) -> Iterator[type[BaseModel]]:
    """The schema classes inside an annotation (a class, a union, an Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from parts_of(inner)


def choices_with(key: str) -> list[str]:
    """Choices that have `key` where others of their group have not: `method.rank` → lora, qlora4, qlora8."""
    group, _, leaf = key.partition(".")
    field = RunSpec.model_fields.get(group)
    parts = list(parts_of(field.annotation)) if field else []
    having = [part for part in parts if leaf in part.model_fields]
    if len(having) == len(parts):
        return []
    return [name for part in having for name in names_of(group, part)]


def names_of(group: str, part: type[BaseModel]) -> tuple[str, ...]:
    """The names that choose a variant of a group: those of its type, or the catalogue's that no type has."""
    field = RunSpec.model_fields[group]
    own = {p: typing.get_args(p.model_fields["name"].annotation) for p in parts_of(field.annotation)}
    if own[part]:
        return own[part]
    held = {name for names in own.values() for name in names}
    chosen = {name: conf_files.load_choice(group, name).get("name", name) for name in conf_files.options(group)}
    return tuple(name for name in chosen if chosen[name] not in held)


def _walk(part: type[BaseModel], prefix: str) -> Iterator[tuple[str, object]]:
    for name, field in part.model_fields.items():
        yield prefix + name, field.annotation
        for inner in parts_of(field.annotation):
            yield from _walk(inner, f"{prefix}{name}.")


def quoted(value: str, quote: str = "'") -> str:
    """A text in Hydra's quotes, in which only a quote, and backslashes before one, have to be escaped."""
    escaped = re.sub(rf"(\\*)({quote}|$)", lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), value)
    return f"{quote}{escaped}{quote}"


def as_typed(key: str, value: str) -> str:
    """The word to type into a shell so that `key` gets the text `value`, or a list of it where it takes nothing
    else."""
    text = value.replace("${", "\\${")  # else it would be an interpolation
    word = quoted(text, '"')
    if accepts_list(key) and value.startswith("[") and value.endswith("]") and len(value) > 2:
        word = f"[{','.join(quoted(part.strip(), chr(34)) for part in text[1:-1].split(','))}]"
    return f"{key}='{word}'" if "'" not in word else shlex.quote(f"{key}={word}")
