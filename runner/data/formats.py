"""Rows of any of three shapes, made canonical: a conversation to answer, or plain text.

    chat                {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}
    prompt_completion   {"prompt": "…", "completion": "…"}       text, or two lists of turns
    text                {"text": "…"}

`load` is the way in: it reads, checks and splits what a `DataSpec` names.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, TypeVar

from runner.data import commands
from runner.data.files import Row, Table, kind_of, read_rows, read_table, refuse
from runner.data.hub import load_hub
from runner.errors import Problem, RequestError
from runner.spec import DataSpec
from runner.suggest import nearest

__all__ = ["Example", "Turn", "canonical", "detect", "fingerprint", "load", "load_hub", "read_rows", "split"]

Shape = Literal["chat", "prompt_completion", "text"]
T = TypeVar("T")

ROLES = ("system", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # ShareGPT's, common on the Hub

# What other data sets call the fields, in the order they are looked for.
_GUESSES = {
    "messages_field": ("conversations", "conversation", "dialog", "dialogue", "turns"),
    "prompt_field": ("instruction", "question", "query", "input", "source"),
    "completion_field": ("response", "answer", "output", "target", "reply"),
    "text_field": ("content", "document", "body"),
}


class Turn(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """Either `prompt` and `completion`, or `text`."""

    prompt: list[Turn] = field(default_factory=list)
    """Turns the model is given: the last one is not the assistant's."""
    completion: list[Turn] = field(default_factory=list)
    """Turns to learn, the assistant's."""
    text: str | None = None
    """Plain text to continue; null for a conversation."""


def detect(row: Row, spec: DataSpec) -> Shape:
    """The shape of a row: `data.format`, or for `auto` by the fields it has.

    Raises RequestError, with the keys to set, where no known field is there.
    """
    if spec.format != "auto":
        return spec.format
    if spec.messages_field in row:
        return "chat"
    if spec.prompt_field in row and spec.completion_field in row:
        return "prompt_completion"
    if spec.text_field in row:
        return "text"
    what = f"cannot tell what to learn by the fields: {', '.join(map(str, row)) or 'none'}"
    raise RequestError(Problem(what, None, _which_fields(row, spec)))


def _which_fields(row: Row, spec: DataSpec) -> str:
    guess = {key: next((name for name in names if name in row), None) for key, names in _GUESSES.items()}
    if guess["messages_field"]:
        return f"write data.messages_field={guess['messages_field']}"
    if "instruction" in row and ("input" in row or "context" in row):  # Alpaca and Dolly
        return "join the instruction and its input into one field prompt, and call the answer completion"
    pair = {"prompt_field": spec.prompt_field, "completion_field": spec.completion_field}
    named = {key: name if name in row else guess[key] for key, name in pair.items()}
    if all(named.values()):
        return "write " + " ".join(f"data.{key}={name}" for key, name in named.items() if name != pair[key])
    if guess["text_field"]:
        return f"write data.text_field={guess['text_field']}"
    return "write data.messages_field=…, data.text_field=…, or data.prompt_field=… data.completion_field=…"


def canonical(row: Row, where: str, spec: DataSpec) -> Example:
    """One row made canonical; RequestError with every mistake in it, each at `where`."""
    reader = _RowReader(row, where)
    try:
        shape = detect(row, spec)
    except RequestError as error:
        raise RequestError(*(replace(problem, source=where) for problem in error.problems)) from None
    if shape == "text":
        example = Example(text=reader.text(spec.text_field))
    elif shape == "chat":
        turns = reader.turns(spec.messages_field)
        cut = max((i for i, turn in enumerate(turns, 1) if turn["role"] != "assistant"), default=0)
        example = _conversation(turns[:cut], turns[cut:], spec)
        reader.check_ends(spec.messages_field, example)
    elif isinstance(row.get(spec.prompt_field), list) or isinstance(row.get(spec.completion_field), list):
        given, learnt = reader.turns(spec.prompt_field), reader.turns(spec.completion_field)
        example = _conversation(given, learnt, spec)
        reader.check_ends(spec.completion_field, example)
    else:
        question, answer = reader.text(spec.prompt_field), reader.text(spec.completion_field)
        example = _conversation([_turn("user", question)], [_turn("assistant", answer)], spec)
    if reader.problems:
        raise RequestError(*reader.problems)
    return example


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _conversation(prompt: list[Turn], completion: list[Turn], spec: DataSpec) -> Example:
    if spec.system_prompt and not any(turn["role"] == "system" for turn in prompt):
        prompt = [_turn("system", spec.system_prompt), *prompt]
    return Example(prompt=prompt, completion=completion)


class _RowReader:
    """Takes values out of one row and notes what is wrong with them."""

    def __init__(self, row: Row, where: str) -> None:
        self.row = row
        self.where = where
        self.problems: list[Problem] = []

    def wrong(self, what: str, remedy: str | None = None) -> None:
        self.problems.append(Problem(what, self.where, remedy))

    def text(self, name: str) -> str:
        """Text that is there; `""` where it is not (and a problem)."""
        if self.has(name):
            return self.content(name, self.row[name])
        return ""

    def has(self, name: str) -> bool:
        if name not in self.row:
            near = nearest(name, [str(key) for key in self.row])
            self.wrong(f"has no field {name}", f"is {near} misspelt?" if near else f"add {name}")
        return name in self.row

    def content(self, name: str, value: Any, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            self.wrong(f"{name} is {kind_of(value)}, not text", "write it as text in quotes")
            return ""
        if not value.strip() and not may_be_empty:
            self.wrong(f"{name} is empty", "fill it in, or delete the row")
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell it, and a tokenizer raises on it
            self.wrong(f"{name} holds half a character (\\ud800 to \\udfff)", "write the character itself")
        return value

    def turns(self, name: str) -> list[Turn]:
        """The turns of a conversation that are right."""
        if not self.has(name):
            return []
        value = self.row[name]
        if not isinstance(value, list) or not value:
            what = "is an empty list" if value == [] else f"is {kind_of(value)}, not a list of turns"
            self.wrong(f"{name} {what}", 'write [{"role": "user", "content": "…"}, …]')
            return []
        turns = [self._turn(f"{name}[{index}]", turn) for index, turn in enumerate(value)]
        return [turn for turn in turns if turn]

    def _turn(self, name: str, turn: Any) -> Turn | None:
        if not isinstance(turn, dict):
            self.wrong(f"{name} is {kind_of(turn)}, not a turn", 'write {"role": "user", "content": "…"}')
            return None
        sharegpt = "from" in turn and "role" not in turn
        role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
        missing = [key for key in (role_key, content_key) if key not in turn]
        for key in missing:
            self.wrong(f"{name} has no {key}", 'write {"role": "user", "content": "…"}')
        if missing:
            return None
        role = _OTHER_NAMES.get(str(turn[role_key]), turn[role_key])
        if role not in ROLES:
            near = nearest(str(role), ROLES)
            self.wrong(
                f"{name} has the unknown role {role!r}",
                f"did you mean {near}?" if near else f"roles are {', '.join(ROLES)}",
            )
            return None
        # An empty question happens in collected chats and does no harm; an empty answer teaches silence.
        return _turn(role, self.content(f"{name}.{content_key}", turn[content_key], role != "assistant"))

    def check_ends(self, name: str, example: Example) -> None:
        """A conversation asks first and ends with an answer."""
        if self.problems:
            return  # turns are missing already
        if not example.completion or example.completion[-1]["role"] != "assistant":
            self.wrong(f"{name} does not end with an assistant turn", "add the answer, or drop the last turn")
        elif all(turn["role"] == "system" for turn in example.prompt):
            self.wrong(f"{name} has no user turn before the answer", "put the question first")


def canonical_rows(table: Table, spec: DataSpec) -> tuple[list[Example], list[Problem]]:
    """Every row made canonical by the first row's shape, and every mistake there is."""
    if not table.rows:
        return [], table.problems or [Problem("holds no rows", table.name, "add rows, or name another file")]
    examples, problems = [], list(table.problems)
    try:
        spec = spec.model_copy(update={"format": detect(table.rows[0], spec)})
    except RequestError as error:  # the same holds for every other row
        return [], problems + [replace(problem, source=table.place(0)) for problem in error.problems]
    for index, row in enumerate(table.rows):
        try:
            examples.append(canonical(row, table.place(index), spec))
        except RequestError as error:
            problems += error.problems
    return examples, problems


def split(rows: Sequence[T], eval_fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Hold out `eval_fraction` of the rows, the same ones for the same seed; both keep their order.

    A fraction above 0 holds out at least one row, and at least one always stays for training.
    """
    wanted = max(1, round(len(rows) * eval_fraction)) if eval_fraction else 0
    wanted = min(wanted, max(0, len(rows) - 1))
    held = set(random.Random(seed).sample(range(len(rows)), wanted))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 (hex) over the examples' content, in order: what a cache and a run record go by."""
    digest = hashlib.sha256()
    for example in examples:
        content = {"prompt": example.prompt, "completion": example.completion, "text": example.text}
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii"))
        digest.update(b"\n")  # JSON has no bare line break: two examples cannot read as another two
    return digest.hexdigest()


def load(spec: DataSpec, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a data set.

    Raises RequestError with all mistakes in the data together, the first 20 spelled out.
    """
    train_table, eval_table = _tables(spec)
    train, problems = canonical_rows(train_table, spec)
    held: list[Example] = []
    if eval_table is not None:
        held, more = canonical_rows(eval_table, spec)
        problems = problems + more
    if problems:
        refuse(problems)
    if eval_table is None:
        train, held = split(train, spec.eval_fraction, seed)
    return train[: spec.max_examples], held[: spec.max_eval_examples]


def _tables(spec: DataSpec) -> tuple[Table, Table | None]:
    if spec.source == "hub":
        return load_hub(spec)
    if spec.source == "commands":
        train, held = ([dict(row) for row in rows] for rows in commands.examples())
        return Table("commands", train), Table("commands, held-out", held)
    assert spec.path is not None  # DataSpec: source=file has a path
    return read_table(spec.path), read_table(spec.eval_path) if spec.eval_path else None
