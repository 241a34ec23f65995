"""Turns, one row of a data set, and the rows of one file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runner.data.examples import Kind, Learnable, Turn, as_kind
from runner.data.readers.files import Row, raise_problems, read_table
from runner.data.row_formats import detect_format, read_row
from runner.errors import RequestError
from runner.spec import DataSpec


def system(text: str = "Be brief.") -> Turn:
    return {"role": "system", "content": text}


def user(text: str = "2+2?") -> Turn:
    return {"role": "user", "content": text}


def said(text: str = "It is 4.") -> Turn:
    return {"role": "assistant", "content": text}


def data_spec(**changes: Any) -> DataSpec:
    return DataSpec(**({"path": "my.jsonl"} | changes))


def canonical_row(row: Row, where: str, spec: DataSpec, kind: Kind | None = None) -> Learnable:
    """One row made canonical; RequestError with every mistake in it, each at `where`."""
    try:
        shape = detect_format(row, spec, kind)
    except RequestError as error:
        raise RequestError(*(replace(problem, source=where) for problem in error.problems)) from None
    found = read_row(row, where, spec, shape, kind)
    return as_kind(found, kind, where) if kind else found


def read_rows(path: str) -> list[Row]:
    """All rows of a data file; RequestError names every line that cannot be read."""
    table = read_table(path)
    if table.problems:
        raise_problems(table.problems)
    return list(table.rows)
