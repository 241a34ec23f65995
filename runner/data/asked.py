"""Parts that shapes share: the prompt of a row, its system turn, an answer, and how a conversation ends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from runner.data.examples import Turn
from runner.data.files import Row
from runner.data.rows import RowReader
from runner.spec import DataSpec

SHAREGPT = "conversations"
HH = re.compile(r"\s*\b(Human|Assistant):[ \n]?")
"""Anthropic's HH-RLHF: a whole conversation as one text, `\\n\\nHuman: …\\n\\nAssistant: …`."""


def messages_field(row: Row, spec: DataSpec) -> str:
    """Where the turns of a conversation are: the field that is named, or else ShareGPT's."""
    return SHAREGPT if spec.messages_field not in row and SHAREGPT in row else spec.messages_field


def turn(role: str, content: str) -> Turn:
    """A turn of plain text."""
    return {"role": role, "content": content}


def with_system(turns: list[Turn], reader: RowReader, spec: DataSpec) -> list[Turn]:
    """The row's own system prompt, or else `data.system_prompt`, before turns that have none."""
    prompt = reader.optional(spec.system_field)
    prompt = prompt if prompt.strip() else spec.system_prompt or ""
    if not prompt or any(turn["role"] == "system" for turn in turns):
        return turns
    return [turn("system", prompt), *turns]


def asked(reader: RowReader, spec: DataSpec, as_turns: bool = False) -> list[Turn]:
    """The prompt of a row: text or turns; else an instruction with its input; else a conversation."""
    row, name = reader.row, spec.prompt_field
    if name not in row and messages_field(row, spec) in row:
        turns = reader.turns(messages_field(row, spec))
    elif name not in row and spec.instruction_field in row:
        turns = instructed(reader, spec)
    elif as_turns or is_turns(row.get(name)):
        turns = reader.turns(name)
    else:
        turns = [turn("user", reader.text(name))]
    return with_system(turns, reader, spec)


def instructed(reader: RowReader, spec: DataSpec) -> list[Turn]:
    """Alpaca's task with its input, after the pairs of its history."""
    turns: list[Turn] = []
    history = reader.row.get(spec.history_field)
    pairs = history if isinstance(history, list) else []
    if history and not isinstance(history, list):
        reader.wrong(f"{spec.history_field} is no list of pairs", 'write [["question", "answer"], …]')
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            reader.wrong(f"{spec.history_field}[{index}] is no pair", 'write ["question", "answer"]')
            continue
        question, answer = (reader.content(f"{spec.history_field}[{index}][{n}]", said) for n, said in enumerate(pair))
        turns += [turn("user", question), turn("assistant", answer)]
    task, about = reader.text(spec.instruction_field), reader.optional(spec.input_field)
    return [*turns, turn("user", f"{task}\n\n{about}" if about.strip() else task)]


def answered(reader: RowReader, name: str, as_turns: bool = False) -> list[Turn]:
    """An answer: text, turns, one turn, or a whole conversation, which HH-RLHF writes as one text."""
    value = reader.row.get(name)
    if isinstance(value, dict) and not value.keys().isdisjoint(("role", "from")):
        reader.row = {**reader.row, name: [value]}
        return reader.turns(name, whole=False)
    if as_turns or is_turns(value):
        return reader.turns(name, whole=False)
    text = reader.text(name)
    marks = list(HH.finditer(text))
    if not marks or marks[0].start() or marks[0][1] != "Human":
        return [turn("assistant", text)]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    said = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    if not said[-1][1]:
        reader.wrong(f"{name} ends with an empty turn", "fill it in, or delete the row")
    return [turn("user" if who == "Human" else "assistant", content) for who, content in said]


def is_turns(value: Any) -> bool:
    """A list of turns, or the JSON text of one, which is how CSV holds it."""
    return isinstance(value, list) or (isinstance(value, str) and value.startswith('[{"') and value.endswith("}]"))


def check_ends(
    reader: RowReader, name: str, prompt: Sequence[Turn], completion: Sequence[Turn], unasked: bool = False
) -> None:
    """A conversation asks first (where it is not `unasked`) and ends with an answer."""
    if reader.problems:
        return  # turns are missing already
    if not completion or completion[-1]["role"] != "assistant":
        reader.wrong(f"{name} does not end with an assistant turn", "add the answer, or drop the last turn")
    elif not unasked and all(turn["role"] == "system" for turn in prompt):
        reader.wrong(f"{name} has no user turn before the answer", "put the question first")
