"""Keys of a run that name files or folders, and what kind of place such a text is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.paths import CONF
from runner.spec import RunSpec

GLOB_SIGNS = "*?["
OF_POD = "/of-pod-"
"""Begins a path that is nowhere: of a file that only a run's pod has named (cloud/adopted_spec.py)."""


def is_url(path: str) -> bool:
    """`s3://bucket/my.jsonl`, `https://…`: see remote.py."""
    return "://" in path


def is_glob(path: str) -> bool:
    """A pattern on this machine, unless a file is called so."""
    return not is_url(path) and any(sign in path for sign in GLOB_SIGNS)


TEMPLATES = CONF / "chat_template"


def named_places(spec: RunSpec) -> Iterator[tuple[str, str]]:
    """Key and value of everything that a run reads and that may be a file or folder: model, data, template, DeepSpeed's
    config, tokenizer, reward functions (without the function's name)."""
    data, objective = spec.data, spec.objective
    if spec.model.package is None and os.path.isdir(Path(spec.model.id)):  # else of the Hub, whatever file is called so
        yield "model.id", spec.model.id
    yield from _data(spec)
    if data.chat_template is not None and not _is_named(data.chat_template):
        yield "data.chat_template", data.chat_template
    if spec.deepspeed.config is not None:
        yield "deepspeed.config", spec.deepspeed.config
    yield from objective.files()
    yield from _code(spec)


def get_place(values: Any, key: str) -> str:
    """Return the value of a dumped spec at a key of `named_places`. KeyError or IndexError if there is none."""
    for step in key.split("."):
        values = values[int(step)] if step.isdigit() else values[step]
    return str(values)


def put_place(values: Any, key: str, path: str) -> None:
    """Name another file or folder in a dumped spec; a reward function keeps its name."""
    *parents, leaf = (int(step) if step.isdigit() else step for step in key.split("."))
    for step in parents:
        values = values[step]
    function = str(values[leaf]).rpartition(".py:")[2] if is_code(key) else ""
    values[leaf] = f"{path}:{function}" if function and not path.endswith(f".py:{function}") else path


def _data(spec: RunSpec) -> Iterator[tuple[str, str]]:
    data, objective = spec.data, spec.objective
    if not objective.reads_rows:
        return
    if data.source == "hub" and data.id and os.path.isdir(Path(data.id).expanduser()):  # `datasets` reads that one
        yield "data.id", data.id
    if data.source == "file":
        named = [("data.path", data.path), ("data.eval_path", data.eval_path)]
        named += [(f"data.sources.{number}.path", source.path) for number, source in enumerate(data.sources)]
        yield from ((key, path) for key, path in named if path is not None)


def is_code(key: str) -> bool:
    """The key names a Python file and something in it: `FILE.py:NAME`."""
    return key.startswith("objective.rewards.") or key in ("objective.code", "track.code") or key.endswith(".format")


def _code(spec: RunSpec) -> Iterator[tuple[str, str]]:
    tracker = [("track.code", spec.track.code)] if spec.track.code is not None else []
    for key, name in (*spec.objective.code_files(), *tracker, *spec.data.own_formats.items()):
        yield key, name.rpartition(":")[0]


def _is_named(template: str) -> bool:
    return os.path.isfile(TEMPLATES / f"{template}.jinja")  # False also for a name that no file can have
