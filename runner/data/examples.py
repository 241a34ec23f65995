"""Examples: the four forms a row can take, by what is learned from it.

    Example          sft, pretrain     prompt + completion (turns), or text, or token ids
    Preference       dpo, orpo, reward prompt, chosen, rejected
    UnpairedExample  kto               prompt, completion, label
    PromptExample    grpo              prompt, and the answer that a reward function compares with

`columns` gives them the names that TRL knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from runner.errors import Problem, RequestError
from runner.spec.objective_base import Kind as Kind

Tool = Mapping[str, object]
"""JSON schema of a function that the assistant may call, as its row has it."""


class FunctionCall(TypedDict):
    """A function call: name and arguments."""

    name: str
    arguments: dict[str, object]


class _Call(TypedDict):
    type: Literal["function"]
    function: FunctionCall


class ToolCall(_Call, total=False):
    """A call in an assistant's turn."""

    id: str


class _Said(TypedDict):
    role: str
    content: str


class Turn(_Said, total=False):
    """One turn of a conversation; absent parts are None."""

    weight: float
    """0: nothing of it is learned."""
    name: str
    tool_calls: list[ToolCall]
    tool_call_id: str
    reasoning_content: str
    """What the assistant thought before it answered."""


@dataclass(frozen=True)
class Example:
    """Either `prompt` and `completion`, or `text`, or `ids`."""

    prompt: list[Turn] = field(default_factory=list)
    """Turns the model is given: the last one is not the assistant's."""
    completion: list[Turn] = field(default_factory=list)
    """Turns to learn, the assistant's."""
    text: str | None = None
    """Plain text to continue; null for a conversation."""
    dialogue: bool = False
    """It came as one conversation: the assistant's earlier turns, in `prompt`, are answers as well."""
    tools: list[Tool] = field(default_factory=list)
    """JSON schemas of what the assistant may call."""
    ids: list[int] | None = None
    """Token ids of a row that came tokenised."""
    labels: list[int] | None = None
    """Their labels, -100 where no loss is taken; null means that all are learned."""
    where: str = field(default="", compare=False)
    """File and row it came from."""


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt: turns, or all three text."""

    prompt: list[Turn] | str
    chosen: list[Turn] | str
    rejected: list[Turn] | str
    tools: list[Tool] = field(default_factory=list)
    where: str = field(default="", compare=False)
    """File and row it came from."""


@dataclass(frozen=True)
class UnpairedExample:
    """An answer, and whether it is a good one."""

    prompt: list[Turn]
    completion: list[Turn]
    label: bool
    tools: list[Tool] = field(default_factory=list)
    where: str = field(default="", compare=False)
    """File and row it came from."""


@dataclass(frozen=True)
class PromptExample:
    """Something to answer; `answer` and `extra` are for the reward functions."""

    prompt: list[Turn]
    answer: Any = None
    """Text, a number, or a list of answers that are all right."""
    extra: dict[str, Any] = field(default_factory=dict)
    """All fields of the row, with their types; those that TRL has a name for itself are not among them."""
    tools: list[Tool] = field(default_factory=list)
    where: str = field(default="", compare=False)
    """File and row it came from."""


Learnable = Example | Preference | UnpairedExample | PromptExample
CLASSES: dict[Kind, type[Learnable]] = {
    "sft": Example,
    "preference": Preference,
    "unpaired": UnpairedExample,
    "prompts": PromptExample,
}
_NEEDS: dict[Kind, str] = {
    "sft": "an answer to learn",
    "preference": "a chosen and a rejected answer",
    "unpaired": "an answer and a label, good or not",
    "prompts": "a prompt",
}


def as_kind(row: Learnable, kind: Kind, where: str) -> Learnable:
    """The same row as an objective of that kind learns it: the chosen answer, the answer to compare with, …

    RequestError where it lacks what that takes, or where taking it would leave something out unsaid.
    """
    if isinstance(row, CLASSES[kind]):
        return row
    if kind == "sft" and isinstance(row, Preference):
        if isinstance(row.prompt, str):
            return Example(text=f"{row.prompt}{row.chosen}", where=where)
        return Example(row.prompt, _turns(row.chosen), tools=row.tools, where=where)
    what = f"this objective learns from {_NEEDS[kind]}, and the row is {_IS[type(row)]}"
    raise RequestError(Problem(what, where, _FITTING.get(type(row))))


_IS: dict[type, str] = {
    Example: "an answer without another to compare it with",
    Preference: "a pair of answers",
    UnpairedExample: "an answer with a label",
    PromptExample: "a prompt without an answer to learn",
}
_FITTING: dict[type, str] = {
    Example: "write objective=sft, or name data with fields chosen and rejected, or label",
    Preference: "write objective=dpo, orpo, reward or sft",
    UnpairedExample: "write objective=kto, or data.format=prompt_completion to learn every answer",
    PromptExample: "write data.completion_field=answer to learn the answers, or objective=grpo",
}


def _turns(value: list[Turn] | str) -> list[Turn]:
    assert not isinstance(value, str)
    return value


def columns(rows: Sequence[Learnable]) -> dict[str, list[Any]]:
    """Rows of one kind → the columns that TRL's trainers take.

    Preference: `prompt`, `chosen`, `rejected`. UnpairedExample: `prompt`, `completion`, `label`.
    PromptExample: `prompt`, `answer`
    and its extra fields. Example: `prompt`, `completion`. Turns are lists of `{role, content, …}`; text stays text.
    `tools` is there only where some row has any.
    """
    found: dict[str, list[Any]] = {}
    kind = type(rows[0]) if rows else Example
    names = {Preference: ("prompt", "chosen", "rejected"), UnpairedExample: ("prompt", "completion", "label")}
    if kind is PromptExample:
        questions = [row for row in rows if isinstance(row, PromptExample)]
        found = {"prompt": [row.prompt for row in questions], "answer": [row.answer for row in questions]}
        extra = dict.fromkeys(name for row in questions for name in row.extra)
        return found | {name: [row.extra.get(name) for row in questions] for name in extra if name not in found}
    for name in names.get(kind, ("prompt", "completion")):
        found[name] = [getattr(row, name) for row in rows]
    if any(getattr(row, "tools", None) for row in rows):
        found["tools"] = [getattr(row, "tools", []) for row in rows]
    return found


def content_of(row: Learnable) -> dict[str, object]:
    """Return the non-empty fields of a row, for JSON."""
    if isinstance(row, Example):
        found: dict[str, object] = {"prompt": row.prompt, "completion": row.completion, "text": row.text}
        rest = {"dialogue": row.dialogue, "tools": row.tools, "ids": row.ids, "labels": row.labels}
        return found | {key: value for key, value in rest.items() if value}
    return {key: value for key, value in vars(row).items() if key != "where" and value not in ([], {}, None)}


def fingerprint(rows: Iterable[Learnable]) -> str:
    """sha256 (hex) over the rows' content, in order: what a cache and a run record go by."""
    known = getattr(rows, "fingerprint", None)  # rows in a file are JSON already
    if known is not None:
        return str(known())
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(content_of(row), sort_keys=True, separators=(",", ":")).encode("ascii"))
        digest.update(b"\n")  # JSON has no bare line break: two rows cannot read as another two
    return digest.hexdigest()
