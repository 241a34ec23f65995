"""Parts that row formats share: prompt, system turn, answer, and the end of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress

from runner.config import json_text
from runner.data.columns import ANSWERS, PROMPTS, SYSTEMS
from runner.data.examples import Turn
from runner.data.readers.files import Row
from runner.data.row_values import CONTENT_KEYS, ROLE_KEYS, THOUGHTS, RowReader
from runner.spec import DataSpec

SHAREGPT = "conversations"
_NO_INPUT = "<noinput>"
"""Stanford Alpaca's prompt for making rows has it where a task needs no input, and it is left in some of them."""
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \n]?")
"""Anthropic's HH-RLHF: a whole conversation as one text, `\\n\\nHuman: …\\n\\nAssistant: …`."""


def messages_field(row: Row, spec: DataSpec) -> str:
    """Return the field with the turns: the named one, or ShareGPT's."""
    return _first(row, (spec.messages_field, SHAREGPT)) or spec.messages_field


def prompt_field(row: Row, spec: DataSpec) -> str | None:
    """Return the field with the prompt: the named one, a conversation, an instruction, or a common name."""
    return _first(row, (spec.prompt_field, messages_field(row, spec), spec.instruction_field, *PROMPTS))


def completion_field(row: Row, spec: DataSpec) -> str:
    """Return the field with the answer: the named one, or a common name."""
    named = spec.completion_field
    own = any(
        getattr(spec, key) != type(spec).model_fields[key].default for key in ("completion_field", "output_field")
    )
    if row.get(named) is not None or own:  # a name that no row has is an error, not another name's leave
        return named
    return next((name for name in ANSWERS if isinstance(row.get(name), (str, list, dict))), named)


def _first(row: Row, names: Sequence[str]) -> str | None:
    """The first of the columns that holds something, or else that is there: a table of several kinds of rows has nulls
    in the columns of the others."""
    there = [name for name in names if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def turn(role: str, content: str) -> Turn:
    """A turn of plain text."""
    return {"role": role, "content": content}


def with_system(turns: list[Turn], reader: RowReader, spec: DataSpec) -> list[Turn]:
    """The row's own system prompt, or else `data.system_prompt`, before turns that have none."""
    name = next((name for name in (spec.system_field, *SYSTEMS) if reader.row.get(name)), spec.system_field)
    prompt = reader.optional(name)
    own = [turn["content"] for turn in turns if turn["role"] == "system"]
    if own and prompt.strip() and prompt.strip() not in "\n".join(own):
        remedy = f"write data.ignore_columns=[{name}] to take the turn"
        reader.wrong(f"{name} and the system turn of the conversation are not the same", remedy)
    prompt = prompt if prompt.strip() else spec.system_prompt or ""
    return turns if own or not prompt else [turn("system", prompt), *turns]


def prompt_turns(reader: RowReader, spec: DataSpec, as_turns: bool = False) -> list[Turn]:
    """The prompt of a row: text or turns; an instruction with its input; or a conversation."""
    name = prompt_field(reader.row, spec) or spec.prompt_field
    value = reader.row.get(name)
    if name == spec.instruction_field and not is_turns(value):
        turns = instruction_turns(reader, spec)
    elif as_turns or name == messages_field(reader.row, spec) or is_turns(value):
        turns = reader.turns(name)
    elif isinstance(value, str) and value.rstrip().endswith("\n\nAssistant:") and (said := hh_turns(value)):
        reader.read.add(name)
        turns = said[:-1]  # the last one is still to be spoken
    else:
        turns = [turn("user", reader.text(name))]
    return with_system(turns, reader, spec)


def instruction_turns(reader: RowReader, spec: DataSpec) -> list[Turn]:
    """Alpaca's task with its input, after the pairs of its history."""
    turns: list[Turn] = []
    history = reader.value(spec.history_field)
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
    return [*turns, turn("user", f"{task}\n\n{about}" if about.strip() not in ("", _NO_INPUT) else task)]


def answer_turns(reader: RowReader, name: str, as_turns: bool = False) -> list[Turn]:
    """An answer: text, one turn, or turns; text is never taken apart."""
    value = reader.row.get(name)
    if isinstance(value, dict) and _is_turn(value):
        reader.row = {**reader.row, name: [value]}
        return reader.turns(name, whole=False)
    return reader.turns(name, whole=False) if as_turns else [turn("assistant", reader.text(name))]


def with_thoughts(answer: Turn, reader: RowReader, spec: DataSpec) -> Turn:
    """The answer with what the row says was thought before it."""
    name = next((name for name in (spec.thinking_field, *THOUGHTS) if reader.row.get(name)), spec.thinking_field)
    thought = reader.optional(name)
    return {**answer, "reasoning_content": thought} if thought.strip() else answer


def hh_turns(text: str) -> list[Turn]:
    """Turns of an HH-RLHF conversation, which Human begins and Assistant has a part in; none where it is no such."""
    marks = list(_SPEAKER.finditer(text))
    if not marks or marks[0].start() or marks[0][1] != "Human" or all(mark[1] == "Human" for mark in marks):
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    said = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    return [turn("user" if who == "Human" else "assistant", content) for who, content in said]


def is_turns(value: object) -> bool:
    """A list, which has to be one of turns, or the JSON text of turns, which is how CSV holds them."""
    return isinstance(value, list) or bool(said_turns(value))


def said_turns(value: object) -> list[Row]:
    """Turns as they are written, in a list or its JSON text; none where the value is something else."""
    if isinstance(value, str) and value.startswith("[{") and value.endswith("}]"):
        with suppress(json.JSONDecodeError):
            value = json_text.loads(value)
    return value if isinstance(value, list) and all(map(_is_turn, value)) else []


def _is_turn(value: object) -> bool:
    if not isinstance(value, dict) or value.keys().isdisjoint(ROLE_KEYS):
        return False
    return not value.keys().isdisjoint((*CONTENT_KEYS, "tool_calls", "function_call"))


def check_answer(reader: RowReader, name: str, completion: Sequence[Turn]) -> None:
    """The assistant says something, and speaks last."""
    if reader.problems:
        return  # turns are missing already
    if not completion or completion[-1]["role"] != "assistant":
        reader.wrong(f"{name} does not end with an assistant turn", "add the answer, or drop the last turn")
    elif not completion[-1]["content"] and len(completion[-1]) == 2:  # of a conversation that came as one text
        reader.wrong(f"{name} ends with an empty turn", "fill it in, or delete the row")


def check_ends(reader: RowReader, name: str, prompt: Sequence[Turn], completion: Sequence[Turn]) -> None:
    """A conversation asks first and ends with an answer."""
    check_answer(reader, name, completion)
    if not reader.problems and all(turn["role"] == "system" for turn in prompt):
        reader.wrong(f"{name} has no user turn before the answer", "put the question first")
