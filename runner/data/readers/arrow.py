"""Rows from Arrow (Parquet, the Hub) without the nulls that Arrow adds.

An Arrow struct has one set of fields for every row: arguments `{"city": "Oslo"}` beside `{"zone": "+1"}` come back as
`{"city": "Oslo", "zone": None}`. Which nulls were written by somebody cannot be told, so a null field of a struct is
left out, in tool calls, tool schemas and whatever else is nested. The exact value is kept where the type can hold it:
JSON (as text, or Arrow's own JSON type, which `datasets` writes), maps, elements of lists, and columns themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from runner.config import json_text
from runner.errors import Problem, RequestError

Row = dict[str, Any]
Convert = Callable[[object], object]


def rows_of(table: Any) -> list[Row]:
    """The rows of a pyarrow Table or RecordBatch."""
    convert = converter(table.schema)
    return [convert(row) for row in table.to_pylist(maps_as_pydicts="strict")]


@contextmanager
def parquet(path: str) -> Iterator[Any]:
    """Context with pyarrow's reader of Parquet; RequestError for a file that is none, or where there is no pyarrow."""
    try:  # only Parquet needs it, and it takes 0.1 s to import
        pyarrow, reader = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise RequestError(Problem(f"{path}: Parquet needs pyarrow", None, "pip install pyarrow")) from None
    try:
        yield reader
    except (json_text.RepeatedKeyError, KeyError) as error:  # KeyError: a map of Arrow's
        told = f"{error} in one object" if isinstance(error, ValueError) else "a key occurs twice in one map"
        raise RequestError(Problem(told, path, "leave one of them out")) from None
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise RequestError(Problem(f"{path} is no Parquet file: {reason}", None, "write it again")) from None


def converter(schema: Any, decoded: bool = False) -> Callable[[Row], Row]:
    """Takes invented nulls out of a row as `to_pylist` gives it; `decoded`: JSON was parsed already, by `datasets`."""
    kinds = import_module("pyarrow").types
    columns = {field.name: _of_type(field.type, kinds, decoded) for field in schema}
    changes = {name: convert for name, convert in columns.items() if convert is not None}
    return lambda row: {name: changes[name](value) if name in changes else value for name, value in row.items()}


def without_nulls(value: object) -> object:
    """The same for nested values whose Arrow type is not known; a column's own null stays."""
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _of_type(kind: Any, kinds: Any, decoded: bool) -> Convert | None:
    """What to do with values of an Arrow type; None where they stay as they are."""
    if getattr(kind, "extension_name", None) == "arrow.json":
        return None if decoded else _parsed
    if kinds.is_struct(kind):
        return _of_struct({field.name: _of_type(field.type, kinds, decoded) for field in kind})
    if kinds.is_map(kind):
        return _of_map(_of_type(kind.item_type, kinds, decoded))
    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view)
    if any(is_one(kind) for is_one in lists):
        return _of_list(_of_type(kind.value_type, kinds, decoded))
    return None


def _of_struct(fields: dict[str, Convert | None]) -> Convert:
    def convert(value: object) -> object:
        if not isinstance(value, dict):
            return value
        said = {name: inner for name, inner in value.items() if inner is not None}
        return {name: change(inner) if (change := fields.get(name)) else inner for name, inner in said.items()}

    return convert


def _of_map(inner: Convert | None) -> Convert | None:
    def convert(value: object) -> object:
        return {name: inner(one) for name, one in value.items()} if inner and isinstance(value, dict) else value

    return inner and convert


def _of_list(inner: Convert | None) -> Convert | None:
    def convert(value: object) -> object:
        return [inner(one) for one in value] if inner and isinstance(value, list) else value

    return inner and convert


def _parsed(value: object) -> object:
    return json_text.loads(value, object_pairs_hook=json_text.once) if isinstance(value, str) else value
