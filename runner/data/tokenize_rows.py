"""Rows → tokens, a chunk at a time, in this process or in several: what is cut, dropped, split or refused is counted.

The other processes get the tokenizer as text and rows as they are; they import neither torch nor transformers.
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
from runner.data.examples import Example, Kind
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
    """What shapes the tokens, besides the tokenizer."""

    loss_on: str
    limit: int
    on_long: str = "truncate"


@dataclass
class ChunkCounts:
    """What became of the rows of a chunk."""

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
        """Note what is wrong with the row at `where`."""
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
    """What `work` makes of a thousand rows at a time, in their order, whatever the number of processes; few are in
    memory at once. `work` is sent to the other processes, so it has a name in a module."""
    processes = num_proc or (1 if len(rows) <= ALONE else max(1, len(_cores())))
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


def _cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


_state: list[tuple[Callable[[ChatTokenizer, Sequence[Any]], Any], ChatTokenizer, Kind | None]] = []


def _begin(work: Callable[[ChatTokenizer, Sequence[Any]], Any], words: ChatTokenizer, kind: Kind | None) -> None:
    """In a process of the pool: keep what every chunk needs."""
    _state[:] = [(work, words, kind)]


def _work(piece: Sequence[Any]) -> Any:
    work, words, kind = _state[0]
    return work(words, _read(piece, kind))


def _read(piece: Sequence[Any], kind: Kind | None) -> Sequence[Any]:
    return piece if kind is None else [decoded(line, kind) for line in piece]
