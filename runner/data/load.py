"""Load examples as a `DataSpec` names them: read, recognised, checked, split.

`load_examples` is the way in; `read_dataset` also says what was skipped. The formats are in row_formats.py, what they
become in examples.py.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar, cast

from runner.data import commands_dataset
from runner.data.examples import Example, Kind, Learnable, as_kind
from runner.data.pretraining.documents import reference_pages
from runner.data.readers.files import Table, raise_problems
from runner.data.readers.hub import load_hub
from runner.data.readers.sources import Loose, Source, files_of, mixed, sources_of
from runner.data.readers.streams import tables
from runner.data.row_formats import UNREAD, detect_format, left_out, read_row, rewarded
from runner.data.row_store import Stored, num_bytes
from runner.errors import Problem, RequestError
from runner.report.text import counted
from runner.spec import DataSpec
from runner.spec.input_paths import is_url

T = TypeVar("T")

IN_MEMORY_BYTES = 64 << 20
"""Size of the files of a source up to which its rows are kept in memory: about 0.5 GB then."""
IN_MEMORY_ROWS = 200_000
"""The same of a data set on the Hub, whose bytes nobody counts."""
PIECE = 5000
LOOKED_AT = 50
"""Rows whose columns are compared with what was read of them."""


def canonical_rows(
    table: Table, spec: DataSpec, kind: Kind | None = None, shape: str | None = None
) -> tuple[list[Learnable], list[Problem]]:
    """Every row made canonical by the first row's shape (or `shape`), and every mistake there is.

    `kind` is what the objective learns from; without it rows become what they are.
    """
    if not table.rows:
        return [], table.problems or [Problem("holds no rows", table.name, "add rows, or name another file")]
    found: list[Learnable] = []
    problems = list(table.problems)
    try:
        shape = shape or detect_format(table.rows[0], spec, kind)
    except RequestError as error:  # the same holds for every other row
        remedy = _inner_list(table, spec, kind) if len(table.rows) == 1 else None
        found_wrong = [replace(p, source=table.place(0), remedy=remedy or p.remedy) for p in error.problems]
        return [], problems + found_wrong
    for index, row in enumerate(table.rows):
        try:
            one = read_row(row, table.place(index), spec, shape, kind)
        except RequestError as error:
            _add(problems, error.problems, spec)
            continue
        try:
            found.append(as_kind(one, kind, table.place(index)) if kind else one)
        except RequestError as error:
            return [], problems + error.problems  # every other row is of that kind as well
    return found, problems


def _inner_list(table: Table, spec: DataSpec, kind: Kind | None) -> str | None:
    """How to get at the rows of `{"data": [{…}, …]}`; None where no column of the one row is a list of rows."""
    for name, value in table.rows[0].items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            with suppress(RequestError):
                detect_format(value[0], spec, kind)
                said, file = f"its list {name} holds the rows", Path(table.name).expanduser()
                if file.suffix.lower() not in (".json", ".jsonl") or not file.is_file():
                    return f"{said}: write them alone"
                code = f"import json; print(json.dumps(json.load(open({str(file)!r}, encoding='utf-8'))[{name!r}]))"
                return f"{said}: python -c {shlex.quote(code)} > rows.json, and write data.path=rows.json"
    return None


def _add(problems: list[Problem], more: Sequence[Problem], spec: DataSpec) -> None:
    """Also these; a column that nothing reads once, not for every row, but where rows that are skipped are counted."""
    once = spec.on_error == "stop"
    for problem in more:
        if not (once and UNREAD in problem.what and any(problem.what == known.what for known in problems)):
            problems.append(problem)


def split(rows: Sequence[T], eval_fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Hold out `eval_fraction` of the rows, the same ones for the same seed; both keep their order.

    A fraction above 0 holds out at least one row, and at least one always stays for training.
    """
    wanted = max(1, round(len(rows) * eval_fraction)) if eval_fraction else 0
    wanted = min(wanted, max(0, len(rows) - 1))
    held = set(random.Random(seed).sample(range(len(rows)), wanted))
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


@dataclass(frozen=True)
class Loaded:
    """A loaded data set."""

    train: Sequence[Learnable]
    held: Sequence[Learnable]
    skipped: list[Problem] = field(default_factory=list)
    """What was wrong with the rows that `data.on_error=skip` left out."""
    left_out: Sequence[str] = ()
    """Columns that were not read."""

    @property
    def examples(self) -> tuple[Sequence[Example], Sequence[Example]]:
        """`train` and `held`, where they were read as kind `sft`."""
        return cast("Sequence[Example]", self.train), cast("Sequence[Example]", self.held)

    @property
    def note(self) -> str | None:
        """Return a sentence about skipped rows."""
        lines = [f"Columns that were not read: {', '.join(self.left_out)}"] if self.left_out else []
        if self.skipped:
            rows, first = len({problem.source for problem in self.skipped}), self.skipped[0]
            lines.append(
                f"Skipped {counted(rows, 'row')} that {'is' if rows == 1 else 'are'} wrong; the first: {first.source}: "
                f"{first.what}"
            )
        return "\n".join(lines) or None


def read_dataset(spec: DataSpec, seed: int, kind: Kind | None = "sft") -> Loaded:
    """Training and held-out rows of a data set, as an objective of that kind learns them.

    Rows are held out of each source before sources are mixed: none that is drawn twice can be in both.

    Raises RequestError with all mistakes in the data together, the first 20 spelled out; with `data.on_error=skip`
    only where no row is left.
    """
    sources, held_source = all_sources(spec)
    problems: list[Problem] = []
    left: dict[str, None] = {}
    trains: list[Sequence[Learnable]] = []
    held: list[Sequence[Learnable]] = []
    for own in sources:
        rows = _rows_of(own, kind, problems, left)[: own.limit]
        if held_source is None:
            rows, out = _split(rows, spec.eval_fraction, seed)
            held.append(out)
        trains.append(rows)
    if held_source is not None:
        held = [_rows_of(held_source, kind, problems, left)]
    if problems and (spec.on_error == "stop" or not any(trains) or (held_source is not None and not any(held))):
        raise_problems(problems)
    train, out = trains[0], held[0]
    if len(sources) > 1:
        order = mixed([len(rows) for rows in trains], [own.weight for own in sources], spec.mix, seed)
        train = _joined((trains[source][row] for source, row in order[: spec.max_examples]), trains, kind)
        out = out if len(held) == 1 else _joined(chain.from_iterable(held), held, kind)
    return Loaded(train[: spec.max_examples], out[: spec.max_eval_examples], problems, list(left))


def load_examples(spec: DataSpec, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples for supervised learning, in memory; errors as in `read`."""
    train, held = read_dataset(spec, seed).examples
    return list(train), list(held)


def _rows_of(source: Source, kind: Kind | None, problems: list[Problem], left: dict[str, None]) -> Sequence[Learnable]:
    """The rows of one source, in a file where they are many; what is wrong with them is added to `problems`, columns
    that are not read to `left`."""
    many = num_bytes(source.files) > IN_MEMORY_BYTES or any(map(is_url, source.files))
    many = many or (isinstance(source, Loose) and len(source.table.rows) > IN_MEMORY_ROWS)
    if kind is None or not many:
        found: list[Learnable] = []
        for table in source.tables():
            rows, wrong = canonical_rows(table, source.spec, kind)
            found += rows
            _add(problems, wrong, source.spec)
            left |= dict.fromkeys(columns_left(table, source.spec, kind))
        return found
    return Stored.of(_streamed(source, kind, problems, left), kind)


def _streamed(source: Source, kind: Kind, problems: list[Problem], left: dict[str, None]) -> Iterator[Learnable]:
    """Rows of large files, a piece at a time; the first piece of a file tells the shape of all."""
    files = [source.table.pieces(PIECE)] if isinstance(source, Loose) else map(tables, source.files)
    for pieces in files:
        shape: str | None = None
        for table in pieces:
            rows, wrong = canonical_rows(table, source.spec, kind, shape)
            yield from rows
            _add(problems, wrong, source.spec)
            left |= dict.fromkeys(columns_left(table, source.spec, kind, shape))
            if shape is None and table.rows:
                with suppress(RequestError):
                    shape = detect_format(table.rows[0], source.spec, kind)


def columns_left(table: Table, spec: DataSpec, kind: Kind | None, shape: str | None = None) -> list[str]:
    """Columns that are not read, by the first rows."""
    with suppress(RequestError):
        shape = shape or (detect_format(table.rows[0], spec, kind) if table.rows else None)
    if shape is None:
        return []
    rows = [table.rows[index] for index in range(min(LOOKED_AT, len(table.rows)))]
    return list(dict.fromkeys(name for row in rows for name in left_out(row, spec, shape, kind)))


def _split(
    rows: Sequence[Learnable], eval_fraction: float, seed: int
) -> tuple[Sequence[Learnable], Sequence[Learnable]]:
    if not isinstance(rows, Stored):
        return split(rows, eval_fraction, seed)
    train, held = split(range(len(rows)), eval_fraction, seed)
    return rows.take(train), rows.take(held)


def _joined(rows: Iterable[Learnable], of: Sequence[Sequence[Learnable]], kind: Kind | None) -> Sequence[Learnable]:
    """Rows of several sources; in a file where one of those is."""
    if kind is not None and any(isinstance(source, Stored) for source in of):
        return Stored.of(rows, kind)
    return list(rows)


def all_sources(spec: DataSpec) -> tuple[list[Source], Source | None]:
    """What to train on, and held-out rows that are elsewhere."""
    if spec.source == "file":
        return sources_of(spec), Source(spec.eval_path, files_of(spec.eval_path), spec) if spec.eval_path else None
    held: Table | None = None
    if spec.source == "hub":
        train, held = load_hub(spec)
    elif spec.source == "pydoc":
        train = Table("pydoc", [{"text": text} for text in reference_pages()])
    else:
        rows, others = ([dict(row) for row in rows] for rows in commands_dataset.examples())
        train, held = Table("commands", rows), Table("commands, held-out", others)
    return [Loose(train.name, [], spec, table=train)], Loose(held.name, [], spec, table=held) if held else None


@dataclass(frozen=True)
class InspectedFile:
    """A file or split with its rows and problems, for inspection."""

    name: str
    shape: str | None
    """None where no shape fits."""
    rows: list[Learnable]
    problems: list[Problem]
    left_out: list[str]
    """Columns that are not read."""
    rewarded: list[str] = field(default_factory=list)
    """Columns that nothing but reward functions gets."""


def inspect_files(spec: DataSpec, kind: Kind | None) -> tuple[list[InspectedFile], list[InspectedFile]]:
    """Read training and held-out sources with all problems; nothing is refused.

    RequestError only where there is nothing to read at all.
    """
    sources, held = all_sources(spec)
    return (
        [_found(table, own.spec, kind) for own in sources for table in own.tables()],
        [_found(table, held.spec, kind) for table in held.tables()] if held else [],
    )


def _found(table: Table, spec: DataSpec, kind: Kind | None) -> InspectedFile:
    rows, problems = canonical_rows(table, spec, kind)
    try:
        shape = detect_format(table.rows[0], spec, kind) if table.rows else None
    except RequestError:
        shape = None
    given: list[str] = []
    with suppress(RequestError):  # which `problems` has
        given = rewarded(table.rows[0], spec) if kind == "prompts" and table.rows else []
    return InspectedFile(table.name, shape, rows, problems, columns_left(table, spec, kind, shape), given)
