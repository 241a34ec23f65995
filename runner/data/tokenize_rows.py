"""Rows → tokens, a chunk at a time, in this process or in several: what is cut, dropped, split or refused is counted.

The other processes get the tokenizer as text and rows as they are; they import neither torch nor transformers.
Preferences are marked and cut as TRL's trainers do it (tested).
"""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar, cast

from runner.data.chat_tokenizer import ChatTokenizer, Encoded
from runner.data.examples import Example, Kind, Preference, PromptExample, Tool, Turn, UnpairedExample
from runner.data.loss_mask import IGNORED
from runner.data.row_store import Stored, decoded
from runner.errors import Problem, RequestError

R = TypeVar("R")
T = TypeVar("T")
CHUNK = 1000
ALONE = 20_000
"""Rows up to which one process does it: to start another takes a second, in which one tokenises 3,000 rows."""


@dataclass(frozen=True)
class TokenizeSettings:
    """Settings besides the tokenizer that determine the tokens."""

    loss_on: str
    limit: int
    on_long: str = "truncate"


@dataclass
class ChunkCounts:
    """Counts of kept, cut and dropped rows of a chunk."""

    examples: int = 0
    truncated: int = 0
    """Rows with a sequence that was longer than the limit and lost its end."""
    dropped: int = 0
    """Rows with nothing to learn within the limit, and long ones where nothing may be cut."""
    prompt_differs: int = 0
    """Rows with an answer that does not begin where the template asks for one (`ChatTokenizer.prompt_differs`)."""
    conversations: int = 0
    """Rows that the template rendered."""
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, error: RequestError, where: str) -> None:
        """Note the problem of the row at `where`."""
        self.problems += [Problem(p.what, where or p.source, p.remedy) for p in error.problems]


@dataclass
class TokenChunk(ChunkCounts):
    """Tokens of some rows, one after the other."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    lengths: list[int] = field(default_factory=list)
    split: int = 0
    """Rows that go on in another."""
    unlearned: int = 0
    """Answers that are not learned, because the template drops a part of what they say."""

    def add(self, ids: Sequence[int], labels: Sequence[int], settings: TokenizeSettings) -> None:
        """One row, as `settings` has it."""
        self.examples += 1
        limit = settings.limit
        if len(ids) > limit:
            if settings.on_long == "split":
                self._split(ids, labels, limit)
                return
            if settings.on_long == "drop":
                self.dropped += 1
                return
            self.truncated += 1
        if not self._keep(ids[:limit], labels[:limit]):
            self.dropped += 1

    def take(self, encoded: Encoded, settings: TokenizeSettings) -> None:
        """The same, with what is known of it."""
        self.add(encoded.ids, encoded.labels, settings)
        self.unlearned += encoded.num_dropped
        self.prompt_differs += encoded.prompt_differs

    def _split(self, ids: Sequence[int], labels: Sequence[int], limit: int) -> None:
        """Pieces of `limit` tokens; those with nothing to learn are left out, and the row counts once."""
        kept = [self._keep(ids[at : at + limit], labels[at : at + limit]) for at in range(0, len(ids), limit)]
        self.split += 1
        self.dropped += not any(kept)

    def _keep(self, ids: Sequence[int], labels: Sequence[int]) -> bool:
        if all(label == IGNORED for label in labels[1:]):  # the first token has nothing before it
            return False
        self.ids.extend(ids)
        self.labels.extend(labels)
        self.lengths.append(len(ids))
        return True


def encode_chunk(words: ChatTokenizer, examples: Sequence[Example], settings: TokenizeSettings) -> TokenChunk:
    """Tokens of the examples; those that the template refuses are problems with their place."""
    chunk = TokenChunk()
    chunk.conversations = sum(example.text is None and example.ids is None for example in examples)
    if chunk.conversations:
        words.check_end()
    try:
        found = words.encode_all(examples, settings.loss_on)
    except RequestError:  # one at least: which?
        for example in examples:
            try:
                chunk.take(words.encode(example, settings.loss_on), settings)
            except RequestError as error:
                chunk.refuse(error, example.where)
        return chunk
    for encoded in found:
        chunk.take(encoded, settings)
    return chunk


def in_chunks(
    work: Callable[[ChatTokenizer, Sequence[R]], T], words: ChatTokenizer, rows: Sequence[R], num_proc: int | None
) -> Iterator[T]:
    """Yield the results of `work` for chunks of a thousand rows, in order, with any number of processes and few chunks
    in memory. `work` must be a module-level function."""
    processes = num_proc or (1 if len(rows) <= ALONE else _num_cores())
    kind = rows.kind if isinstance(rows, Stored) else None
    # Rows in a file go to the other processes as they are written there.
    rest: Iterator[Any] = iter(rows) if kind is None else cast("Stored", rows).lines()
    pieces = iter(lambda: list(islice(rest, CHUNK)), [])
    if processes == 1:
        yield from (work(words, _read(piece, kind)) for piece in pieces)
        return
    # Not fork: the caller has torch's threads. One thread each for the tokenizer: the processes share the cores.
    context = multiprocessing.get_context("spawn")
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with ProcessPoolExecutor(processes, context, _begin, (work, words, kind)) as pool:
            waiting: deque[Future[T]] = deque()
            for piece in pieces:
                waiting.append(pool.submit(_work, piece))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_state: list[tuple[Callable[[ChatTokenizer, Sequence[Any]], Any], ChatTokenizer, Kind | None]] = []


def _begin(work: Callable[[ChatTokenizer, Sequence[Any]], Any], words: ChatTokenizer, kind: Kind | None) -> None:
    """In a process of the pool: keep what every chunk needs."""
    _state[:] = [(work, words, kind)]


def _work(piece: Sequence[Any]) -> Any:
    work, words, kind = _state[0]
    return work(words, _read(piece, kind))


def _read(piece: Sequence[Any], kind: Kind | None) -> Sequence[Any]:
    return piece if kind is None else [decoded(line, kind) for line in piece]


Answer = Sequence[Turn] | str
TOOLS = "__tools__"  # not `tools`: a reward function gets that column as it is written


@dataclass(frozen=True)
class PreferenceSettings:
    """Settings besides the tokenizer that determine the columns."""

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
        whole = [words.conversation_text(prompt, answer, tools) for answer in answers if not isinstance(answer, str)]
        texts = [words.prompt_text(prompt, tools), *whole]
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
