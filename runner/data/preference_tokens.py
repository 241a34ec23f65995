"""Token ids of preferences, marked answers and prompts, equal to those of TRL's trainers (tested).

With the tokenizer alone, as tokenize_rows.py: the processes that do it import neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Preference, PromptExample, Tool, Turn, UnpairedExample
from runner.data.loss_mask import IGNORED
from runner.data.tokenize_rows import ChunkCounts
from runner.errors import RequestError

Answer = Sequence[Turn] | str
TOOLS = "__tools__"  # not `tools`: a reward function gets that column as it is written


@dataclass(frozen=True)
class PreferenceSettings:
    """What shapes the columns, besides the tokenizer."""

    limit: int
    """Longest sequence, in tokens."""
    room: int = 1
    """Tokens that a prompt has to leave for an answer within the limit."""
    whole: bool = False
    """A reward model's rows: prompt and answer are one sequence, of which nothing may be cut."""


@dataclass
class PreferenceChunk(ChunkCounts):
    """Some rows as columns; those that leave no room for an answer are dropped."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: int = 0
    """Within the limit."""


def encode_preferences(
    words: ChatTokenizer, rows: Sequence[Preference | UnpairedExample | PromptExample], settings: PreferenceSettings
) -> PreferenceChunk:
    """Columns of the rows; those that the template refuses are problems with their place."""
    chunk = PreferenceChunk(conversations=sum(not isinstance(row.prompt, str) for row in rows))
    if chunk.conversations and not settings.whole and not isinstance(rows[0], PromptExample):
        words.check_end()  # a reward model answers nothing, and of questions the model's own answers are learned
    for row in rows:
        try:
            columns, lengths = _columns(words, row, settings)
        except RequestError as error:
            chunk.refuse(error, row.where)
            continue
        chunk.examples += 1
        if lengths is None:
            chunk.dropped += 1
            continue
        chunk.truncated += any(length > settings.limit for length in lengths)
        chunk.tokens += sum(min(length, settings.limit) for length in lengths)
        chunk.prompt_differs += _prompt_differs(words, row)
        chunk.rows.append(columns)
    return chunk


def _columns(
    words: ChatTokenizer, row: Preference | UnpairedExample | PromptExample, settings: PreferenceSettings
) -> tuple[dict[str, Any], Sequence[int] | None]:
    """The columns of a row and the lengths of its sequences; None where it cannot be learned from: TRL drops these,
    too."""
    if isinstance(row, PromptExample):
        # Of a question the words alone: it is rendered and tokenised before every generation (GrpoTrainer).
        asked = words.prompt_ids(row.prompt, row.tools)
        fits = len(asked) + settings.room <= settings.limit
        turns = words.turns.template.messages(row.prompt)
        columns: dict[str, Any] = {**row.extra, "prompt": turns, "answer": row.answer, TOOLS: row.tools}
        return columns, [len(asked)] if fits else None
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    prompt, parts = split_prompt(words, row.prompt, answers, row.tools)
    lengths = [len(prompt) + len(part) for part in parts]
    fits = max(lengths) <= settings.limit if settings.whole else len(prompt) + settings.room <= settings.limit
    if settings.whole:
        return {"chosen_ids": prompt + parts[0], "rejected_ids": prompt + parts[1]}, lengths if fits else None
    names = ("chosen", "rejected") if isinstance(row, Preference) else ("completion",)
    columns = {"prompt_ids": prompt} | ({"label": row.label} if isinstance(row, UnpairedExample) else {})
    for name, answer, part in zip(names, answers, parts, strict=True):
        spans = given_spans(words, row.prompt, answer, row.tools, len(prompt))
        columns |= {f"{name}_ids": part, f"{name}_given": [edge for span in spans for edge in span]}
    return columns, lengths if fits else None


def _prompt_differs(words: ChatTokenizer, row: Preference | UnpairedExample | PromptExample) -> bool:
    if isinstance(row, PromptExample) or isinstance(row.prompt, str):
        return False
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    turns = [answer for answer in answers if not isinstance(answer, str)]
    return any(words.prompt_differs(row.prompt, answer, row.tools) for answer in turns)


def split_prompt(
    words: ChatTokenizer, prompt: Answer, answers: Sequence[Answer], tools: Sequence[Tool] = ()
) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt [p] and of each answer to it: an answer begins where prompt and conversation part, which a
    template or a merged token may put before the prompt's end (`common_prefix_length`, TRL 1.16)."""
    if isinstance(prompt, str):
        texts = [prompt, *(prompt + words.ended(str(answer)) for answer in answers)]
    else:
        turns = [answer for answer in answers if not isinstance(answer, str)]
        texts = [
            words.prompt_text(prompt, tools),
            *(words.conversation_text(prompt, answer, tools) for answer in turns),
        ]
    asked, *conversations = words.token_ids(texts, special=isinstance(prompt, str))
    start = min(_same(asked, ids) for ids in conversations)
    return asked[:start], [ids[start:] for ids in conversations]


def given_spans(
    words: ChatTokenizer, prompt: Answer, answer: Answer, tools: Sequence[Tool], start: int
) -> list[tuple[int, int]]:
    """[begin, end) of the tokens inside an answer that users and tools say, counted from its first token, `start` of
    the whole. They are given, not answered: no objective takes their probability. RequestError where they cannot be
    told from the assistant's."""
    if isinstance(prompt, str) or isinstance(answer, str) or all(turn["role"] == "assistant" for turn in answer):
        return []
    labels = words.encode(Example([*prompt], [*answer], tools=[*tools]), "completion").labels[start:]
    learned = [index for index, label in enumerate(labels) if label != IGNORED]
    edges = zip([-1, *learned], learned, strict=False)  # what is behind the last one counts, as in any other answer
    return [(before + 1, after) for before, after in edges if before + 1 < after]


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
