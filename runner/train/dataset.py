"""Examples → token ids and labels, packed, cached by content.

A cached set is found again only if the examples, the tokenizer, its chat template and every
setting that shapes the tokens are the same; so a changed tokenizer never meets old tokens.

Tokens go to disk as they come and are mapped into memory from there: a million rows take no more of it than a thousand.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from runner.data.encoding import How, encoded_chunks
from runner.data.examples import Example, Turn, fingerprint
from runner.data.files import refuse
from runner.data.packing import bins
from runner.data.words import IGNORED, Words
from runner.errors import Problem, RequestError
from runner.folders import cached
from runner.paths import cache_dir
from runner.spec import RunSpec, Sft

__all__ = ["IGNORED", "Tokenised", "chat_ids", "encode", "line_of", "tokenise", "tokenizer_fingerprint"]

LAYOUT = 2  # raise it when what is stored changes shape: old entries are then left alone
SEQUENCES_AT_ONCE = 1000
Tell = Callable[[int, int], None]
"""Told after every chunk: rows done, rows in all."""


@dataclass(frozen=True)
class Tokenised:
    """Token ids ready for the trainer, and what was found on the way."""

    rows: Dataset
    """`input_ids` [s], `labels` [s], and `seq_lengths` where packed."""
    num_examples: int
    num_truncated: int
    num_dropped: int
    """Examples without a token to learn, after cutting to the longest length."""
    num_split: int
    """Examples that were longer and go on in another row."""
    num_refused: int
    """Examples that the template refuses, skipped under `data.on_error=skip`."""
    num_tokens: int
    packing_efficiency: float | None
    """Share of the positions in packed sequences that hold tokens; None without packing."""
    from_cache: bool


def tokenise(examples: Sequence[Example], tokenizer: Any, spec: RunSpec, tell: Tell | None = None) -> Tokenised:
    """Tokenise and pack, or take from the cache.

    RequestError with every row that the template refuses (unless `data.on_error=skip`), or if nothing is left to learn.
    """
    disable_progress_bar()
    folder = cache_dir() / "tokenised" / _key(examples, tokenizer, spec)
    stored = _read(folder)
    from_cache = stored is not None
    if stored is None:
        _build(examples, tokenizer, spec, folder, tell)
        stored = _read(folder)
        assert stored is not None
    rows, facts = stored
    return Tokenised(rows=rows, from_cache=from_cache, **facts)


def _key(examples: Sequence[Example], tokenizer: Any, spec: RunSpec) -> str:
    parts = [
        LAYOUT,
        fingerprint(examples),
        tokenizer_fingerprint(tokenizer),
        spec.train.max_length,
        spec.train.packing,
        _loss_on(spec),
        spec.data.on_long,
        spec.data.on_error,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _loss_on(spec: RunSpec) -> str:
    return spec.objective.loss_on if isinstance(spec.objective, Sft) else "all"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over everything that decides a token id: vocabulary, merges, added tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        type(tokenizer).__name__,
        body,
        str(tokenizer.chat_template),
        sorted(tokenizer.special_tokens_map.items()),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _read(folder: Path) -> tuple[Dataset, dict[str, Any]] | None:
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        rows = Dataset.from_file(str(folder / "rows.arrow"))
    except (OSError, ValueError):
        return None
    return rows, facts


def _build(examples: Sequence[Example], tokenizer: Any, spec: RunSpec, folder: Path, tell: Tell | None) -> None:
    """Write one cache entry, whole or not at all; two runs may build the same one at once."""
    with cached(folder, lambda: _read(folder) is not None) as temporary:
        facts = _write(examples, tokenizer, spec, temporary, tell)
        (temporary / "facts.json").write_text(json.dumps(facts), "utf-8")


def _write(
    examples: Sequence[Example], tokenizer: Any, spec: RunSpec, folder: Path, tell: Tell | None
) -> dict[str, Any]:
    """Rows of the entry into `folder`; its facts."""
    limit = spec.train.max_length
    how = How(_loss_on(spec), limit, spec.data.on_long)
    counts = dict.fromkeys(("truncated", "dropped", "split"), 0)
    done = refused = 0
    lengths = array("i")
    problems: list[Problem] = []
    ids_file, labels_file = folder / "ids", folder / "labels"
    with ids_file.open("wb") as ids, labels_file.open("wb") as labels:
        for chunk in encoded_chunks(Words.of(tokenizer), examples, len(examples), how, spec.data.num_proc):
            chunk.ids.tofile(ids)
            chunk.labels.tofile(labels)
            lengths.extend(chunk.lengths)
            counts = {name: count + getattr(chunk, name) for name, count in counts.items()}
            refused += len({problem.source for problem in chunk.problems})
            problems += chunk.problems[: 1000 - len(problems)]
            done += chunk.examples + len(chunk.problems)
            if tell is not None:
                tell(min(done, len(examples)), len(examples))
    if problems and (spec.data.on_error == "stop" or not lengths):
        refuse(problems)
    if not lengths:
        what = f"none of the {len(examples)} examples has a token to learn within {limit} tokens"
        remedy = "raise train.max_length, or check the field names of the data"
        raise RequestError(Problem(what, None, remedy))
    groups = bins(lengths, limit) if spec.train.packing else None
    _write_rows(folder / "rows.arrow", ids_file, labels_file, lengths, groups)
    ids_file.unlink()
    labels_file.unlink()
    return {
        "num_examples": len(examples),
        **{f"num_{name}": count for name, count in counts.items()},
        "num_refused": refused,
        "num_tokens": sum(lengths),
        "packing_efficiency": sum(lengths) / (len(groups) * limit) if groups else None,
    }


def _write_rows(
    file: Path, ids_file: Path, labels_file: Path, lengths: Sequence[int], groups: list[list[int]] | None
) -> None:
    """The Arrow file: a row per sequence, a thousand at a time."""
    columns = [np.memmap(name, np.int32, "r") for name in (ids_file, labels_file)]
    sizes = np.frombuffer(lengths, np.int32) if isinstance(lengths, array) else np.asarray(lengths, np.int32)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    fields = [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))]
    fields += [("seq_lengths", pa.list_(pa.int32()))] if groups is not None else []
    schema = pa.schema(fields)
    count = len(groups) if groups is not None else len(sizes)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for begin in range(0, count, SEQUENCES_AT_ONCE):
            part = range(begin, min(count, begin + SEQUENCES_AT_ONCE))
            members = [groups[i] for i in part] if groups is not None else [[i] for i in part]
            flat = [row for rows in members for row in rows]
            totals = [int(sizes[rows].sum()) for rows in members]
            arrays = [
                _lists(np.concatenate([column[starts[row] : starts[row + 1]] for row in flat]), totals)
                for column in columns
            ]
            if groups is not None:
                arrays.append(_lists(sizes[flat], [len(rows) for rows in members]))
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _lists(values: Any, sizes: Sequence[int]) -> Any:
    """An Arrow array of lists, out of their values one after the other."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def encode(example: Example, tokenizer: Any, loss_on: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example, both [s]; labels are -100 where no loss is taken."""
    found = Words.of(tokenizer).encode(example, loss_on)
    return found.ids, found.labels


def chat_ids(tokenizer: Any, turns: Sequence[Turn], ask: bool) -> list[int]:
    """Token ids of a rendered conversation; `ask` ends it where the assistant is to speak.

    RequestError for a conversation the model's template refuses (a system turn, say).
    """
    import jinja2

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], add_generation_prompt=ask, return_dict=True
        )
    except jinja2.TemplateError as error:
        raise RequestError(
            Problem(
                f"the model's chat template refuses a conversation: {error}",
                None,
                "set data.chat_template to a Jinja file, or data.system_prompt=null",
            )
        ) from None
    return list(encoded["input_ids"])


def line_of(rows: Tokenised, num_eval: int) -> str:
    """What was found in the data, for people."""
    parts = [f"{rows.num_examples:,} examples, {rows.num_tokens:,} tokens"]
    if rows.packing_efficiency is not None:
        parts.append(f"packed into {len(rows.rows):,} sequences, {rows.packing_efficiency:.0%} full")
    if rows.num_truncated:
        parts.append(f"{rows.num_truncated:,} cut to the longest length")
    if rows.num_dropped:
        parts.append(f"{rows.num_dropped:,} dropped: nothing left to learn after the cut")
    if rows.num_split:
        parts.append(f"{rows.num_split:,} longer ones go on in another row")
    if rows.num_refused:
        parts.append(f"{rows.num_refused:,} skipped: the chat template refuses them")
    if num_eval:
        parts.append(f"{num_eval:,} held out")
    return "Data    " + "; ".join(parts) + (" (tokens from the cache)" if rows.from_cache else "")
