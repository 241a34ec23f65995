"""Detect the format of a row and read it, and name the keys to set where that cannot be done."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from runner.data.columns import is_content, is_fact, is_index, is_odd, listing, mappings, media, seen, unread
from runner.data.examples import Kind, Learnable, Preference, PromptExample, as_kind
from runner.data.readers.files import Row, kind_of
from runner.data.row_parsers import FORMATS, passed_on, prompts_of
from runner.data.row_parts import prompt_field, said_turns
from runner.data.row_values import RowReader
from runner.data.user_formats import as_standard
from runner.errors import Problem, RequestError
from runner.spec import DataSpec
from runner.spec.part import is_own

UNREAD = "like content, and nothing reads "

# What other data sets call the fields, in the order they are looked for.
_GUESSES = {
    "messages_field": ("messages", "conversations", "conversation", "dialog", "dialogue", "turns"),
    "prompt_field": (
        "prompt",
        "instruction",
        "question",
        "query",
        "input",
        "inputs",
        "user",
        "human",
        "article",
        "document",
        "dialogue",
        "dialog",
        "source",
    ),
    "completion_field": (
        "completion",
        "response",
        "answer",
        "output",
        "target",
        "targets",
        "reply",
        "answers",
        "summary",
        "highlights",
        "assistant",
        "gpt",
    ),
    "text_field": ("text", "content", "document", "body"),
}


def detect_format(row: Row, spec: DataSpec, kind: Kind | None = None) -> str:
    """The shape of a row: `data.format`, or for `auto` the most specific one whose fields it has, by what the objective
    learns from: tokens, pairs, marked answers, conversations, prompts with an answer, plain text.

    Raises RequestError, with the keys to set, where no known field is there.
    """
    if spec.format != "auto":
        return spec.format
    return _detected(row, spec, kind)


def _detected(row: Row, spec: DataSpec, kind: Kind | None) -> str:
    row = seen(row, spec)
    if shape := _shape(row, spec, kind):
        flags = [name for name, value in row.items() if isinstance(value, bool)]
        if kind == "unpaired" and shape in ("chat", "alpaca", "prompt_completion") and len(flags) == 1:
            raise RequestError(Problem(f"has no field {spec.label_field}", None, f"write data.label_field={flags[0]}"))
        return shape
    what = f"cannot tell what to learn by the fields: {', '.join(map(str, row)) or 'none'}"
    raise RequestError(Problem(what, None, _which_fields(row, spec, kind)))


def _shape(row: Row, spec: DataSpec, kind: Kind | None) -> str | None:
    """The first format that fits by what is there; a null is named where it is missed."""
    said = {name: value for name, value in row.items() if value is not None or name == spec.label_field}
    return _first_fit(said, spec, kind) or _first_fit(row, spec, kind)


def _first_fit(row: Row, spec: DataSpec, kind: Kind | None) -> str | None:
    return next((name for name, known in FORMATS.items() if known.fits(row, spec, kind)), None)


def _which_fields(row: Row, spec: DataSpec, kind: Kind | None) -> str:
    if kind == "preference":
        return _which_answers(row, spec)
    lower = {str(name).strip().lower(): name for name in reversed(row) if isinstance(row[name], (str, list))}
    guess = {key: next((lower[name] for name in names if name in lower), None) for key, names in _GUESSES.items()}
    if isinstance(talk := row.get(guess["messages_field"] or ""), str) and not said_turns(talk):
        guess["messages_field"] = None
    pair = {"prompt_field": spec.prompt_field, "completion_field": spec.completion_field}
    named = {key: name if name in row else guess[key] for key, name in pair.items()}
    keys: dict[str, str] = {}
    if guess["messages_field"]:
        keys = {"messages_field": guess["messages_field"]}
    elif spec.instruction_field in row and guess["completion_field"]:  # Dolly
        keys = {"output_field": guess["completion_field"]}
    elif all(named.values()):
        keys = {key: name for key, name in named.items() if name and name != pair[key]}
    elif guess["text_field"]:
        keys = {"text_field": guess["text_field"]}
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip() and not is_fact(str(name))]
    if not keys and len(row) == len(texts) == 2:  # whatever they are called: the question is written first
        keys = dict(zip(pair, texts, strict=True))
    if not keys:
        odd = [f"{name} is {kind_of(value)}" for name, value in row.items() if is_odd(name, value)]
        needs = f"{' and '.join(odd)}, and prompt and answer have to be text or turns: " if odd else ""
        keys_of = "data.messages_field=…, data.text_field=…, or data.prompt_field=… data.completion_field=…"
        return (
            f"{needs}write {keys_of}; where no column is such, write rows as "
            f'{{"prompt": "…", "completion": "…"}} first, or {_OWN}'
        )
    with suppress(RequestError):
        tried = spec.model_copy(update=keys)
        rest = _rest(row, tried, kind)
        return f"write {_mapping(rest, row, spec, kind, keys) or _said(keys)}"
    return f"write {_said(keys)}" + (f"; or {_OWN}" if "messages_field" in keys else "")


_OWN = "data.format=FILE.py:CLASS for a format of your own (CONTRIBUTING.md)"


def _which_answers(row: Row, spec: DataSpec) -> str:
    keys = {}
    for key, word in (("chosen_field", spec.chosen_field), ("rejected_field", spec.rejected_field)):
        found = [name for name in map(str, row) if word in re.split(r"[\W_]+", name.lower())]
        found = [n for n in found if isinstance(row[n], (str, list, dict)) and not is_fact(n.lower().replace(word, ""))]
        if len(found) != 1:
            return (
                "write data.prompt_field=… data.chosen_field=… data.rejected_field=…: the better and the worse answer; "
                "rows that mark one of two answers have to be written so first"
            )
        keys[key] = found[0]
    return f"write {_said(keys)}"


def read_row(row: Row, where: str, spec: DataSpec, shape: str, kind: Kind | None = None) -> Learnable:
    """A row of a known shape; RequestError with every mistake in it, each at `where`."""
    if is_own(shape):
        row, spec = as_standard(row, where, spec)
        try:
            return read_row(row, where, spec, _detected(row, spec, kind), kind)
        except RequestError as error:
            raise RequestError(*(_of_converted(p, shape, where) for p in error.problems)) from None
    reader, found = _read(row, where, spec, shape, kind)
    if not reader.problems and (names := _unread(reader, found, spec, shape)):
        reader.problems.append(_left(names, reader, spec, kind))
    if reader.problems:
        raise RequestError(*reader.problems)
    return replace(found, where=where)


def _of_converted(problem: Problem, shape: str, where: str) -> Problem:
    """What is wrong with a row that a format of the user's has made: no key of `data` repairs it."""
    name = shape.rpartition(":")[2]
    return Problem(f"as {name} converts it: {problem.what}", where, f"correct {name}.convert, or the row")


def left_out(row: Row, spec: DataSpec, shape: str, kind: Kind | None = None) -> list[str]:
    """Columns of a row that are not read; the numbers of rows are not among them. A format of the user's own is given
    all of them."""
    if is_own(shape):
        return []
    reader, found = _read(row, "", spec, shape, kind)
    extra = found.extra if isinstance(found, PromptExample) else {}
    return [name for name in row if name not in {*reader.read, *extra} and not is_index(name)]


def rewarded(row: Row, spec: DataSpec) -> list[str]:
    """Columns of a prompt that nothing but reward functions gets; RequestError where a format of the user's own cannot
    convert the row."""
    row, spec = as_standard(row, "", spec)
    if prompt_field(seen(row, spec), spec) is None:
        return []
    reader, _ = _read(row, "", spec, "prompts", "prompts")
    return [name for name in passed_on(reader) if name not in reader.read]


def _read(row: Row, where: str, spec: DataSpec, shape: str, kind: Kind | None) -> tuple[RowReader, Learnable]:
    reader = RowReader(seen(row, spec), where, spec.roles, spec.weight_field)
    if kind == "prompts" and prompt_field(reader.row, spec) is not None:
        return reader, prompts_of(reader, spec)  # whatever else the row could be
    found = FORMATS[shape].read(reader, spec)
    if kind == "prompts" and isinstance(found, Preference) and not isinstance(found.prompt, str):
        found = PromptExample(found.prompt, None, passed_on(reader), found.tools)
    return reader, found


def _unread(reader: RowReader, found: Learnable, spec: DataSpec, shape: str) -> list[str]:
    """Token ids and text that is named are taken as they are, and all of a prompt goes to the reward functions."""
    if shape == "tokens" or spec.format == "text":
        return []
    return media(reader) if isinstance(found, PromptExample) else [*unread(reader, found), *media(reader)]


def _left(names: list[str], reader: RowReader, spec: DataSpec, kind: Kind | None) -> Problem:
    """The problem with columns that look like content: with keys that make every one of them read, where such are."""
    many = len(names) > 1
    what = f"column{'s' * many} {' and '.join(names)} look{'s' * (not many)} {UNREAD}"
    ignored = f"data.ignore_columns={listing([*spec.ignore_columns, *names])}"
    words = _mapping(names, reader.row, spec, kind)
    if (
        many and not any(map(is_content, names)) and not {*media(reader)} & {*names}
    ):  # which of them is the prompt cannot be told by their names
        words = f"data.prompt_field={names[0]}, or another of them"
    remedy = f"write {words}, or {ignored}" if words else f"write {ignored} to leave {'them' if many else 'it'} out"
    return Problem(what + ("them" if many else "it"), reader.where, remedy)


def _mapping(names: list[str], row: Row, spec: DataSpec, kind: Kind | None, begun: Mapping[str, str] = {}) -> str:
    """Words for the command line with which all the columns are read, beginning with some: tried, not guessed."""
    words, left = dict(begun), names
    for name in names:
        for keys in mappings(name, prompt_field(row, spec) or spec.prompt_field, spec.text_field):
            with suppress(RequestError):
                rest = _rest(row, spec.model_copy(update=words | keys), kind)
                if len(rest) < len(left) and name not in rest:
                    words, left = words | keys, rest
                    break
    return "" if left else _said(words)


def _rest(row: Row, spec: DataSpec, kind: Kind | None) -> list[str]:
    """Columns that look like content and are not read; RequestError for a row that cannot be read as that kind."""
    shape = spec.format if spec.format != "auto" else _shape(seen(row, spec), spec, kind)
    if shape is None:
        raise RequestError("no format")  # without a remedy: it is this search that looks for one
    reader, found = _read(row, "", spec, shape, kind)
    if reader.problems:
        raise RequestError(*reader.problems)
    if kind:
        as_kind(found, kind, "")
    return _unread(reader, found, spec, shape)


def _said(keys: Mapping[str, str]) -> str:
    return " ".join(shlex.quote(f"data.{key}={_word(value)}") for key, value in keys.items())


def _word(value: str) -> str:
    """A name as Hydra reads it whole: in quotes where its grammar or a space at its end would get at it."""
    if re.fullmatch(r"\w([\w ./-]*\w)?", value):
        return value
    # A backslash stands for itself, but before a quote: there Hydra reads two as one.
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + found[2].replace('"', '\\"'), value) + '"'
