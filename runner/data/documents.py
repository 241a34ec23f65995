"""Documents of plain text, one after the other, from any source, without holding more than one of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.data.files import is_url, read_table
from runner.data.hub import problem_of
from runner.data.sources import files_of
from runner.errors import Problem, RequestError
from runner.spec import DataSpec

TEXT = (".txt", ".text", ".md")
LINES = (".jsonl", ".ndjson")


def documents(data: DataSpec, *, held_out: bool = False, skip: int = 0) -> Iterator[str]:
    """The texts of `data` (or of its held-out file or split), from number `skip` on.

    A line of a text file is a document, empty ones are passed over; of a table the text is in `data.text_field`.
    """
    if data.source == "pydoc":
        found = reference_pages()
    elif data.source == "hub":
        yield from _hub(data, str(data.eval_split if held_out else data.split), skip)
        return
    else:
        found = _files(str(data.eval_path if held_out else data.path), data.text_field)
    for number, text in enumerate(found):
        if number >= skip:
            yield text


def reference_pages() -> Iterator[str]:
    """The reference of the Python language, as `help()` shows it: 0.7 MB of English that every CPython carries."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) > 40:  # headings and rules
                yield text


def _files(path: str, field: str) -> Iterator[str]:
    for name in files_of(path):
        file = Path(name).expanduser()
        suffixes = [suffix.lower() for suffix in file.suffixes]
        kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
        if kind in TEXT and not is_url(name):
            yield from (line for line in _lines(file) if line)
        elif kind in LINES and not is_url(name):
            for number, line in enumerate(_lines(file), 1):
                if line:
                    yield _field(line, field, f"{file}:{number}")
        else:
            for index, row in enumerate((table := read_table(name)).rows):
                yield _text(row, field, table.place(index))


def _lines(file: Path) -> Iterator[str]:
    opened: Any = gzip.open if file.suffix.lower() == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            for line in stream:
                yield line.strip()
    except UnicodeDecodeError as error:
        raise RequestError(Problem(f"is not UTF-8: {error.reason}", str(file), "convert it to UTF-8")) from None
    except OSError as error:
        raise RequestError(Problem(f"cannot be read: {error.strerror or error}", str(file))) from None


def _field(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RequestError(Problem(f"is not JSON: {error}", where, "one JSON object a line")) from None
    return _text(row if isinstance(row, dict) else {}, field, where)


def _text(row: dict[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise RequestError(Problem(f"has no text in its field {field}", where, "write data.text_field=…"))
    return text


def _hub(data: DataSpec, split: str, skip: int) -> Iterator[str]:
    try:  # 0.9 s to import, and only Hub data needs it
        datasets = import_module("datasets")
        rows = datasets.load_dataset(data.id, name=data.subset, split=split, revision=data.revision, streaming=True)
        for number, row in enumerate(rows.skip(skip) if skip else rows):
            yield _text(row, data.text_field, f"{data.id} {split}, row {skip + number + 1}")
    except RequestError:
        raise
    except Exception as error:  # whatever a loader of foreign files raises, the data set is at fault
        raise RequestError(problem_of(error, data, "split", split)) from error
