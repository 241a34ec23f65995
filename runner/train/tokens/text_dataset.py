"""Plain text → token ids, concatenated and cut into sequences of equal length; nothing lost or padded.

A document ends with the tokenizer's end of text. One longer than what is left of a sequence goes on in the next; what
of several documents lies in one sequence does not attend to one another (`seq_lengths`, from which TRL makes
positions). Read, tokenised and written as a stream: memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets.arrow_writer import ArrowWriter

from runner.data.chat_tokenizer import with_bos, with_eos
from runner.data.examples import Example, fingerprint
from runner.data.pretraining.sharder import lines_of
from runner.data.pretraining.workspace import manifest_of
from runner.errors import Problem, RequestError
from runner.spec import RunSpec
from runner.train.tokens.token_cache import ROWS, OnProgress, Tokenised, cached_rows, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 512
"""Documents that the tokenizer is given together: it spreads them over the cores."""


class Shards:
    """The documents of a folder of shards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, manifest_of(folder)

    def __len__(self) -> int:
        return int(self.manifest.get("lines", 0))

    def __iter__(self) -> Iterator[str]:
        return lines_of(self.folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' own; empty without any."""
        digests = [shard["sha256"] for shard in self.manifest.get("shards", [])]
        return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def tokenise(
    documents: Shards | Sequence[Example], tokenizer: PreTrainedTokenizerBase, spec: RunSpec,
    on_progress: OnProgress | None = None, *, held: bool = False,
) -> Tokenised:  # fmt: skip
    """The rows of a run, or those in the cache; RequestError where there is no token to learn.

    `held`: rows that are measured. What is learned of a document must not depend on packing then: one that does not fit
    into what is left of a sequence begins the next.
    """
    own = documents.fingerprint if isinstance(documents, Shards) else fingerprint(documents)
    parts = ["text", own, tokenizer_fingerprint(tokenizer), spec.train.max_length, spec.train.packing, held]
    return cached_rows(parts, lambda folder: _write(documents, tokenizer, spec, folder, on_progress, held))


def _write(
    documents: Shards | Sequence[Example], tokenizer: PreTrainedTokenizerBase, spec: RunSpec, folder: Path,
    on_progress: OnProgress | None, held: bool,
) -> dict[str, Any]:  # fmt: skip
    """Rows of the entry into `folder`; its facts."""
    limit, packing = spec.train.max_length, spec.train.packing
    texts: Iterable[str] = documents if isinstance(documents, Shards) else map(_text, documents)
    rows = tokens = 0
    with ArrowWriter(path=str(folder / ROWS)) as writer:
        shown = _with_progress(texts, len(documents), on_progress)
        for row in cut_into_sequences(shown, tokenizer, limit, packing, whole=held):
            writer.write(row)
            rows, tokens = rows + 1, tokens + len(row["input_ids"])
        if not rows:
            raise RequestError(Problem("the text holds no token to learn", "data", "name another source"))
        writer.finalize()
    return {
        "num_examples": len(documents),
        "num_tokens": tokens,
        "packing_efficiency": tokens / (rows * limit) if packing else None,
    }


def _with_progress(texts: Iterable[str], total: int, on_progress: OnProgress | None) -> Iterator[str]:
    """The same texts; calls `on_progress` as they are taken."""
    for number, text in enumerate(texts):
        if on_progress is not None and number % DOCUMENTS_AT_ONCE == 0:
            on_progress(number, total)
        yield text
    if on_progress is not None:
        on_progress(total, total)


def cut_into_sequences(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int, packing: bool, whole: bool = False
) -> Iterator[dict[str, list[int]]]:
    """Rows of `input_ids` and `labels`, [limit] each but for the last; packed ones with `seq_lengths`.

    `whole`: only a document longer than `limit` goes on in the next row, and rows need not be full.
    """
    ids: list[int] = []
    parts: list[int] = []
    for document in _encoded(texts, tokenizer):
        if whole and ids and len(document) > limit - len(ids):
            yield _row(ids, parts, packing)
            ids, parts = [], []
        while document:
            taken = document[: limit - len(ids)]
            document = document[len(taken) :]
            ids, parts = ids + taken, [*parts, len(taken)]
            if len(ids) == limit or not packing:
                yield _row(ids, parts, packing)
                ids, parts = [], []
    if len(ids) > 1:  # one token alone has nothing before it
        yield _row(ids, parts, packing)


def _row(ids: list[int], parts: list[int], packing: bool) -> dict[str, list[int]]:
    row = {"input_ids": ids, "labels": list(ids)}
    return row | {"seq_lengths": parts} if packing else row


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Ids of every document, with the one that ends it."""
    stream = iter(texts)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    while some := list(islice(stream, DOCUMENTS_AT_ONCE)):
        for ids in tokenizer(some)["input_ids"]:
            yield with_eos(with_bos(ids, begin), end)


def _text(example: Example) -> str:
    if example.text is None:
        what = "objective=pretrain learns plain text, and the rows are conversations"
        raise RequestError(Problem(what, "data", "write objective=sft, or data.format=text data.text_field=…"))
    return example.text
