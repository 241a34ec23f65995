"""Files of rows and rows of any format."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from runner.data.load import canonical_rows
from runner.data.readers.files import Table, read_table
from runner.data.readers.streams import tables
from runner.data.row_formats import detect_format, left_out, read_row, rewarded
from runner.spec import DataSpec
from tests.fuzz import mutate
from tests.fuzz.fuzzing import Target, fuzz

pa.allocate_buffer(1)  # at its first use Arrow's pool reserves 1 GiB of address space, for which no input has asked
TURNS = [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?", "weight": 0},
    {"role": "assistant", "content": "", "reasoning_content": "add",
     "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]},
    {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"},
    {"role": "assistant", "content": [{"type": "text", "text": "4"}], "weight": 1, "loss": True},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}]
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS, "tools": TOOLS},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "s"},
    {"messages": mutate.text_of(TURNS), "tools": mutate.text_of(TOOLS)},
    {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
    {"instruction": "Add.", "input": "2 2", "output": "4", "history": [["a", "b"]], "system": "s"},
    {"prompt": "a", "completion": "b", "thinking": "c"},
    {"prompt": TURNS[:2], "completion": TURNS[4:]},
    {"question": "a", "answer": "b", "id": 3, "context": "c"},
    {"text": "words"},
    {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1.0},
    {"chosen": TURNS[1:], "rejected": TURNS[1:], "margin": 2},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": [{"role": "user", "content": "a"}], "answer": "4", "solution": ["4"]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
    {"image": {"bytes": "…", "path": "a.png"}, "messages": TURNS},
]
KINDS = (None, "sft", "preference", "unpaired", "prompts")
FORMATS = ("chat", "alpaca", "prompt_completion", "text", "preference", "unpaired", "prompts", "tokens")
SPECS = [
    DataSpec(name="x", source="file", path="x.jsonl"),
    DataSpec(name="x", source="file", path="x.jsonl", system_prompt="s", on_error="skip"),
    *(DataSpec(name="x", source="file", path="x.jsonl", format=shape) for shape in FORMATS),
]


def row(rng: Random) -> tuple[Any, DataSpec, Any]:
    """A row as a file may have it: always a mapping."""
    found = mutate.mutated(rng, rng.choice(ROWS))
    found = found if isinstance(found, dict) else {"text": found}
    return found, SPECS[0] if rng.random() < 0.7 else rng.choice(SPECS), rng.choice(KINDS)


def read_one(given: tuple[Any, DataSpec, Any]) -> None:
    found, spec, kind = given
    read_row(found, "x.jsonl, line 1", spec, detect_format(found, spec, kind), kind)


def read_both(given: tuple[Any, DataSpec, Any]) -> None:
    """As `data preview` and the checks before a run do."""
    found, spec, kind = given
    canonical_rows(Table("x.jsonl", [found, dict(ROWS[0])]), spec, kind)
    left_out(found, spec, detect_format(found, spec, kind), kind)
    rewarded(found, spec)


def lines(rng: Random) -> str:
    chosen = [mutate.json_text(rng, rng.choice(ROWS)) for _ in range(rng.choice((1, 2, 5)))]
    return rng.choice(("\n", "\r\n", "\n\n", ", ")).join(chosen)


def table_text(rng: Random) -> str:
    """CSV of texts, its cells JSON at times."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=rng.choice((",", ",", ";", "\t")))
    writer.writerow([*rng.choice(ROWS)])
    for _ in range(rng.randrange(4)):
        found = mutate.mutated(rng, rng.choice(ROWS))
        cells = found.values() if isinstance(found, dict) else [found]
        texts = [cell if isinstance(cell, str) else mutate.text_of(cell) for cell in cells]
        writer.writerow([text.replace("\0", "") if rng.random() < 0.9 else text for text in texts])
    return stream.getvalue()


def parquet(rng: Random) -> bytes:
    found = [rng.choice(ROWS) for _ in range(2)]
    found = [mutate.mutated(rng, one, 1) for one in found]
    try:
        made = pa.Table.from_pylist([one for one in found if isinstance(one, dict)] or [{"text": "a"}])
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(made, sink)
        data: bytes = sink.getvalue().to_pybytes()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError, UnicodeError):
        data = b"PAR1PAR1"
    return mutate.garbled(rng, data) if rng.random() < 0.6 else data


PACKED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
          ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}  # fmt: skip


def file(rng: Random) -> tuple[str, bytes]:
    """An ending and what such a file holds."""
    kind = rng.choice((".json", ".jsonl", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"))
    if kind == ".parquet":
        data = parquet(rng)
    else:
        text = table_text(rng) if kind in (".csv", ".tsv") else lines(rng)
        text = f"[{text}]" if kind == ".json" and rng.random() < 0.7 else text
        data = text.encode("utf-8", "surrogatepass")
        data = mutate.garbled(rng, data) if rng.random() < 0.4 else data
    packed = rng.choice(("", "", "", *PACKED))
    data = PACKED[packed](data)
    return kind + packed, mutate.garbled(rng, data) if packed and rng.random() < 0.5 else data


ROW, BOTH = Target("rows", row, read_one), Target("rows in a table", row, read_both)


@pytest.mark.parametrize("target", [ROW, BOTH], ids=lambda target: target.name)
def test_a_row_is_read_or_refused_in_words(target: Target) -> None:
    fuzz(target)


def test_a_file_is_read_or_refused_in_words(tmp_path: Path) -> None:
    def whole(place: str) -> None:
        canonical_rows(read_table(place), SPECS[0])

    def in_pieces(place: str) -> None:
        for table in tables(place, 500):
            canonical_rows(table, SPECS[1])

    def written(read: Callable[[str], None], given: tuple[str, bytes]) -> None:
        ending, data = given
        place = tmp_path / f"rows{ending}"
        place.write_bytes(data)
        read(str(place))

    fuzz(Target("files of rows", file, partial(written, whole)))
    fuzz(Target("files of rows in pieces", file, partial(written, in_pieces)))
