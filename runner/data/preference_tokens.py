"""Token ids of preferences, marked answers and prompts, equal to those of TRL's trainers (tested).

With the tokenizer alone, as tokenize_rows.py: the processes that do it import neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Preference, PromptExample, Turn, UnpairedExample
from runner.data.loss_mask import IGNORED
from runner.errors import Problem, RequestError

Answer = Sequence[Turn] | str
TOOLS = "__tools__"  # not `tools`: a reward function gets that column as it is written


@dataclass(frozen=True)
class How:
    """What shapes the columns, besides the tokenizer."""

    limit: int
    """Longest sequence, in tokens."""
    room: int = 1
    """Tokens that a prompt has to leave for an answer within the limit."""
    whole: bool = False
    """A reward model's rows: prompt and answer are one sequence, of which nothing may be cut."""


@dataclass
class Chunk:
    """Some rows as columns."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    examples: int = 0
    truncated: int = 0
    """Rows with a sequence that the trainer cuts."""
    dropped: int = 0
    """Rows that leave no room for an answer; and those that would be cut where nothing may be."""
    tokens: int = 0
    """Within the limit."""
    prompt_differs: int = 0
    """Rows with an answer that does not begin where the template asks for one (`ChatTokenizer.prompt_differs`)."""
    conversations: int = 0
    """Rows that the template rendered."""
    problems: list[Problem] = field(default_factory=list)


def encode_chunk(words: ChatTokenizer, rows: Sequence[Preference | UnpairedExample | PromptExample], how: How) -> Chunk:
    """Columns of the rows; those that the template refuses are problems with their place."""
    chunk = Chunk(conversations=sum(not isinstance(row.prompt, str) for row in rows))
    if chunk.conversations and not how.whole and not isinstance(rows[0], PromptExample):
        words.check_end()  # a reward model answers nothing, and of questions the model's own answers are learned
    for row in rows:
        try:
            columns, lengths = _columns(words, row, how)
        except RequestError as error:
            chunk.problems += [Problem(p.what, row.where or p.source, p.remedy) for p in error.problems]
            continue
        chunk.examples += 1
        if lengths is None:
            chunk.dropped += 1
            continue
        chunk.truncated += any(length > how.limit for length in lengths)
        chunk.tokens += sum(min(length, how.limit) for length in lengths)
        chunk.prompt_differs += _prompt_differs(words, row)
        chunk.rows.append(columns)
    return chunk


def _columns(
    words: ChatTokenizer, row: Preference | UnpairedExample | PromptExample, how: How
) -> tuple[dict[str, Any], Sequence[int] | None]:
    """The columns of a row and the lengths of its sequences; None where it cannot be learned from: TRL drops these,
    too."""
    if isinstance(row, PromptExample):
        # Of a question the words alone: it is rendered and tokenised before every generation (GrpoTrainer).
        asked = words.prompt_ids(row.prompt, row.tools)
        fits = len(asked) + how.room <= how.limit
        turns = words.turns.template.messages(row.prompt)
        columns: dict[str, Any] = {**row.extra, "prompt": turns, "answer": row.answer, TOOLS: row.tools}
        return columns, [len(asked)] if fits else None
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    prompt, parts = split(words, row.prompt, answers, row.tools)
    lengths = [len(prompt) + len(part) for part in parts]
    fits = max(lengths) <= how.limit if how.whole else len(prompt) + how.room <= how.limit
    if how.whole:
        return {"chosen_ids": prompt + parts[0], "rejected_ids": prompt + parts[1]}, lengths if fits else None
    names = ("chosen", "rejected") if isinstance(row, Preference) else ("completion",)
    columns = {"prompt_ids": prompt} | ({"label": row.label} if isinstance(row, UnpairedExample) else {})
    for name, answer, part in zip(names, answers, parts, strict=True):
        spans = others(words, row.prompt, answer, row.tools, len(prompt))
        columns |= {f"{name}_ids": part, f"{name}_given": [edge for span in spans for edge in span]}
    return columns, lengths if fits else None


def _prompt_differs(words: ChatTokenizer, row: Preference | UnpairedExample | PromptExample) -> bool:
    if isinstance(row, PromptExample) or isinstance(row.prompt, str):
        return False
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    turns = [answer for answer in answers if not isinstance(answer, str)]
    return any(words.prompt_differs(row.prompt, answer, row.tools) for answer in turns)


def split(
    words: ChatTokenizer, prompt: Answer, answers: Sequence[Answer], tools: Sequence[dict[str, Any]] = ()
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


def others(
    words: ChatTokenizer, prompt: Answer, answer: Answer, tools: Sequence[dict[str, Any]], start: int
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
