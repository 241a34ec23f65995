"""Pydantic's errors as problems: one per key, with what to write instead."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from runner.config.did_you_mean import nearest, unknown_key
from runner.config.other_trainers_keys import VALUES
from runner.config.provenance import COMMAND_LINE, flattened
from runner.config.schema_keys import (
    accepts_text,
    as_typed,
    default_of,
    mapping_keys,
    only_number,
    parts_of,
)
from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.spec.part import CODE

SourceOf = Callable[[str], str | None]
"""From a key to the place that set it: `command line`, or a file and line."""

Written = Callable[[str], str | list[str] | None]
"""From a key to its value as its last place writes it (YAML, or a typed word); None where that is not known."""

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "list": "a list such as [a,b]",
    "dict": "a mapping",
    "model": "a mapping of keys",
}


HALF = re.compile("[\ud800-\udfff]")


def validated(
    values: dict[str, object], source_of: SourceOf, found: Iterable[Problem] = (), unsure: Iterable[str] = (),
    written: Written = lambda key: None,
) -> RunSpec:  # fmt: skip
    """The run that `values` describe; RequestError with what was `found` before and all that is wrong with them.

    Groups and keys that are `unsure` hold something else than the user meant: what follows from
    them is not told.
    """
    misread = dict(_misread(values, source_of, frozenset(unsure)))
    hidden = frozenset(unsure) | misread.keys()
    problems, spec = [*found, *misread.values(), *_halves(values, source_of)], None
    try:
        spec = RunSpec.model_validate(values)
    except ValidationError as error:
        names = {group: part["name"] for group, part in values.items() if isinstance(part, dict) and "name" in part}
        problems += _problems_of(error, source_of, hidden, names, written)
    except UnicodeEncodeError:  # of a pattern; it is among `_halves`
        pass
    if spec is None or problems:
        raise RequestError(*dict.fromkeys(problems))
    return spec


EMPTY = ("data.system_prompt", "model.title", "hw.title")
"""Texts that may be empty."""


def _misread(values: dict[str, Any], source_of: SourceOf, unsure: frozenset[str]) -> Iterator[tuple[str, Problem]]:
    """Keys with a value that Python takes for another: a truth value for 1 or 0 (YAML's `yes` in `max_steps: yes`), and
    an empty text (of a shell variable that is not set) for nothing, or for the folder one is in."""
    for group, part in values.items():
        for leaf, value in part.items() if isinstance(part, dict) else ():
            key = f"{group}.{leaf}"
            if {key, group} & unsure:
                continue
            if isinstance(value, bool) and (number := only_number(key)):
                what = f"{key}={_shown(value)}: expected {_EXPECTED[number.__name__]}"
                yield key, Problem(what, source_of(key), _example(key))
            elif value == "" and accepts_text(key) and key not in EMPTY:
                yield key, Problem(f"{key} is empty", source_of(key), f"leave it out, or write {key}=…")


def _halves(values: dict[str, Any], source_of: SourceOf) -> Iterator[Problem]:
    """Text that JSON and YAML can spell, and no file can hold."""
    for key, value in flattened(values):
        if HALF.search(f"{key}{value}"):
            what = f"{key} holds half a character (\\ud800 to \\udfff)"
            yield Problem(what, source_of(key), "write the character itself")


def _problems_of(
    error: ValidationError, source_of: SourceOf, unsure: frozenset[str], names: Mapping[str, object], written: Written
) -> list[Problem]:
    """One problem per offending key; `source_of(key)` tells where its value came from, `names` what was chosen."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_key.setdefault(_key_of(detail["loc"], detail["type"] == "extra_forbidden"), []).append(detail)
    found: list[Problem] = []
    for key, details in by_key.items():
        if not (unsure & {key, key.split(".")[0]}):
            found += _explain(key, details, source_of, unsure, names, written)
    return found


def value_of(spec: RunSpec, key: str) -> object:
    """The value of `spec` under a dotted key; RequestError where there is no such key."""
    value: Any = spec.model_dump(mode="json")
    steps = key.split(".")
    for step in steps:
        if not isinstance(value, dict) or step not in value:
            if isinstance(value, dict) and (parent := key.rpartition(".")[0]) in mapping_keys():
                remedy = f"{parent} has {', '.join(value) or 'nothing'} here; {key}=… would set it"
                raise RequestError(Problem(f"{key} is not set", "command line", remedy))
            chosen = getattr(getattr(spec, steps[0], None), "name", None)
            raise RequestError(unknown_key(key, chosen, "command line"))
        value = value[step]
    return value


def _explain(
    key: str, details: list[ErrorDetails], source_of: SourceOf, unsure: frozenset[str], names: Mapping[str, object],
    written: Written,
) -> list[Problem]:  # fmt: skip
    first = details[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        tag = str(first["loc"][1]) if len(first["loc"]) > 2 else None  # of a union
        chosen = str(names.get(str(first["loc"][0]), tag)) if tag else None
        inner = first["input"] if "." not in key and isinstance(first["input"], dict) else {}
        keys = [f"{key}.{leaf}" for leaf, _ in flattened(inner)] or [key]  # for a misspelt group: what stands in it
        return [unknown_key(k, chosen, source_of(k)) for k in keys]
    if kind == "missing":
        return [Problem(f"{key} is missing", None, f"write {key}=…")]
    if kind == "value_error":
        return _rule(key, first, source_of, unsure)
    if kind == "union_tag_invalid":
        key, value = f"{key}.name", first["ctx"]["tag"]
        tags = [n.strip("' ") for n in str(first["ctx"]["expected_tags"]).split(",")]
        return [Problem(f"{key}={value} is none of {', '.join(tags)}", source_of(key), _did_you_mean(value, tags))]
    expected = " or ".join(dict.fromkeys(_expected(d) for d in details))
    choices = [c for d in details if d["type"] == "literal_error" for c in _choices(d)]
    value = _shown(first["input"])
    last = details[-1] if details[-1]["type"] == "string_pattern_mismatch" else first  # after the names, a pattern
    read = next((d["input"] for d in details if d["type"] == "string_type"), None)
    if isinstance(read, (bool, int, float)):  # YAML and Hydra have read a text as one
        remedy = _in_quotes(key, read, source_of(key), written(key))
    else:
        remedy = _did_you_mean(value, choices) or _whole(key, details) or _instead(key, last, source_of(key))
    return [Problem(f"{key}={value}: expected {expected}", source_of(key), remedy)]


def _rule(key: str, detail: ErrorDetails, source_of: SourceOf, unsure: frozenset[str]) -> list[Problem]:
    """Problems from a rule of our own in the schema: one per line, its remedy after a semicolon."""
    if not key and any(k in RunSpec.model_fields for k in unsure):
        return []  # a rule across parts, one of which is not the one that was meant
    found = []
    for text in str(detail["ctx"]["error"]).split("\n"):
        subject = _subject(text)
        what, _, remedy = text.partition("; ")
        prefix = "" if subject or not key else f"{key}={_shown(detail['input'])}: "
        if subject not in unsure:
            found.append(Problem(prefix + what, source_of(subject or key), remedy or None))
    return found


def _did_you_mean(value: object, choices: list[str]) -> str | None:
    peer = VALUES.get(str(value).lower())
    near = peer if peer in choices else nearest(str(value), choices)
    return f"did you mean {near}?" if near else None


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"), "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt"),
}  # fmt: skip
"""Pydantic's bounds in words, and their names in its error."""


def _whole(key: str, details: list[ErrorDetails]) -> str | None:
    """Remedy for a fraction where a whole number is one of the kinds of value; None for any other mistake."""
    value = details[0]["input"]
    if isinstance(value, float) and math.isfinite(value) and any(d["type"].startswith("int") for d in details):
        return f"write {key}={max(1, round(value))}"
    return None


def _instead(key: str, detail: ErrorDetails, source: str | None) -> str:
    """Remedy for a value of the wrong type, or out of bounds."""
    kind, value, leaf = detail["type"], detail["input"], key.rpartition(".")[2]
    in_file = source is not None and source != "command line"
    if kind in ("greater_than_equal", "less_than_equal"):  # bounds that are themselves allowed
        more = "more" if kind.startswith("greater") else "less"
        return f"write {key}={_number(detail['ctx'][_BOUNDS[kind][1]])}, or {more}"
    if kind.startswith("bool"):
        return f"write {key}=true or {key}=false"
    if kind == "string_pattern_mismatch" and (repaired := _repaired(str(value), detail["ctx"]["pattern"])):
        if leaf == "name":
            return f"write name: {repaired} into the file of that choice"
        return f"write {leaf}: {repaired}" if in_file else f"write {key}={repaired}"
    return _example(key, detail["ctx"]["gt"] + 1 if kind == "greater_than" else None)


def _example(key: str, number: float | None = None) -> str:
    """Remedy for a value that is no number of this key: its default, else this `number`, else where it is described."""
    default = default_of(key)
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        number = default
    return (
        f"docs/reference.md says what {key} takes" if number is None else f"write {key}={_number(number)}, for example"
    )


def _in_quotes(key: str, value: object, source: str | None, written: str | list[str] | None) -> str:
    """Remedy for a text, or a list of texts, that was read as a number or a truth value: what was written, in quotes.

    The value says it no more: to YAML 1.1, `1.10` is 1.1, `010` is 8, `12:30` is 750 and `no` is false.
    """
    if isinstance(written, str) and "${" in written:  # in quotes it would still stand for a number
        written = _shown(value)
    in_list = isinstance(written, list) or (written or "").startswith("[")
    if written is None or "${" in str(written) or (in_list and source == COMMAND_LINE and set(written) & set("'\"")):
        return f"write the value of {key} as you wrote it, in quotes"
    if source == COMMAND_LINE:
        return f"quote it: {as_typed(key, str(written))}"
    said = ", since yes, no, on, off, true and false are no texts in YAML" if isinstance(value, bool) else ""
    return f"quote it: {key.rpartition('.')[2]}: {json.dumps(written, ensure_ascii=False)}{said}"


PATTERNS = {
    CODE: "FILE.py:NAME, a Python file and a name in it",
    r"^[a-z][a-z0-9_]*$": "small letters, digits and _, with a letter first",
    r"^[A-Z][A-Z0-9_]*$": "capitals, digits and _, with a letter first",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits and . _ -, with a letter or digit first",
}
"""Patterns of the schema in words."""


def _repaired(text: str, pattern: str) -> str | None:
    """The text as the pattern takes it, with NAME for a name that it lacks; None where that is not to be seen."""
    file, _, name = text.partition(":")
    stem = file.removesuffix(".py")
    parts = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")
    tries = [f"{stem}.py:{name or 'NAME'}"] if pattern == CODE else [parts.lower(), parts.upper(), parts]
    return next((found for found in tries if re.fullmatch(pattern, found)), None)


def _expected(detail: ErrorDetails) -> str:
    kind, ctx = detail["type"], detail.get("ctx", {})
    if kind == "string_pattern_mismatch":
        return PATTERNS.get(ctx["pattern"], f"text that matches {ctx['pattern']}")
    if kind == "literal_error":
        choices = _choices(detail)
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{words} {_number(ctx[bound])}"
    return _EXPECTED.get(kind.split("_")[0], detail["msg"][0].lower() + detail["msg"][1:])


def _choices(detail: ErrorDetails) -> list[str]:
    return [c.strip("' ") for c in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(",")]


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _shown(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _subject(text: str) -> str | None:
    """The dotted key a message of the schema opens with, such as `train.max_length`."""
    word = text.split(" ", 1)[0].split("=", 1)[0].rstrip(":")
    group = word.split(".", 1)[0]
    return word if "." in word and group in RunSpec.model_fields else None


def _key_of(loc: tuple[int | str, ...], unknown: bool) -> str:
    """The dotted key behind pydantic's location, without its union tags."""
    keys: list[str] = []
    parts: list[type[BaseModel]] = [RunSpec]
    mapping = False
    for position, step in enumerate(loc):
        field = next((p.model_fields[step] for p in parts if step in p.model_fields), None)
        if field is not None:
            keys.append(str(step))
            parts, mapping = list(parts_of(field.annotation)), get_origin(field.annotation) is dict
        elif mapping or (unknown and position == len(loc) - 1):
            keys.append(str(step))
            mapping = False
    return ".".join(keys)
