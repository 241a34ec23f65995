"""The row formats: how each is recognised, and how its rows become examples.

    chat                {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}, or `conversations`
    alpaca              {"instruction": "…", "input": "…", "output": "…", "system": "…", "history": [["…", "…"]]}
    prompt_completion   {"prompt": "…", "completion": "…"}       text, or two lists of turns; or `response`, `output`, …
    text                {"text": "…"}
    preference          {"prompt": "…", "chosen": "…", "rejected": "…"}, or both answers with their prompt in them
    unpaired            {"prompt": "…", "completion": "…", "label": true}
    prompts             {"prompt": "…", "answer": "…"}
    tokens              {"input_ids": [1, …], "labels": [-100, …]}

The names of the fields are those of `DataSpec`. A format is an entry of `FORMATS`, and is named in runner/spec/data.py;
one of a user's own is a class outside the package (user_formats.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.data.examples import Example, Kind, Learnable, Preference, PromptExample, Turn, UnpairedExample
from runner.data.loss_mask import IGNORED
from runner.data.readers.files import Row, kind_of
from runner.data.row_parts import (
    answer_turns,
    check_answer,
    check_ends,
    completion_field,
    hh_turns,
    instruction_turns,
    is_turns,
    messages_field,
    prompt_field,
    prompt_turns,
    said_turns,
    turn,
    with_system,
    with_thoughts,
)
from runner.data.row_values import RowReader
from runner.spec import DataSpec

RESERVED = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric",
     "answer", "environment", "environments", "image", "images", "chat_template_kwargs"}
)  # fmt: skip
"""Names that reward functions are given anyway, or that TRL 1.16 takes from a row for something else."""
_LEARNED_MASKS = ("completion_mask", "assistant_masks", "loss_mask")
"""TRL's, transformers' and others' names beside token ids for what is learned."""


def _chat(reader: RowReader, spec: DataSpec) -> Example:
    name = messages_field(reader.row, spec)
    turns = with_system(reader.turns(name), reader, spec)
    cut = _asks(turns)
    check_ends(reader, name, turns[:cut], turns[cut:])
    return Example(turns[:cut], turns[cut:], dialogue=True, tools=reader.tools(spec.tools_field))


def _alpaca(reader: RowReader, spec: DataSpec) -> Example:
    turns = instruction_turns(reader, spec)
    answer = with_thoughts(turn("assistant", reader.text(spec.output_field)), reader, spec)
    tools = reader.tools(spec.tools_field)
    return Example(with_system(turns, reader, spec), [answer], dialogue=len(turns) > 1, tools=tools)


def _pair(reader: RowReader, spec: DataSpec) -> Example:
    row, name = reader.row, completion_field(reader.row, spec)
    asked_in = prompt_field(row, spec) or spec.prompt_field
    both = is_turns(row.get(asked_in)) and is_turns(row.get(name))  # a cell of CSV that is JSON alone may be an answer
    as_turns = both or isinstance(row.get(asked_in), list) or isinstance(row.get(name), list)
    prompt, completion = prompt_turns(reader, spec, as_turns), answer_turns(reader, name, as_turns)
    if as_turns:
        check_ends(reader, name, prompt, completion)
    elif len(completion) == 1:
        completion = [with_thoughts(completion[0], reader, spec)]
    return Example(prompt, completion, tools=reader.tools(spec.tools_field))


def _text(reader: RowReader, spec: DataSpec) -> Example:
    return Example(text=reader.text(spec.text_field))


def _preference(reader: RowReader, spec: DataSpec) -> Preference:
    row, names = reader.row, (spec.chosen_field, spec.rejected_field)
    values = [row.get(name) for name in names]
    alone = prompt_field(row, spec) is None
    whole = _conversations(values, row.get(prompt_field(row, spec) or ""), alone)
    if alone and not whole and all(isinstance(value, str) and not is_turns(value) for value in values):
        return _common_text(reader, spec)
    if whole:
        reader.read |= {*names, spec.prompt_field}
        chosen, rejected, alone = *whole, True
    else:
        turns = all(map(is_turns, values)) and _repeats(values, row.get(prompt_field(row, spec) or ""))
        chosen, rejected = (answer_turns(reader, name, turns or isinstance(row.get(name), list)) for name in names)
    prompt = [] if alone else prompt_turns(reader, spec)
    if chosen and chosen[0]["role"] != "assistant":  # whole conversations: the prompt is what they share
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        begun, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        prompt = _begun(prompt, begun, reader, spec)
    for name, answer in zip(names, (chosen, rejected), strict=True):
        check_answer(reader, name, answer)
        _weighs(reader, name, answer)
    check_ends(reader, spec.chosen_field, prompt, chosen)
    if chosen == rejected and not reader.problems:
        _are_the_same(reader, spec)
    return Preference(prompt, chosen, rejected, reader.tools(spec.tools_field))


def _conversations(values: Sequence[object], prompt: object, alone: bool) -> list[list[Turn]]:
    """HH-RLHF's two conversations, each as one text, where the whole row is such; else none."""
    if not all(isinstance(value, str) and (alone or value.startswith(str(prompt))) for value in values):
        return []
    whole = [hh_turns(str(value)) for value in values]
    return whole if all(whole) else []


def _repeats(values: Sequence[object], prompt: object) -> bool:
    """JSON text of turns is a conversation; where others speak in it and none says the prompt, it is what the assistant
    wrote."""
    if not isinstance(prompt, str) or is_turns(prompt) or not all(isinstance(value, str) for value in values):
        return True
    turns = [said for value in values for said in said_turns(value)]
    others = [said for said in turns if said.get("role", said.get("from")) not in ("assistant", "gpt", "model")]
    texts = [said.get("content", said.get("value")) for said in others]
    return not texts or prompt.strip() in [text.strip() for text in texts if isinstance(text, str)]


def _begun(prompt: list[Turn], begun: list[Turn], reader: RowReader, spec: DataSpec) -> list[Turn]:
    """The prompt where the answers begin with one as well: the same, a part of it, or what goes before it."""
    own, said = (_unsystematic(turns) for turns in (prompt, begun))
    if reader.problems or not own:
        return with_system(begun, reader, spec) if not prompt else [*_systems(prompt, begun, reader, spec), *said]
    if own[-1]["role"] == "assistant":
        said = [*own, *said]
    elif said and own[-len(said) :] == said:
        said = own
    elif own != said[: len(own)] and not (len(own) == 1 and any(own[0]["content"] == t["content"] for t in said)):
        what = f"{spec.prompt_field} is not what {spec.chosen_field} and {spec.rejected_field} begin with"
        reader.wrong(what, f"write data.ignore_columns=[{spec.prompt_field}], or leave the prompt out of both answers")
    return [*_systems(prompt, begun, reader, spec), *said]


def _unsystematic(turns: list[Turn]) -> list[Turn]:
    return [said for said in turns if said["role"] != "system"]


def _systems(prompt: list[Turn], begun: list[Turn], reader: RowReader, spec: DataSpec) -> list[Turn]:
    """The system turn of either; a problem where both have one and they differ."""
    first, second = ([said for said in turns if said["role"] == "system"] for turns in (prompt, begun))
    if first and second and first != second and first[0]["content"] != spec.system_prompt:
        what = f"{spec.prompt_field} and {spec.chosen_field} have different system turns"
        reader.wrong(what, "write the same in both")
    return second or first


def _weighs(reader: RowReader, name: str, answer: list[Turn]) -> None:
    if any(not said.get("weight", 1) for said in answer):
        what = f"{name} has a turn that is not to be learned, and answers are compared as a whole"
        reader.wrong(what, "put turns that are not learned into the prompt")


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


def _unpaired(reader: RowReader, spec: DataSpec) -> UnpairedExample:
    row = reader.row
    instructed_alone = spec.completion_field not in row and {spec.instruction_field, spec.output_field} <= row.keys()
    conversation = completion_field(row, spec) not in row and messages_field(row, spec) in row
    found = (_chat if conversation else _alpaca if instructed_alone else _pair)(reader, spec)
    _weighs(reader, completion_field(row, spec), found.completion)
    return UnpairedExample(found.prompt, found.completion, reader.truth(spec.label_field), found.tools)


def prompts_of(reader: RowReader, spec: DataSpec) -> PromptExample:
    """All columns but the prompt go to the reward functions as they are."""
    row = reader.row
    pair = _preference(reader, spec).prompt if {spec.chosen_field, spec.rejected_field} <= row.keys() else None
    prompt = pair if isinstance(pair, list) else prompt_turns(reader, spec)
    name = next((name for name in (spec.answer_field, spec.completion_field, spec.output_field) if name in row), None)
    answer = reader.value(name) if name else None
    if name and (turns := said_turns(answer)):
        if isinstance(answer, str):  # JSON text: a key that occurs twice is told
            reader.parsed(name, answer, "write turns")
        answer = turns[-1].get("content")
    elif not name and prompt_field(row, spec) == messages_field(row, spec):
        last = _asks(prompt)  # a whole conversation: its last answer is the one to compare with
        answer, prompt = (prompt[last]["content"] if last < len(prompt) else None), prompt[:last]
    if isinstance(answer, dict):
        reader.wrong(f"{name} is {kind_of(answer)}, neither text nor a number", "write what is compared with")
    if prompt and prompt[-1]["role"] == "assistant":
        reader.wrong("the prompt ends with an assistant turn", "drop it: the model is to write it")
    return PromptExample(prompt, _passable(answer), passed_on(reader), reader.tools(spec.tools_field))


def _asks(turns: list[Turn]) -> int:
    """How many turns there are up to the last that is not the assistant's."""
    return max((i for i, said in enumerate(turns, 1) if said["role"] != "assistant"), default=0)


def passed_on(reader: RowReader) -> dict[str, Any]:
    """Return the fields of a row for the reward functions, with their types; values without a JSON type as text."""
    found = {name: _passable(value) for name, value in reader.row.items() if name not in RESERVED}
    for name, value in found.items():
        reader.check_characters(name, value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            reader.wrong(f"{name} is a whole number of more than 64 bits", "write it as text")
    return found


def _passable(value: Any) -> Any:
    """The value in JSON's types."""
    if isinstance(value, dict):
        return {str(name): _passable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_passable(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _tokens(reader: RowReader, spec: DataSpec) -> Example:
    ids = reader.ids(spec.ids_field)
    labels = reader.ids("labels") if reader.row.get("labels") is not None else None
    if labels is not None and len(labels) != len(ids) and not reader.problems:
        reader.wrong(f"has {len(labels)} labels for {len(ids)} tokens", "write a label for every token, -100 for none")
    learned, given = (_mask(reader, names, len(ids)) for names in (_LEARNED_MASKS, ("attention_mask",)))
    if not all(learned):
        labels = [label if flag else IGNORED for label, flag in zip(labels or ids, learned, strict=False)]
    if not all(given):  # padding
        ids, labels = ([x for x, flag in zip(row, given, strict=False) if flag] for row in (ids, labels or ids))
        reader.wrong("attention_mask leaves out every token", "delete the row") if not ids else None
    return Example(ids=ids, labels=labels)


def _mask(reader: RowReader, names: Sequence[str], size: int) -> list[bool]:
    """Of every token, whether all the columns of 0 and 1 that are there keep it."""
    kept = [True] * size
    for name in names:
        flags = reader.value(name)
        if flags is None:
            continue
        if not isinstance(flags, list) or len(flags) != size or not all(flag in (0, 1) for flag in flags):
            reader.wrong(f"{name} is not a 0 or a 1 for each of {size} tokens", "correct it, or delete the column")
            continue
        kept = [one and bool(flag) for one, flag in zip(kept, flags, strict=True)]
    return kept


# ── how a format is recognised ─────────────────────────────────────────────────────────────────


def _is_tokens(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    """Token ids go before all else where they can be learned, and after it where answers are judged."""
    others = (known for name, known in FORMATS.items() if name != "tokens")
    first = kind in (None, "sft")
    return spec.ids_field in row and (first or not any(known.fits(row, spec, kind) for known in others))


def _is_preference(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    return {spec.chosen_field, spec.rejected_field} <= row.keys()


def _is_unpaired(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    """A column `label` is common and seldom a judgement: it counts where the objective learns from one."""
    return kind == "unpaired" and spec.label_field in row


def _is_chat(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    return kind != "prompts" and messages_field(row, spec) in row


def _is_alpaca(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    whole = {spec.instruction_field, spec.output_field} <= row.keys()
    return kind != "prompts" and whole and spec.completion_field not in row


def _is_prompts(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    if kind == "prompts":
        return prompt_field(row, spec) is not None
    named = {spec.prompt_field, spec.answer_field} <= row.keys() and spec.completion_field not in row
    return named and completion_field(row, spec) in (spec.answer_field, spec.completion_field)


def _is_pair(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    answered = spec.completion_field in row or completion_field(row, spec) in row
    return prompt_field(row, spec) is not None and answered


def _is_text(row: Row, spec: DataSpec, kind: Kind | None) -> bool:
    return spec.text_field in row


@dataclass(frozen=True)
class Format:
    """A row format."""

    fits: Callable[[Row, DataSpec, Kind | None], bool]
    """Whether a row has it, for an objective that learns from `kind` (None: any)."""
    read: Callable[[RowReader, DataSpec], Learnable]
    """The example; what is wrong with the row is noted in its reader."""


FORMATS: dict[str, Format] = {
    "tokens": Format(_is_tokens, _tokens),
    "preference": Format(_is_preference, _preference),
    "unpaired": Format(_is_unpaired, _unpaired),
    "chat": Format(_is_chat, _chat),
    "alpaca": Format(_is_alpaca, _alpaca),
    "prompts": Format(_is_prompts, prompts_of),
    "prompt_completion": Format(_is_pair, _pair),
    "text": Format(_is_text, _text),
}
"""By their names, the most specific first: a row has the first one that fits."""
