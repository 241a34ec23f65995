"""`docs/reference.md`, generated from `runner/spec/` and the records of a run: every key, its type, default, meaning.

The sentence under a field is read from the source, because pydantic's
`use_attribute_docstrings` would parse that source again at every start of the runner.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from runner import spec
from runner.config.field_sentences import meaning, sentences_in
from runner.config.schema_keys import names_of, parts_of
from runner.doctor.checks import DoctorReport
from runner.doctor.finding import Finding
from runner.paths import ASSETS
from runner.report.comparison import Result
from runner.report.run_list import RunRow
from runner.rundir import json_files
from runner.spec.part import OwnCode

PAGE = ASSETS / "docs" / "reference.md"
# What a run directory holds is written by hand, beside this module.
RUN_FILES = Path(__file__).with_name("run_files.md")

_INTRO = """\
<!-- Generated from runner/spec/: change it there, then `make docs`. -->

# Reference

Every key of a run, as typed on the command line (`python -m runner train.learning_rate=1e-4`) or
written in a recipe. A default is what holds where no file in `conf/` says otherwise:
`python -m runner show` prints what a run resolves to, `python -m runner explain KEY` which file or
argument a value came from. Where the default is –, a value must be given. A key that is not listed
here is an error.
"""

RECORDS: dict[str, type[Any]] = {
    record.__name__: record
    for record in (*filter(typing.is_typeddict, vars(json_files).values()), RunRow, Result, DoctorReport, Finding)
}
"""What a run and two commands write as JSON, by the name in run_files.md."""

_WORDS = {int: "whole number", float: "number", str: "text", type(None): "null"}
_SIGNS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


@dataclass
class Row:
    """One line of a table."""

    key: str
    type: str
    default: str
    meaning: str
    choices: list[str] = field(default_factory=list)
    """Variants of a union that have this key, such as `lora`; empty where there is but one."""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        return self.key, self.type, self.default, self.meaning


def page() -> str:
    """The whole page, as Markdown."""
    sections = [_INTRO, *(_section(group, parts) for group, parts in _groups())]
    if RUN_FILES.is_file():
        text = re.sub(r"<!-- records ([\w ]+) -->", _records, RUN_FILES.read_text("utf-8"))
        sections.append(f"## Files of a run\n\n{text}")
    return "\n".join(section.rstrip() + "\n" for section in sections)


def undocumented() -> list[str]:
    """Keys without a sentence under their field, and parts without a docstring."""
    found = []
    for group, parts in _groups():
        for part in parts:
            found += [] if part.__doc__ else [part.__name__]
            found += [f"{group}.{name}" for name in part.model_fields if not meaning(part, name)]
    return found


@cache
def _sentences() -> dict[str, dict[str, str]]:
    """Record → field → the sentence under it."""
    return sentences_in({Path(inspect.getfile(record)) for record in RECORDS.values()})


def _records(found: re.Match[str]) -> str:
    """A table for each record that is named."""
    return "\n\n".join(_record(RECORDS[name]) for name in found[1].split())


def _record(record: type[Any]) -> str:
    what, colon, more = (inspect.getdoc(record) or "").rstrip(".").partition(":")
    lines = [f"**{what}**{colon}{more}", "", _line(["key", "type", "meaning"]), _line(["---"] * 3)]
    sentences = _sentences()[record.__name__]
    for name, kind in typing.get_type_hints(record).items():
        options = _options(kind)
        words = ", ".join(options[:-1]) + " or " + options[-1] if len(options) > 1 else options[0]
        lines.append(_line([f"`{name}`", words, sentences[name]]))
    return "\n".join(lines)


def _groups() -> Iterator[tuple[str, list[type[BaseModel]]]]:
    """Each part of a run with its class, or the variants it can be."""
    for group, info in spec.RunSpec.model_fields.items():
        yield group, list(parts_of(info.annotation))


def _section(group: str, parts: list[type[BaseModel]]) -> str:
    lines = [f"## {group}", ""]
    if len(parts) == 1:
        lines += [inspect.getdoc(parts[0]) or "", ""]
    else:
        for part in parts:
            names = ", ".join(f"`{group}={name}`" for name in _names(group, part))
            lines.append(f"- {names}: {inspect.getdoc(part)}")
        lines.append("")
    rows = _rows(group, parts)
    some_only = any(0 < len(row.choices) < len(parts) for row in rows)
    header = ["key", "type", "default", "meaning", *(["only with"] if some_only else [])]
    if rows:
        lines += [_line(header), _line(["---"] * len(header))]
    for row in rows:
        choices = [", ".join(f"`{choice}`" for choice in row.choices)] if some_only else []
        lines.append(_line([f"`{row.key}`", row.type, row.default, row.meaning, *choices]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _rows(group: str, parts: list[type[BaseModel]]) -> list[Row]:
    """The rows of one table; a key that several variants share stands there once."""
    rows: dict[tuple[str, str, str, str], Row] = {}
    for part in parts:
        for name, info in part.model_fields.items():
            if len(parts) > 1 and name == "name":
                continue  # the variants are listed above the table
            row = Row(f"{group}.{name}", _type(info), _default(info), meaning(part, name))
            row = rows.setdefault(row.identity, row)
            if len(parts) > 1:
                row.choices += _names(group, part)
    return sorted(rows.values(), key=lambda row: row.key != f"{group}.name")


def _names(group: str, part: type[BaseModel]) -> tuple[str, ...]:
    """The names that choose a variant of a union."""
    return names_of(group, part)


def _type(info: FieldInfo) -> str:
    """A field's type and bounds as a person would say them: `whole number ≥ 1 or null`."""
    options = _options(info.annotation)
    if typing.get_origin(info.annotation) is Literal and len(options) > 1:
        return "one of " + ", ".join(options)
    words = ", ".join(options[:-1]) + " or " + options[-1] if len(options) > 1 else options[0]
    bounds = [_bound(item) for item in info.metadata if type(item) in _SIGNS]
    return words.replace("number", f"number {' and '.join(bounds)}", 1) if bounds else words


def _bound(limit: Any) -> str:
    attribute, sign = _SIGNS[type(limit)]
    value = getattr(limit, attribute)
    return f"{sign} {value if isinstance(value, int) else f'{value:g}'}"


def _options(annotation: Any) -> list[str]:
    """What a value may be, one by one."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return [f"`{value}`" for value in inner]
    if origin in (typing.Union, types.UnionType):
        return [option for part in inner for option in _options(part)]
    if origin is typing.Annotated:
        return ["`FILE.py:CLASS`"] if annotation == OwnCode else _options(inner[0])
    if origin is list:
        return ["list of " + " or ".join(_plural(option) for option in _options(inner[0]))]
    if annotation is Any or typing.is_typeddict(annotation):
        return ["mapping" if typing.is_typeddict(annotation) else "value"]
    if origin is dict:
        values = _options(inner[1])
        return [f"mapping of names to {'one of ' + ', '.join(values) if len(values) > 1 else values[0] + 's'}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [f"`{{{', '.join(annotation.model_fields)}}}` mapping"]
    return ["true", "false"] if annotation is bool else [_WORDS[annotation]]


def _plural(option: str) -> str:
    return option.replace("mapping", "mappings", 1) if option.startswith("mapping of") else f"{option}s"


def _default(info: FieldInfo) -> str:
    """The default as YAML has it."""
    if info.is_required():
        return "–"
    value = info.get_default(call_default_factory=True)
    if value is None or isinstance(value, bool):
        return "`null`" if value is None else f"`{str(value).lower()}`"
    return f"`{value}`".replace("e-0", "e-")


def pages() -> dict[str, tuple[str, str]]:
    """File → what it says and what it should say."""
    return {"docs/reference.md": (PAGE.read_text("utf-8") if PAGE.is_file() else "", page())}
