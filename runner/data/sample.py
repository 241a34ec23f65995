"""Some rows of a data source, and how many there are in all, without reading a large file to its end."""

from __future__ import annotations

import csv
import importlib
import io
import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.data import commands
from runner.data.files import Row, Table, read_table, refuse
from runner.data.formats import Example, canonical_rows
from runner.spec import DataSpec

WHOLE_BYTES = 2_000_000  # a file up to this size is read whole: 20 to 60 ms
MOST_BYTES = 20_000_000  # that they may unpack to
PARQUET_ROWS = 200


@dataclass(frozen=True)
class Sample:
    """Some rows, and how many there are of them in all."""

    examples: list[Example]
    total: int
    whole: bool
    how: str
    held_apart: bool
    """Held-out rows are elsewhere, so that all of these train."""


def sample(data: DataSpec) -> Sample:
    """Rows of a local source; RequestError for a file that is missing, of an unknown kind, or holds no usable row."""
    if data.source == "commands":
        rows = commands.examples()[0]
        examples, _ = canonical_rows(Table("commands", [dict(row) for row in rows]), data)
        return Sample(examples, len(examples), True, "all rows", True)
    assert data.path is not None  # DataSpec: source=file has a path
    file = Path(data.path).expanduser()
    size = file.stat().st_size if file.is_file() else 0
    kind = _kind(file)
    if size <= WHOLE_BYTES or kind not in (*_PARSERS, "parquet"):
        table, total, how = read_table(data.path), None, "all rows"
    elif kind == "parquet":
        table, total, how = _parquet_head(file, data.path)
    else:
        table, total, how = _text_head(file, data.path, kind, size)
    examples, problems = canonical_rows(table, data)
    if problems and not examples:
        refuse(problems)
    if problems:
        how += f", {len(problems)} mistakes in them left out"
    return Sample(examples, total or len(examples), total is None, how, bool(data.eval_path))


def _kind(file: Path) -> str:
    name = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    return {"ndjson": "jsonl"}.get(name.suffix.lower()[1:], name.suffix.lower()[1:])


def _parquet_head(file: Path, name: str) -> tuple[Table, int, str]:
    """The first rows, and the number of all that the file's own footer states."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        opened = parquet.ParquetFile(file)
        rows = next(opened.iter_batches(PARQUET_ROWS)).to_pylist()
    except Exception:  # read_table says what is wrong with it, in one line
        table = read_table(name)
        return table, len(table.rows), "all rows"
    return Table(name, rows), opened.metadata.num_rows, f"row count exact, lengths of the first {len(rows)}"


def _text_head(file: Path, name: str, kind: str, size: int) -> tuple[Table, int, str]:
    """Rows of the first 2 MB, and how many the file has at that rate."""
    with file.open("rb") as opened:
        raw = opened.read(WHOLE_BYTES)
    read = len(raw)
    if raw.startswith(b"\x1f\x8b"):
        with suppress(zlib.error):  # a damaged end is found when the data are loaded
            opener = zlib.decompressobj(wbits=31)
            raw = opener.decompress(raw, MOST_BYTES)
            read -= len(opener.unconsumed_tail)
    text = raw.decode("utf-8-sig", errors="ignore")
    rows, used = _PARSERS[kind](text)
    if not rows:
        table = read_table(name)
        return table, len(table.rows), "all rows"
    total = round(len(rows) * size / (read * used / len(text)))
    return (
        Table(name, rows),
        total,
        f"estimated from the first {len(rows):,} rows, {read * used / len(text) / size:.0%}",
    )


def _jsonl_rows(text: str) -> tuple[list[Row], int]:
    used = text.rfind("\n") + 1
    rows: list[Row] = []
    for line in text[:used].split("\n"):
        with suppress(json.JSONDecodeError):
            value = json.loads(line)
            if isinstance(value, dict):
                rows.append(value)
    return rows, used


def _json_rows(text: str) -> tuple[list[Row], int]:
    """Objects of a list whose end was not read; or lines, as some call them `.json` too."""
    if not text.lstrip().startswith("["):
        return _jsonl_rows(text)
    decoder, rows, at = json.JSONDecoder(), [], text.index("[") + 1
    with suppress(json.JSONDecodeError, IndexError):
        while True:
            while text[at] in ", \t\r\n":
                at += 1
            value, at = decoder.raw_decode(text, at)
            rows.append(value)
    return [row for row in rows if isinstance(row, dict)], at


def _csv_rows(text: str, delimiter: str | None = None) -> tuple[list[Row], int]:
    first = text.partition("\n")[0]
    used = text.rfind("\n") + 1
    reader = csv.DictReader(
        io.StringIO(text[:used], newline=""), delimiter=delimiter or (";" if "," not in first and ";" in first else ",")
    )
    rows: list[Row] = []
    with suppress(csv.Error):
        rows.extend(row for row in reader if None not in row and None not in row.values())
    return rows[:-1], used  # the last may end within a quoted cell


_PARSERS: dict[str, Callable[[str], tuple[list[Row], int]]] = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": lambda text: _csv_rows(text, "\t"),
}
