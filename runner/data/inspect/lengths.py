"""Size of a data set, estimated quickly: rows, tokens per row, optimiser steps.

Small data are read whole and tokenised with the model's own tokenizer, if it is on this machine: then the answer is
exact. Else a sample is, or characters are counted (token_counts.py). Answers are kept: the front should not read the
same file twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.config import conf_files, json_text
from runner.data import commands_dataset, user_code
from runner.data.examples import Kind, Learnable
from runner.data.inspect.sample import Sample, sample
from runner.data.inspect.token_counts import CHARS_PER_TOKEN, TokenCounter, tokenizer_file
from runner.data.load import split
from runner.data.readers.sources import files_of
from runner.paths import CONF, cache_dir
from runner.spec import DataSpec, ModelSpec, RunSpec
from runner.spec.data import SIZES
from runner.spec.input_paths import is_url

LAYOUT = 3  # raise it when what is stored changes meaning
SAMPLE_ROWS = 200  # rows tokenised of more data than that
WHOLE_ROWS = 2000  # rows up to which all are tokenised

# Best-fit packing of rows much shorter than a sequence leaves little empty: 97% is an assumption for lengths that
# are not known one by one. Rows of about 66 tokens in 256 fill 92% (README).
PACKING_EFFICIENCY = 0.97


@dataclass(frozen=True)
class DataLengths:
    """Lengths of the training data, known or estimated before loading."""

    num_examples: int | None
    """Training rows, after holding out and `data.max_examples`; None where nobody knows."""
    tokens_per_example: float | None
    """Mean tokens of a row, prompt, answer and template together, before cutting to `train.max_length`."""
    exact: bool
    """Every row was counted with the model's tokenizer and template."""
    how: str
    """How the figures were found, in a few words."""
    row_tokens: tuple[int, ...] = ()
    """Tokens of every training row, in order, where all were counted; by characters, unless `exact`."""
    held_out_rows: int | None = None
    """Held-out rows, after `data.max_eval_examples`; None where nobody knows."""
    held_out_tokens_per_row: float | None = None
    """Mean tokens of a held-out row."""
    answer_tokens: int | None = None
    """Tokens of the longest held-out answer; 0 where nothing is asked (plain text), None where nobody knows."""


def lengths(data: DataSpec, model: ModelSpec, *, seed: int = 42, kind: Kind | None = None) -> DataLengths:
    """Count or estimate the lengths of the data; `seed` selects held-out rows as `train.seed` does, `kind` is the kind
    of row.

    Reads files and, after the first time, its own cache; never the network. RequestError for a data file that
    is missing or of an unknown kind.
    """
    if data.source == "hub":
        return _of_hub(data)
    if far := next((path for path in _paths(data) if is_url(path)), None):
        note = f"{far} is not on this machine: rows are counted when they are loaded"
        return DataLengths(data.max_examples, None, False, note, held_out_rows=data.max_eval_examples)
    tokenizer = tokenizer_file(model)
    file = cache_dir() / "lengths" / f"{_key(data, tokenizer, seed, kind)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        stored = json_text.loads(file.read_text("utf-8"))
        return DataLengths(**{**stored, "row_tokens": tuple(stored["row_tokens"])})
    counted = _count(data, sample(data, kind), tokenizer, seed)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(counted)), "utf-8")
        temporary.replace(file)
    return counted


def _of_hub(data: DataSpec) -> DataLengths:
    """What the card of a data set, or its user, states; of any other at most `data.max_examples`."""
    card = stated_sizes(data)
    tokens, how = _tokens_per_row(card)
    if not card.num_rows:
        note = f"{data.id} is on the Hub: rows are counted when it is loaded"
        note += (
            ", at most data.max_examples"
            if data.max_examples
            else "; data.num_rows=… and data.tokens_per_row=… give an estimate"
        )
        note += f", {how}" * (tokens is not None)
        held_tokens = tokens if data.max_eval_examples else None
        return DataLengths(data.max_examples, tokens, False, note, (), data.max_eval_examples, held_tokens)
    rows, held = card.num_rows, card.num_eval_rows
    if not data.eval_split:
        held = round(rows * data.eval_fraction)
        rows -= held
    return DataLengths(
        min(rows, data.max_examples or rows),
        tokens,
        False,
        how,
        held_out_rows=data.max_eval_examples if held is None else min(held, data.max_eval_examples or held),
        held_out_tokens_per_row=tokens,
    )


def _tokens_per_row(card: DataSpec) -> tuple[float | None, str]:
    """Mean tokens of a row on the Hub, and what they are taken from."""
    if card.tokens_per_row:
        return card.tokens_per_row, f"an estimate: tokens as the card of {card.id} states"
    if card.bytes_per_row:
        how = f"an estimate: bytes as the card of {card.id} states, {CHARS_PER_TOKEN:g} a token assumed"
        return card.bytes_per_row / CHARS_PER_TOKEN, how
    return None, f"as the card of {card.id} states"


def stated_sizes(data: DataSpec) -> DataSpec:
    """The data set without sizes that are of other rows: of the catalogue's split, where another one is read."""
    if data.name not in conf_files.options("data"):
        return data  # of a folder of the user's own, which says what it says
    own = conf_files.load_choice("data", data.name)
    if all(getattr(data, key) == own.get(key, None) for key in ("id", "subset", "revision", "split", "eval_split")):
        return data
    return data.model_copy(update={key: None for key in SIZES if getattr(data, key) == own.get(key)})


def _key(data: DataSpec, tokenizer: Path | None, seed: int, kind: Kind | None) -> str:
    """Changes with anything that changes the answer: settings, files by size and time, the code of the rows."""
    files = [tokenizer, Path(data.chat_template) if data.chat_template else None]
    files += [Path(name) for name in user_code.sources_of_formats(data)]
    if data.source == "commands":
        files += [Path(commands_dataset.__file__)]
        files += sorted(f for group in ("model", "hw", "method") for f in (CONF / group).glob("*.yaml"))
    else:
        files += [Path(name).expanduser().absolute() for path in _paths(data) for name in files_of(path)]
    stats = [(str(f), s.st_size, s.st_mtime_ns) for f in files if f and (s := _stat(f))]
    parts = [LAYOUT, dict(data), stats, seed, kind]
    return hashlib.sha256(json.dumps(parts, default=dict).encode()).hexdigest()[:32]


def _paths(data: DataSpec) -> list[str]:
    return [path for path in (data.path, *(one.path for one in data.sources), data.eval_path) if path]


def _stat(file: Path) -> os.stat_result | None:
    with suppress(OSError):
        return file.stat()
    return None


def _count(data: DataSpec, found: Sample, file: Path | None, seed: int) -> DataLengths:
    """Rows that train, rows that are held out, and their tokens."""
    counting = TokenCounter(data, file)
    rows, every = _counted(found, counting)
    total = found.total
    if found.held_out is not None:
        held, held_total = _counted(found.held_out, counting)[0], found.held_out.total
    else:
        held_total = min(max(1, round(total * data.eval_fraction)) if data.eval_fraction else 0, max(0, total - 1))
        total -= held_total
        rows, held = split(rows, data.eval_fraction, seed) if every else (rows, rows)
    rows = rows[: data.max_examples] if every else rows
    held = held[: data.max_eval_examples]
    total = min(total, data.max_examples or total)
    held_total = min(held_total, data.max_eval_examples or held_total)
    tokens = tuple(count for _, count in rows)
    answers = counting.answers([example for example, _ in held]) if held_total else []
    how = found.how if every else f"{found.how}, tokens of {len(rows)} rows"
    return DataLengths(
        total,
        sum(tokens) / len(tokens) if tokens else None,
        every and counting.exact,
        f"{how}, {counting.how}",
        tokens if every else (),
        held_total,
        sum(count for _, count in held) / len(held) if held else None,
        max(answers, default=0),
    )


def _counted(found: Sample, counting: TokenCounter) -> tuple[list[tuple[Learnable, int]], bool]:
    """Rows with their tokens, and whether these are all rows."""
    every = found.whole and len(found.examples) <= WHOLE_ROWS
    examples = found.examples if every else _spread(found.examples)
    return list(zip(examples, counting.rows(examples), strict=True)), every


def _spread(examples: list[Learnable]) -> list[Learnable]:
    """`SAMPLE_ROWS` rows at equal distances: files are often sorted."""
    count = min(SAMPLE_ROWS, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


# --- steps -----------------------------------------------------------------------------------------------------


def optimizer_steps(spec: RunSpec, data: DataLengths) -> tuple[int | None, int | None, list[str]]:
    """Optimiser steps of a resolved run, the tokens they learn from (padding left out), and what was assumed.

    None where the data's size is not known and `train.max_steps` does not stand for it.
    """
    train = spec.train
    notes: list[str] = []
    rows, tokens = _rows(spec, data, notes)
    if rows is None and train.max_steps is None:
        return None, None, [*notes, f"how long it trains is not known: {data.how}"]
    count = train.num_steps(rows or 0, spec.hw.world_size)
    assert isinstance(train.micro_batch_size, int) and isinstance(train.accumulation_steps, int)
    batch = train.micro_batch_size * spec.hw.world_size * train.accumulation_steps
    if tokens is None or rows is None:
        return count, count * batch * train.max_length, [*notes, "every sequence counted as full"]
    passes = train.num_epochs if train.max_steps is None else count * batch / rows
    return count, round(passes * tokens), notes


def _rows(spec: RunSpec, data: DataLengths, notes: list[str]) -> tuple[int | None, int | None]:
    """Sequences of one epoch, and the tokens in them."""
    limit, packing = spec.train.max_length, spec.train.packing
    if data.row_tokens:
        if not data.exact:
            notes.append(f"about {data.tokens_per_example:.0f} tokens a row: {data.how}")
        cut = list(_pieces(data.row_tokens, limit, spec.data.on_long if spec.objective.name == "sft" else "truncate"))
        return packed_sequences(cut, limit) if packing else len(cut), sum(cut)
    if data.num_examples is None:
        return None, None
    if data.tokens_per_example is None:
        if packing:
            what = "each counted as a full sequence, so it is at most this"
            notes.append(f"{data.num_examples:,} rows, {data.how}: {what}")
        return data.num_examples, None
    notes.append(f"about {data.num_examples:,} rows of {data.tokens_per_example:.0f} tokens: {data.how}")
    tokens = round(data.num_examples * min(data.tokens_per_example, limit))
    if not packing:
        return data.num_examples, tokens
    notes.append(f"packing assumed to fill {PACKING_EFFICIENCY:.0%} of a sequence")
    return max(1, math.ceil(tokens / (limit * PACKING_EFFICIENCY))), tokens


def _pieces(row_tokens: Sequence[int], limit: int, on_long: str) -> Iterator[int]:
    """Tokens of what `data.on_long` makes of the rows."""
    for tokens in row_tokens:
        if tokens <= limit or on_long == "truncate":
            yield min(tokens, limit)
        elif on_long == "split":
            yield from (min(limit, tokens - begun) for begun in range(0, tokens, limit))


def packed_sequences(row_tokens: Sequence[int], limit: int) -> int:
    """Sequences of `limit` tokens that best-fit decreasing makes of the rows, as TRL's packing does.

    Each row, the longest first, goes where it leaves the least room; where none has room it begins a sequence.
    """
    room: list[int] = []  # of every sequence, ascending
    for tokens in sorted((t for t in row_tokens if t), reverse=True):
        at = bisect_left(room, tokens)
        left = room.pop(at) - tokens if at < len(room) else limit - tokens
        insort(room, left)
    return len(room)
