"""Rows of a file: JSON, JSONL, CSV, TSV, Parquet or text, compressed or not, local or a URL."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from runner.config import json_text
from runner.config.did_you_mean import nearest
from runner.data.readers import arrow, urls
from runner.errors import Problem, RequestError
from runner.spec.input_paths import is_url

Row = dict[str, Any]

# More would scroll the first mistake, which often causes the others, out of the terminal.
SHOWN_PROBLEMS = 20
READABLE = ".json, .jsonl, .csv, .tsv, .parquet or .txt, each also with .gz, .bz2, .xz or .zst"
_KINDS_OF_FILE = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".txt": "txt",
}  # fmt: skip
UNNAMED = "Unnamed: "
"""With its place, pandas' name for a column without one."""
_ROW_REMEDY = 'write an object such as {"prompt": "…", "completion": "…"}'


@dataclass(frozen=True)
class Table:
    """Rows as they stand in their source, and what could not be read."""

    name: str
    """The path or id as the user wrote it."""
    rows: Sequence[Row]
    unit: str = "row"
    """What `numbers` count: `line` or `row`."""
    numbers: Sequence[int] = ()
    """1-based line (or row) of each row; empty means 1, 2, 3, …"""
    problems: list[Problem] = field(default_factory=list)

    def pieces(self, size: int) -> Iterator[Table]:
        """The same rows, `size` at a time, numbered through."""
        for begin in range(0, len(self.rows), size):
            part = range(begin, min(begin + size, len(self.rows)))
            numbers = [self.numbers[i] if self.numbers else i + 1 for i in part]
            yield Table(self.name, [self.rows[i] for i in part], self.unit, numbers)

    def place(self, index: int) -> str:
        """Return the position of row `index` (0-based), such as `my.jsonl, line 17`."""
        return f"{self.name}, {self.unit} {self.numbers[index] if self.numbers else index + 1}"


def raise_problems(problems: Sequence[Problem]) -> NoReturn:
    """Raise one RequestError: the first 20 problems spelled out, the others counted."""
    rest = len(problems) - SHOWN_PROBLEMS
    more = [Problem(f"and {rest} more")] if rest > 0 else []
    raise RequestError(*problems[:SHOWN_PROBLEMS], *more)


def read_table(path: str) -> Table:
    """The rows of `path` (relative to the working directory, or a URL), and the lines that are broken.

    Raises RequestError where there is nothing to read at all: no such file, an unknown ending,
    not UTF-8, a damaged archive.
    """
    data = decompressed(_bytes(path), path)
    match kind_of_file(path):
        case "parquet":
            with arrow.parquet(path) as parquet:
                return Table(path, arrow.rows_of(parquet.read_table(io.BytesIO(data))))
        case "json" | "jsonl" as kind:
            return _json(_decoded(data, path), path, by_line=kind == "jsonl")
        case "csv" | "tsv" as kind:
            return _delimited(_decoded(data, path), path, "\t" if kind == "tsv" else ",")
        case "txt":
            return text_lines(_decoded(data, path), path)
    raise RequestError(Problem(f"{path}: cannot tell the format by its name", None, f"name it {READABLE}"))


def kind_of_file(path: str) -> str | None:
    """`jsonl`, `csv`, …: by the ending, whatever it is compressed with; None where it is none of ours."""
    ending = ending_of(path)
    return _KINDS_OF_FILE.get(ending_of(_without_query(path)[: -len(ending)]) if ending in COMPRESSIONS else ending)


def ending_of(path: str) -> str:
    """The last ending of a file's name, such as `.gz`; of a URL without its query."""
    return PurePosixPath(_without_query(path)).suffix.lower()


def _without_query(path: str) -> str:
    return path.partition("?")[0] if is_url(path) else path


def _bytes(path: str) -> bytes:
    if is_url(path):
        return urls.fetch_url(path)
    file = Path(path).expanduser()
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise RequestError(_missing(file, path)) from None
    except IsADirectoryError:
        raise RequestError(Problem(f"{path} is a folder", None, "name one file in it")) from None
    except OSError as error:
        raise RequestError(Problem(f"{path} cannot be read: {error.strerror or error}")) from None


def _missing(file: Path, path: str) -> Problem:
    if not os.path.isdir(file.parent):
        return Problem(f"{path} does not exist, nor does the folder {file.parent}")
    near = nearest(file.name, [other.name for other in file.parent.iterdir() if os.path.isfile(other)])
    relative = "" if file.is_absolute() else f"the path is relative to {Path.cwd()}"
    remedy = f"did you mean {Path(path).with_name(near)}?" if near else relative or None
    return Problem(f"{path} does not exist", None, remedy)


def _decoded(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")  # Excel puts a byte order mark before a CSV file
    except UnicodeDecodeError as error:
        raise RequestError(not_utf8(data, error, path, 1)) from None


def not_utf8(data: bytes, error: UnicodeDecodeError, path: str, first: int) -> Problem:
    """Return where a file is not UTF-8, and how to convert it; `first` is the number of the first line."""
    kind = "UTF-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    remedy = f"save the file as UTF-8, such as with: iconv -f {kind} -t UTF-8 {path}"
    line = first + data.count(b"\n", 0, error.start)
    return Problem(f"byte 0x{data[error.start]:02x} is not UTF-8", f"{path}, line {line}", remedy)


def _json(text: str, path: str, by_line: bool) -> Table:
    """A list of objects, or one object per line whatever the ending says: the Hub's .json often is."""
    twice = _Repeated()
    try:
        whole = json_text.loads(text, object_pairs_hook=twice) if text.strip() else []
    except json.JSONDecodeError as error:
        if by_line or _is_json(text.lstrip().partition("\n")[0]):
            return json_lines(text, path)
        return Table(path, [], problems=[_broken(error, f"{path}, line {error.lineno}")])
    if not isinstance(whole, list):
        return json_lines(text, path) if by_line else _objects([whole], path, "row", (), twice)
    return _objects(whole, path, "row", (), twice)


class _Repeated:
    """An `object_pairs_hook` that keeps the objects in which a key stands twice: 1 µs a row, where reading takes 35."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Row, str]] = {}

    def __call__(self, pairs: list[tuple[str, Any]]) -> Row:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.found[id(made)] = made, json_text.repeated(pairs)
        return made

    def inside(self, value: object) -> str | None:
        """The first such key in a value or in what it holds."""
        if not self.found:
            return None
        if id(value) in self.found:
            return self.found[id(value)][1]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return next((key for part in parts if (key := self.inside(part)) is not None), None)


def text_lines(text: str, path: str, first: int = 1) -> Table:
    """Every line that is not blank is a row; `first` is the number of the first line."""
    found = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), first) if line.strip()]
    return Table(path, [{"text": line} for _, line in found], "line", [number for number, _ in found])


def json_lines(text: str, path: str, first: int = 1) -> Table:
    """Every line is an object; `first` is the number of the first line."""
    values, numbers, problems, twice = [], [], [], _Repeated()
    # Not splitlines(): U+2028 may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), first):
        if not line.strip():
            continue
        try:
            values.append(json_text.loads(line, object_pairs_hook=twice))
            numbers.append(number)
        except json.JSONDecodeError as error:
            problems.append(_broken(error, f"{path}, line {number}"))
    table = _objects(values, path, "line", numbers, twice)
    return Table(path, table.rows, "line", table.numbers, problems + table.problems)


def _objects(values: Sequence[object], path: str, unit: str, numbers: Sequence[int], twice: _Repeated) -> Table:
    """The values that are objects with each key once; each of the others is a problem."""
    rows: list[tuple[int, Row]] = []
    problems = []
    for number, value in zip(numbers or range(1, len(values) + 1), values, strict=True):
        place = f"{path}, {unit} {number}"
        if not isinstance(value, dict):
            problems.append(Problem(f"is {kind_of(value)}, not an object", place, _ROW_REMEDY))
        elif (key := twice.inside(value)) is not None:
            problems.append(Problem(f"the key {key!r} occurs twice in one object", place, "leave one of them out"))
        else:
            rows.append((number, value))
    return Table(path, [value for _, value in rows], unit, [number for number, _ in rows], problems)


_KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """Return the type of a value in JSON's terms, such as `a list`."""
    return "null" if value is None else _KINDS.get(type(value), f"a {type(value).__name__}")


def _is_json(line: str) -> bool:
    try:
        json_text.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _broken(error: json.JSONDecodeError, place: str) -> Problem:
    return Problem(f"broken JSON: {error.msg} (column {error.colno})", place, _ROW_REMEDY)


def _delimited(text: str, path: str, delimiter: str) -> Table:
    first = text.partition("\n")[0]
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"  # what Excel writes where the comma is the decimal mark
    csv.field_size_limit(sys.maxsize)  # a cell may hold a document; the module's own limit is 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    rows, numbers, problems = [], [], []
    start, first_line = 1, path
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() or f"{UNNAMED}{index}" for index, cell in enumerate(cells)]
                first_line = f"{path}, line {number}"
            elif len(cells) != len(header):
                what = f"has {len(cells)} cells where the header has {len(header)}"
                problems.append(Problem(what, f"{path}, line {number}", 'put a cell with commas into "…"'))
            else:
                rows.append(dict(zip(header, cells, strict=True)))
                numbers.append(number)
    except csv.Error as error:
        place = f"{path}, line {start}"
        problems.append(Problem(f"broken CSV: {error}", place, 'write a quote inside a quoted cell as ""'))
    return Table(path, rows, "line", numbers, [*_header_problems(header, rows, first_line), *problems])


def _header_problems(header: list[str], rows: list[Row], place: str) -> list[Problem]:
    """Names that are there twice, and columns without one; but for the numbers of the rows, as pandas writes them."""
    twice = sorted({name for name in header if header.count(name) > 1})
    problems = [Problem(f"two columns are called {name}", place, "rename one of them") for name in twice]
    for index, name in enumerate(header):
        cells = (row[name].strip() for row in rows) if name == f"{UNNAMED}{index}" else ()
        if not all(cell.isdigit() or not cell for cell in cells):
            problems.append(Problem(f"column {index + 1} has no name", place, "name every column"))
    return problems


_GZIP_MAGIC = b"\x1f\x8b"


def _zstd(data: bytes) -> bytes:
    """By pyarrow, which every machine with `datasets` has; Python has its own from 3.14."""
    try:
        pyarrow = import_module("pyarrow")
    except ImportError:
        raise RequestError(Problem(".zst needs pyarrow", None, "pip install pyarrow")) from None
    found: bytes = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
    return found


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _zstd,
}


def decompressed(data: bytes, path: str) -> bytes:
    """Return the content of a file; RequestError if it is damaged."""
    ending = ending_of(path)
    if data.startswith(_GZIP_MAGIC):
        ending = ".gz"  # some are called .jsonl all the same
    if ending not in COMPRESSIONS:
        return data
    try:
        return COMPRESSIONS[ending](data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        remedy = f"make the {ending} file again"
        raise RequestError(Problem(f"{path} is damaged: {error}", None, remedy)) from None
