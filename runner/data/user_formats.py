"""Row formats of a user's own: a class outside the package that turns a row into a standard one.

    class Tickets(RowFormat):
        def convert(self, row):
            return {"messages": [
                {"role": "user", "content": row["ticket"]}, {"role": "assistant", "content": row["reply"]}
            ]}

`data.format=tickets.py:Tickets` names it. What it returns is read, checked and rendered as any row in that format is.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path

from runner.data import user_code
from runner.data.columns import seen
from runner.data.readers.files import Row, kind_of
from runner.errors import Problem, RequestError
from runner.spec import DataSpec
from runner.spec.part import is_own


class RowFormat(ABC):
    """A row format; one object reads all rows of a run."""

    def fits(self, row: dict[str, object]) -> bool:
        """Return True if a row is in this format, by its columns; other rows are refused."""
        return True

    @abstractmethod
    def convert(self, row: dict[str, object]) -> dict[str, object]:
        """The row in a standard format (docs/data.md), under the standard names: `messages`, `prompt` and
        `completion`, `prompt`, `chosen` and `rejected`, `text`, `input_ids` and `labels` …

        What it raises is told as a mistake of the row, which `data.on_error=skip` leaves out; ValueError with its
        own words alone.
        """


_NAMES = {key: info.default for key, info in DataSpec.model_fields.items() if key.endswith("_field")}
_NAMES.pop("weight_field")  # in a turn, not in a row
STANDARD = {**_NAMES, "format": "auto", "ignore_columns": []}
"""How a converted row is read."""


def as_standard(row: Row, where: str, spec: DataSpec) -> tuple[Row, DataSpec]:
    """The row as the user's format converts it, and how to read that; both as they are where `data.format` is none.

    Raises RequestError at `where` for a row that does not fit or cannot be converted, and from `data.format` for a
    class that cannot be loaded.
    """
    if not is_own(spec.format):
        return row, spec
    own, name = _loaded(spec.format), spec.format.rpartition(":")[2]
    row = dict(seen(row, spec))
    try:
        if not own.fits(row):
            columns = ", ".join(map(str, row)) or "none"
            what = f"does not fit {name}, the format that data.format names: its columns are {columns}"
            raise RequestError(Problem(what, where, "correct the row, or name another data.format"))
        made: object = own.convert(row)
    except RequestError:
        raise
    except Exception as error:  # whatever a user's code raises
        said = str(error) if type(error) is ValueError and str(error) else f"{type(error).__name__}: {error}"
        place = user_code.user_line_of(error)
        what = f"{name} cannot read it: {said}" + (f" ({place})" if place else "")
        raise RequestError(Problem(what, where, "correct the row, or the format")) from error
    if not isinstance(made, dict):
        what = f"{name}.convert returned {kind_of(made)}, not a row"
        raise RequestError(Problem(what, where, 'return a mapping such as {"messages": […]}, or {"text": "…"}'))
    return made, spec.model_copy(update=STANDARD)


def _loaded(code: str) -> RowFormat:
    file = Path(code.rpartition(":")[0]).expanduser().absolute()
    state = file.stat() if file.is_file() else None
    return _load(code, str(file), state and (state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=32)
def _load(code: str, file: str, state: tuple[int, int] | None) -> RowFormat:
    """One object for a file as it is; RequestError for a class that is none of ours."""
    own = user_code.load(code, "data.format")
    if not (isinstance(own, type) and issubclass(own, RowFormat)):
        what = f"{code} is no subclass of {RowFormat.__module__}.{RowFormat.__name__}"
        raise RequestError(Problem(what, "data.format", "derive it from that"))
    if inspect.isabstract(own):
        raise RequestError(Problem(f"{code} has no method convert", "data.format", "define convert(self, row)"))
    try:
        return own()
    except Exception as error:
        what = f"{code} cannot be made: {type(error).__name__}: {error}"
        raise RequestError(Problem(what, "data.format", "define __init__(self) without arguments, or none")) from error
