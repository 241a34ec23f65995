"""A sample of a data source and its number of rows, without reading a large file to its end."""

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

from runner.config import json_text
from runner.data.examples import Kind, Learnable
from runner.data.load import all_sources, canonical_rows
from runner.data.readers import arrow
from runner.data.readers.files import COMPRESSIONS, Row, Table, kind_of_file, raise_problems, read_table
from runner.data.readers.sources import Source, mixed, sources_of
from runner.errors import Problem
from runner.spec import DataSpec

WHOLE_BYTES = 2_000_000  # a file up to this size is read whole: 20 to 60 ms
MOST_BYTES = 20_000_000  # that they may unpack to
PARQUET_ROWS = 200


@dataclass(frozen=True)
class Sample:
    """Some rows, and how many there are of them in all."""

    examples: list[Learnable]
    total: int
    whole: bool
    how: str
    held_out: Sample | None
    """Held-out rows that are elsewhere, so that all of these train."""


def sample(data: DataSpec, kind: Kind | None = None) -> Sample:
    """Rows of a local source, as an objective of that kind learns them; RequestError for a file that is missing, of an
    unknown kind, or holds no usable row."""
    if data.source in ("commands", "pydoc"):
        (train,), held = all_sources(data)
        return _all_rows(train, kind, _all_rows(held, kind) if held else None)
    found = [_of_source(source, kind) for source in sources_of(data)]
    examples = [example for one in found for example in one.examples]
    total = sum(one.total for one in found)
    if len(found) > 1:
        order = mixed([one.total for one in found], [s.weight for s in sources_of(data)], data.mix, 0)
        total = len(order)
    elsewhere = data.model_copy(update={"path": data.eval_path, "eval_path": None, "sources": []})
    held_out = sample(elsewhere, kind) if data.eval_path else None
    whole = all(one.whole for one in found) and (len(found) == 1 or data.mix == "concat")
    return Sample(examples, total, whole, "; ".join(dict.fromkeys(one.how for one in found)), held_out)


def _all_rows(source: Source, kind: Kind | None, held_out: Sample | None = None) -> Sample:
    rows = [row for table in source.tables() for row in canonical_rows(table, source.spec, kind)[0]]
    return Sample(rows, len(rows), True, "all rows", held_out)


def _of_source(source: Source, kind: Kind | None) -> Sample:
    """Rows of the first file, as many as that takes to know what they are like, and the others by their size."""
    sizes = [_size(file) for file in source.files]
    files = source.files if sum(sizes) <= WHOLE_BYTES else source.files[:1]
    examples: list[Learnable] = []
    problems: list[Problem] = []
    total, hows = 0, []
    for file in files:
        table, rows, how = first_rows_of_file(file)
        found, wrong = canonical_rows(table, source.spec, kind)
        examples += found
        problems += wrong
        total += len(found) if rows is None else rows
        hows.append(how)
    if problems and not examples:
        raise_problems(problems)
    how = "; ".join(dict.fromkeys(hows))
    how += f", {len(problems)} mistake{'s' * (len(problems) != 1)} in them left out" if problems else ""
    whole = how.startswith("all rows") and len(files) == len(source.files)
    if len(files) < len(source.files):
        total = round(total * sum(sizes) / max(1, sizes[0]))
        how = f"estimated from the first of {len(source.files)} files by their sizes"
    if source.limit is not None:
        examples, total = examples[: source.limit], min(total, source.limit)
    return Sample(examples, total, whole, how, None)


def _size(file: str) -> int:
    place = Path(file).expanduser()
    return place.stat().st_size if place.is_file() else 0


def first_rows_of_file(name: str) -> tuple[Table, int | None, str]:
    """Rows of a file, how many it has where these are not all, and how that is known."""
    file, kind, size = Path(name).expanduser(), kind_of_file(name), _size(name)
    compressed = file.suffix.lower() in COMPRESSIONS and file.suffix.lower() != ".gz"
    if size <= WHOLE_BYTES or compressed or kind not in (*_PARSERS, "parquet"):
        return read_table(name), None, "all rows"
    return _parquet_head(file, name) if kind == "parquet" else _text_head(file, name, kind, size)


def _parquet_head(file: Path, name: str) -> tuple[Table, int, str]:
    """The first rows, and the number of all that the file's own footer states."""
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        opened = parquet.ParquetFile(file)
        rows = arrow.rows_of(next(opened.iter_batches(PARQUET_ROWS)))
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
    share = read * used / len(text) / size
    return Table(name, rows), total, f"estimated from the first {len(rows):,} rows, {share:.0%}"


def _jsonl_rows(text: str) -> tuple[list[Row], int]:
    used = text.rfind("\n") + 1
    rows: list[Row] = []
    for line in text[:used].split("\n"):
        with suppress(json.JSONDecodeError):
            value = json_text.loads(line)
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
    delimiter = delimiter or (";" if "," not in first and ";" in first else ",")
    reader = csv.DictReader(io.StringIO(text[:used], newline=""), delimiter=delimiter)
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
