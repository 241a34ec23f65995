"""The shapes a row may have, how each is recognised, and what it becomes.

    chat                {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}, or `conversations`
    alpaca              {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["…", "…"]]}
    prompt_completion   {"prompt": "…", "completion": "…"}       text, or two lists of turns
    text                {"text": "…"}
    preference          {"prompt": "…", "chosen": "…", "rejected": "…"}, or both answers with their prompt in them
    unpaired            {"prompt": "…", "completion": "…", "label": true}
    prompts             {"prompt": "…", "answer": "…"}
    tokens              {"input_ids": [1, …], "labels": [-100, …]}

The names of the fields are those of `DataSpec`. A new shape is one function here and one line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from runner.data.asked import HH, answered, asked, check_ends, instructed, messages_field, turn, with_system
from runner.data.examples import Example, Judged, Kind, Learnable, Preference, Question
from runner.data.files import Row, kind_of
from runner.data.rows import RowReader
from runner.errors import Problem, RequestError
from runner.spec import DataSpec

Shape = Literal["chat", "alpaca", "prompt_completion", "text", "preference", "unpaired", "prompts", "tokens"]

# What other data sets call the fields, in the order they are looked for.
_GUESSES = {
    "messages_field": ("conversation", "dialog", "dialogue", "turns"),
    "prompt_field": ("instruction", "question", "query", "input", "source"),
    "completion_field": ("response", "answer", "output", "target", "reply"),
    "text_field": ("content", "document", "body"),
}


def detect(row: Row, spec: DataSpec, kind: Kind | None = None) -> Shape:
    """The shape of a row: `data.format`, or for `auto` by the fields it has and what the objective learns from.

    Raises RequestError, with the keys to set, where no known field is there.
    """
    if spec.format != "auto":
        return spec.format
    has = row.keys()
    prompt = spec.prompt_field in has
    if {spec.chosen_field, spec.rejected_field} <= has:
        return "preference"
    # A column `label` is common and seldom a judgement: it counts where the objective learns from one.
    if kind == "unpaired" and spec.label_field in has:
        return "unpaired"
    if messages_field(row, spec) in has:
        return "prompts" if kind == "prompts" and spec.answer_field in has else "chat"
    if prompt and spec.completion_field in has:
        return "prompt_completion"
    if spec.text_field in has:
        return "text"
    if {spec.instruction_field, spec.output_field} <= has:
        return "alpaca"
    if spec.ids_field in has:
        return "tokens"
    if prompt and (spec.answer_field in has or kind == "prompts"):
        return "prompts"
    what = f"cannot tell what to learn by the fields: {', '.join(map(str, row)) or 'none'}"
    raise RequestError(Problem(what, None, _which_fields(row, spec)))


def _which_fields(row: Row, spec: DataSpec) -> str:
    guess = {key: next((name for name in names if name in row), None) for key, names in _GUESSES.items()}
    if guess["messages_field"]:
        return f"write data.messages_field={guess['messages_field']}"
    if "instruction" in row and "response" in row:  # Dolly
        context = " data.input_field=context" * ("context" in row)
        return f"write data.output_field=response{context}"
    pair = {"prompt_field": spec.prompt_field, "completion_field": spec.completion_field}
    named = {key: name if name in row else guess[key] for key, name in pair.items()}
    if all(named.values()):
        return "write " + " ".join(f"data.{key}={name}" for key, name in named.items() if name != pair[key])
    if guess["text_field"]:
        return f"write data.text_field={guess['text_field']}"
    return "write data.messages_field=…, data.text_field=…, or data.prompt_field=… data.completion_field=…"


def read(row: Row, where: str, spec: DataSpec, shape: Shape) -> Learnable:
    """A row of a known shape; RequestError with every mistake in it, each at `where`."""
    reader = RowReader(row, where, spec.roles, spec.weight_field)
    found = READERS[shape](reader, spec)
    if reader.problems:
        raise RequestError(*reader.problems)
    return replace(found, where=where)


def _chat(reader: RowReader, spec: DataSpec) -> Example:
    name = messages_field(reader.row, spec)
    turns = with_system(reader.turns(name), reader, spec)
    cut = max((i for i, said in enumerate(turns, 1) if said["role"] != "assistant"), default=0)
    check_ends(reader, name, turns[:cut], turns[cut:])
    return Example(turns[:cut], turns[cut:], dialogue=True, tools=reader.tools(spec.tools_field))


def _alpaca(reader: RowReader, spec: DataSpec) -> Example:
    turns = instructed(reader, spec)
    answer = turn("assistant", reader.text(spec.output_field))
    return Example(with_system(turns, reader, spec), [answer], dialogue=len(turns) > 1)


def _pair(reader: RowReader, spec: DataSpec) -> Example:
    row, name = reader.row, spec.completion_field
    as_turns = isinstance(row.get(spec.prompt_field), list) or isinstance(row.get(name), list)
    prompt, completion = asked(reader, spec, as_turns), answered(reader, name, as_turns)
    if as_turns:
        check_ends(reader, name, prompt, completion)
    return Example(prompt, completion, tools=reader.tools(spec.tools_field))


def _text(reader: RowReader, spec: DataSpec) -> Example:
    return Example(text=reader.text(spec.text_field))


def _preference(reader: RowReader, spec: DataSpec) -> Preference:
    row, names = reader.row, (spec.chosen_field, spec.rejected_field)
    alone = not any(name in row for name in (spec.prompt_field, spec.instruction_field, messages_field(row, spec)))
    if alone and all(isinstance(row.get(name), str) and not HH.match(row[name]) for name in names):
        return _common_text(reader, spec)
    chosen, rejected = (answered(reader, name) for name in names)
    if chosen and chosen[0]["role"] != "assistant":  # whole conversations: the prompt is what they share
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = with_system(prompt, reader, spec)
    else:
        prompt = [] if alone else asked(reader, spec)
    for name, answer in zip(names, (chosen, rejected), strict=True):
        check_ends(reader, name, prompt, answer, unasked=alone)
    if chosen == rejected and not reader.problems:
        _are_the_same(reader, spec)
    return Preference(prompt, chosen, rejected, reader.tools(spec.tools_field))


def _common_text(reader: RowReader, spec: DataSpec) -> Preference:
    """Plain texts: what both begin with, up to the last space in it, is the prompt."""
    chosen, rejected = reader.text(spec.chosen_field), reader.text(spec.rejected_field)
    if chosen == rejected and not reader.problems:
        _are_the_same(reader, spec)
    shorter = min(len(chosen), len(rejected))
    at = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    at = max(chosen.rfind(" ", 0, at), chosen.rfind("\n", 0, at), 0)
    return Preference(chosen[:at], chosen[at:], rejected[at:])


def _are_the_same(reader: RowReader, spec: DataSpec) -> None:
    reader.wrong(f"{spec.chosen_field} and {spec.rejected_field} are the same", "delete the row")


def _unpaired(reader: RowReader, spec: DataSpec) -> Judged:
    pair = spec.completion_field in reader.row or messages_field(reader.row, spec) not in reader.row
    found = _pair(reader, spec) if pair else _chat(reader, spec)
    return Judged(found.prompt, found.completion, reader.truth(spec.label_field), found.tools)


def _prompts(reader: RowReader, spec: DataSpec) -> Question:
    row, name = reader.row, spec.answer_field
    answer = row.get(name)
    if answer is not None and not isinstance(answer, (str, int, float)):
        reader.wrong(f"{name} is {kind_of(answer)}, neither text nor a number", "write what is compared with")
    prompt = asked(reader, spec)
    if prompt and prompt[-1]["role"] == "assistant":
        reader.wrong("the prompt ends with an assistant turn", "drop it: the model is to write it")
    used = {spec.prompt_field, spec.instruction_field, spec.input_field, spec.system_field, messages_field(row, spec)}
    extra = {k: v for k, v in row.items() if k not in {*used, name} and isinstance(v, (str, int, float))}
    return Question(prompt, None if answer is None else str(answer), extra)


def _tokens(reader: RowReader, spec: DataSpec) -> Example:
    ids = reader.ids(spec.ids_field)
    labels = reader.ids("labels") if reader.row.get("labels") is not None else None
    if labels is not None and len(labels) != len(ids) and not reader.problems:
        reader.wrong(f"has {len(labels)} labels for {len(ids)} tokens", "write a label for every token, -100 for none")
    return Example(ids=ids, labels=labels)


READERS: dict[Shape, Callable[[RowReader, DataSpec], Learnable]] = {
    "chat": _chat,
    "alpaca": _alpaca,
    "prompt_completion": _pair,
    "text": _text,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompts": _prompts,
    "tokens": _tokens,
}
