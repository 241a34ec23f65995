"""Rows of a data set on the Hugging Face Hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from runner.config.did_you_mean import nearest
from runner.data.readers import arrow
from runner.data.readers.files import Row, Table
from runner.data.readers.urls import UnreachableError
from runner.errors import Problem, RequestError
from runner.hub import config_json
from runner.spec import DataSpec


def load_hub(spec: DataSpec) -> tuple[Table, Table | None]:
    """The training split, and the held-out split where `data.eval_split` names one.

    Raises RequestError in one line where the Hub cannot be reached, the data set is gated or
    does not exist, or has no such subset, split or revision.
    """
    # Without a held-out split, rows are held out of all of them first: nothing may be cut here.
    limit = spec.max_examples if spec.eval_split else None
    if spec.streaming and spec.max_examples and not spec.eval_split:
        limit = ceil(spec.max_examples / (1 - spec.eval_fraction)) + 1
    train = _split(spec, "split", spec.split, limit)
    held = spec.max_eval_examples if spec.streaming else None
    return train, _split(spec, "eval_split", spec.eval_split, held) if spec.eval_split else None


def first_rows(spec: DataSpec, count: int, notes: list[str]) -> list[Table]:
    """The first rows of each split, without downloading the data set; none, and a note, where nobody answers.

    RequestError as in `load_hub`.
    """
    try:
        if not Path(str(spec.id)).is_dir():  # which is read as a repository is
            config_json.check_dataset(str(spec.id))
        few = spec.model_copy(update={"streaming": True})
        wanted = [("split", spec.split), *([("eval_split", spec.eval_split)] if spec.eval_split else [])]
        return [_split(few, key, split, count) for key, split in wanted]
    except (config_json.UnreachableError, UnreachableError) as error:
        notes.append(f"{error}; its rows are checked when they are loaded")
        return []


def _split(spec: DataSpec, key: str, split: str, limit: int | None) -> Table:
    try:  # 0.9 s to import, and only Hub data needs it
        datasets = import_module("datasets")
    except ImportError:
        raise UnreachableError(Problem("data.source=hub needs datasets", None, "pip install datasets")) from None
    assert spec.id is not None  # DataSpec: source=hub has an id
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # else five lines about retries stand before the one that matters
    try:
        rows = datasets.load_dataset(
            spec.id, name=spec.subset, split=split, revision=spec.revision, streaming=spec.streaming
        )
        if spec.streaming:  # no more than is asked for comes over the network
            return Table(f"{spec.id} {split}", list(map(_cleaned(rows), islice(rows, limit))))
    except Exception as error:  # whatever a loader of foreign files raises, the data set is at fault
        kind = UnreachableError if isinstance(error, ConnectionError) else RequestError
        raise kind(problem_of(error, spec, key, split)) from error
    finally:
        hub_log.setLevel(level)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    return Table(f"{spec.id} {split}", _rows(rows))


def _cleaned(rows: Any) -> Callable[[Row], Row]:
    """What takes the nulls that Arrow invents out of a row; a stream may not know its types."""
    if rows.features is None:
        return lambda row: {name: arrow.without_nulls(value) for name, value in row.items()}
    return arrow.converter(rows.features.arrow_schema, decoded=True)


def _rows(rows: Any) -> Sequence[Row]:
    """The rows of a `datasets.Dataset`, each read and cleaned when it is asked for."""
    clean = _cleaned(rows)

    def cleaned(batch: dict[str, list[object]]) -> dict[str, list[object]]:
        found = [clean(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in found] for name in batch}

    lazy: Sequence[Row] = rows.with_transform(cleaned)
    return lazy


def problem_of(error: Exception, spec: DataSpec, key: str, split: str) -> Problem:
    """Return the error of `datasets` 5.2 for `data.<key>=<split>` in one line, with a remedy."""
    text = str(error)
    choices = re.findall(r"'([^']*)'", text.rpartition("[")[2])
    page = f"https://huggingface.co/datasets/{spec.id}"
    if isinstance(error, ConnectionError):
        remedy = "check the network and HF_HUB_OFFLINE, or bring the rows in a file: data=file data.path=…"
        return Problem(f"{spec.id}: the Hugging Face Hub cannot be reached", "data.id", remedy)
    if "gated" in text:
        remedy = f"accept its terms at {page} and set HF_TOKEN to a token of that account"
        return Problem(f"{spec.id} is gated, and this machine has no access", "data.id", remedy)
    if text.startswith("Revision"):
        return Problem(f"{spec.id} has no revision {spec.revision}", "data.revision", f"see {page}/tree/main")
    if text.startswith(("Unknown split", "Bad split")):  # downloaded, streamed
        key = f"data.{key}"
        return Problem(f"{spec.id} has no split {split}", key, _choose(key, split, choices))
    if text.startswith(("Config name is missing", "BuilderConfig")):
        what = f"has no subset {spec.subset}" if spec.subset else "has several subsets, and none is named"
        listed = re.findall(r"'([^']*)'", text.partition("[")[2].partition("]")[0])
        return Problem(f"{spec.id} {what}", "data.subset", _choose("data.subset", spec.subset or "", listed))
    if type(error).__name__ == "DatasetNotFoundError":
        remedy = "check the spelling (org/name); for a private data set set HF_TOKEN"
        return Problem(f"{spec.id} is not on the Hugging Face Hub, or private", "data.id", remedy)
    reason = text.strip().split("\n")[0] or type(error).__name__
    return Problem(f"{spec.id} cannot be loaded: {reason}", "data.id", f"see {page}")


def _choose(key: str, typed: str, choices: list[str]) -> str:
    near = nearest(typed, choices) if typed else None
    return f"did you mean {key}={near}?" if near else f"write {key}= one of {', '.join(choices)}"
