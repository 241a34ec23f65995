"""Check a run's rows before anything is made or rented, with training's own reader and rules.

Every row where that takes a moment (files of `WHOLE_BYTES` in all), else the beginning of the first `MANY_FILES` files;
how many were looked at is said. Without the model's tokenizer only `data.chat_template` can be tried; token ids and the
longest length are left to training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.config.did_you_mean import nearest
from runner.data import user_code
from runner.data.chat_template import refused, render_checked
from runner.data.chat_tokenizer import template_of
from runner.data.examples import (
    Example,
    Kind,
    Learnable,
    Preference,
    PromptExample,
    Turn,
    UnpairedExample,
    columns,
)
from runner.data.inspect.sample import first_rows_of_file
from runner.data.inspect.token_counts import tokenizer_file
from runner.data.load import canonical_rows
from runner.data.loss_mask import TurnFinder, learned_spans
from runner.data.pretraining.documents import texts
from runner.data.pretraining.workspace import is_whole, workspace_of
from runner.data.readers.files import Table, kind_of_file, raise_problems
from runner.data.readers.hub import first_rows
from runner.data.readers.sources import Source, files_of, sources_of
from runner.data.readers.streams import in_pieces, tables
from runner.data.readers.urls import UnreachableError, url_size
from runner.data.row_store import num_bytes
from runner.errors import Problem, RequestError
from runner.spec import DataSpec, Grpo, Pretrain, RunSpec
from runner.spec.input_paths import is_url

WHOLE_BYTES = 32 << 20
"""Files of this size in all are checked whole: about 0.7 s."""
PIECE_BYTES = 2 << 20
"""Of a larger one's beginning: 50 ms."""
MANY_FILES = 8
HUB_ROWS = 200
TEMPLATE_ROWS = 200
"""Rows that the chat template is tried on: 20 ms."""
BUNDLED: dict[str, dict[str, Any]] = {"commands": {"prompt": "…", "completion": "…"}, "pydoc": {"text": "…"}}
"""A row of each source that comes with the project: only whether the objective learns from such rows is in question."""


@dataclass
class _Part:
    """Rows of one source, as they come, and what was found in them."""

    name: str
    spec: DataSpec
    tables: Iterable[Table]
    whole: bool = True
    """They are all of its rows."""
    count: int = 0
    rows: list[Learnable] = field(default_factory=list)
    """The first ones."""
    columns: dict[str, None] = field(default_factory=dict)
    """Names of what a reward function is given, in order."""
    names: dict[str, None] = field(default_factory=dict)
    """Columns of all rows, where keys name some."""
    answered: bool = False
    """Some question has an answer to compare with."""
    wrong: list[Problem] = field(default_factory=list)
    """With rows, which `data.on_error=skip` leaves out."""
    broken: list[Problem] = field(default_factory=list)
    """With the source, from here on."""

    def look(self, kind: Kind, turns: TurnFinder | None, loss_on: str) -> None:
        """Read and check."""
        try:
            for table in self.tables:
                found, mistakes = canonical_rows(table, self.spec, kind)
                if self.spec.ignore_columns or any(_named(self.spec)):
                    self.names |= {str(name): None for row in table.rows for name in row}
                self.wrong += mistakes
                self.count += len(found)
                self.rows += found[: TEMPLATE_ROWS - len(self.rows)]
                self.columns |= dict.fromkeys(columns(found) if found else ())
                self.answered |= any(
                    isinstance(row, PromptExample) and row.answer not in (None, "", []) for row in found
                )
        except RequestError as error:
            self.broken = error.problems
        self.wrong += [p for row in self.rows for p in _tried(turns, row, loss_on)] if turns else []
        if self.whole and not self.count and not self.broken:
            self.broken = self.wrong or [Problem("holds no rows", self.name, "add rows, or name another file")]


def check_rows(spec: RunSpec) -> list[str]:
    """Notes for the user; RequestError with everything that is wrong with rows, chat template and reward functions."""
    notes: list[str] = []
    objective = spec.objective
    if isinstance(objective, Pretrain) and (place := workspace_of(objective)) is not None:
        if objective.shards == "anew" or (objective.shards == "auto" and not is_whole(place.train)):
            _check_documents(spec, notes)
        if spec.eval.every_steps and objective.mode != "split" and not (spec.data.eval_path or spec.data.eval_split):
            raise RequestError(nothing_held_out(spec))
        return notes
    template = template_of(tokenizer_file(spec.model), spec.data)
    turns = TurnFinder(template) if template else None
    parts = _parts(spec, notes)
    for part in parts:
        part.look(objective.learns_from, turns, getattr(objective, "loss_on", "all"))
        if not part.whole:
            notes.append(f"the first {part.count:,} rows of {part.name} were checked, the others when they are loaded")
    stops = spec.data.on_error == "stop"
    problems = list(dict.fromkeys(p for part in parts for p in [*(part.wrong if stops else ()), *part.broken]))
    if not problems and parts and all(part.whole for part in parts):
        problems += _names_nothing(spec.data, parts)
    if spec.eval.every_steps and not problems and not _holds_out(spec.data, parts):
        problems.append(nothing_held_out(spec))
    if isinstance(objective, Grpo):
        known = {name for part in parts for name in part.columns} if all(part.whole for part in parts) else None
        problems += user_code.reward_problems(objective, known, here=spec.where.name == "local")
        if known and "exact_match" in objective.rewards and not problems and not any(part.answered for part in parts):
            problems.append(user_code.nothing_right(known))
    if problems:
        raise_problems(problems)
    return notes


def _names_nothing(data: DataSpec, parts: Sequence[_Part]) -> Iterator[Problem]:
    """Columns to read or to ignore that no row of any source has."""
    names = {name for part in parts for name in part.names}
    ignored = [] if data.source in BUNDLED else [("ignore_columns", name) for name in data.ignore_columns]
    for key, name in dict.fromkeys([*ignored, *(one for part in parts for one in _named(part.spec))]):
        if name not in names:
            near = nearest(name, sorted(names))
            remedy = f"did you mean {near}?" if near else "leave it out"
            yield Problem(f"no row has the column {name}", f"data.{key}", remedy)


def _named(data: DataSpec) -> Iterator[tuple[str, str]]:
    """Keys that name another column than they do by themselves; a weight is in a turn, not in a row."""
    for key, info in DataSpec.model_fields.items():
        if key.endswith("_field") and key != "weight_field" and (name := getattr(data, key)) != info.default:
            yield key, name


def nothing_held_out(spec: RunSpec) -> Problem:
    """Measurements are wanted, and there is nothing to measure on."""
    if spec.objective.sharded:
        remedy = "write objective.mode=split, name data.eval_path, or leave eval.every_steps out"
    else:
        remedy = (
            "write data.eval_fraction=0.05 (of two rows or more), or data.eval_path=…, or leave eval.every_steps out"
        )
    what = f"eval.every_steps={spec.eval.every_steps} measures held-out rows, and there are none"
    return Problem(what, "eval.every_steps", remedy)


def _holds_out(data: DataSpec, parts: list[_Part]) -> bool:
    """Some rows are held out, or may be; at least one of every source stays for training."""
    if data.source == "commands" or data.eval_path or data.eval_split:
        return True
    may_have_two = data.source in BUNDLED or not parts or any(not part.whole or part.count > 1 for part in parts)
    return data.eval_fraction > 0 and may_have_two


def _parts(spec: RunSpec, notes: list[str]) -> list[_Part]:
    """Every source that can be looked at from here; held-out rows that are elsewhere last."""
    data = spec.data
    if data.source in BUNDLED:
        return [_Part(data.source, data, [Table(data.source, [BUNDLED[data.source]])])]
    if data.source == "hub":
        found = first_rows(data, HUB_ROWS, notes)
        return [_Part(table.name, data, [table], whole=len(table.rows) < HUB_ROWS) for table in found]
    sources = list(_sources(spec, notes))
    whole = sum(num_bytes(source.files) for source in sources) <= WHOLE_BYTES
    parts = [_part(source, whole, notes) for source in sources]
    return [part for part in parts if part is not None]


def _sources(spec: RunSpec, notes: list[str]) -> Iterator[Source]:
    """Training and held-out files that are on this machine, or behind a URL that answers."""
    data = spec.data
    each = [data.model_copy(update={"sources": [one]}) for one in data.sources] or [data]
    if data.eval_path:
        each.append(data.model_copy(update={"path": data.eval_path, "sources": []}))
    for one in each:
        path = one.sources[0].path if one.sources else str(one.path)
        if not is_url(path) and not _is_here(path):  # on a pod's own volume: inputs.py refuses what is nowhere
            continue
        try:
            yield from sources_of(one)
        except UnreachableError as error:
            notes.append(f"{error}; its rows are checked when they are loaded")


def _is_here(path: str) -> bool:
    with suppress(RequestError):
        return any(os.path.exists(Path(file).expanduser()) for file in files_of(path))
    return os.path.isdir(Path(path).expanduser())  # an empty one: refused by `files_of`, in words


def _part(source: Source, whole: bool, notes: list[str]) -> _Part | None:
    """All rows of a source, or the beginning of its first files; None, and a note, where nobody answers."""
    if whole and not any(map(is_url, source.files)):
        return _Part(source.name, source.spec, (table for file in source.files for table in tables(file)))
    found: list[Table] = []
    whole = len(source.files) <= MANY_FILES
    for file in source.files[:MANY_FILES]:
        try:
            table, all_of_it = _beginning(file)
        except UnreachableError as error:
            notes.append(f"{error}; its rows are checked when they are loaded")
            return None
        found.append(table)
        whole &= all_of_it
    return _Part(source.name, source.spec, found, whole)


def _beginning(file: str) -> tuple[Table, bool]:
    """The first rows of a file, and whether these are all."""
    if in_pieces(file):
        pieces = tables(file, PIECE_BYTES)
        return next(pieces, Table(file, [])), next(pieces, None) is None
    if not is_url(file):
        return first_rows_of_file(file)[0], False
    if url_size(file) > WHOLE_BYTES:
        kind = kind_of_file(file)
        raise UnreachableError(Problem(f"{file} is a large {kind} file, which can only be read whole"))
    return next(tables(file), Table(file, [])), True


def _check_documents(spec: RunSpec, notes: list[str]) -> None:
    """As `_parts`, for text that becomes shards: RequestError for the first document that is none."""
    if spec.data.source != "file":
        for part in _parts(spec, notes):
            for table in part.tables:
                raise_problems(table.problems) if table.problems else None
        return
    for source in _sources(spec, notes):
        count = 0
        try:
            for text in texts(source):
                count += len(text) + 1
                if count > WHOLE_BYTES:
                    notes.append(f"the first {count >> 20} MB of {source.name} were checked")
                    break
        except UnreachableError as error:
            notes.append(f"{error}; its rows are checked when they are loaded")
            continue
        if not count:
            raise_problems([Problem("holds no document", source.name, "name another source")])


def _tried(turns: TurnFinder, row: Learnable, loss_on: str) -> Iterator[Problem]:
    """Conversations that the chat template refuses in words, or hides a part of; whatever else it may raise is left to
    training, which has all special tokens."""
    try:
        if isinstance(row, Example):
            if row.completion:
                shown = turns.template.render([*row.prompt, *row.completion], tools=row.tools)
                learned_spans(row, loss_on, shown.text, shown.marks, turns)
            return
        for prompt, answer in _conversations(row):
            render_checked(turns.template, prompt, answer, getattr(row, "tools", ()))
    except RequestError as error:
        yield from (Problem(p.what, row.where, p.remedy) for p in error.problems)
    except Exception as error:
        if type(error).__name__ == "TemplateError":  # Jinja's own subclasses are mistakes in the template
            given = [] if isinstance(row.prompt, str) else row.prompt
            yield refused([*given, *getattr(row, "completion", [])], error, row.where)


def _conversations(row: Preference | UnpairedExample | PromptExample) -> Iterator[tuple[list[Turn], list[Turn]]]:
    """Prompt and answer; a question has none."""
    if isinstance(row.prompt, str):
        return
    if isinstance(row, Preference):
        yield from ((row.prompt, said) for said in (row.chosen, row.rejected) if not isinstance(said, str))
    else:
        yield row.prompt, [] if isinstance(row, PromptExample) else row.completion
