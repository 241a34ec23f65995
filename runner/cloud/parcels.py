"""What of a run lies on this machine and has to travel: files and folders, named by their content.

A volume that has a parcel already is not sent it twice; and a spec whose paths name parcels is the same on every pod.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import Problem, RequestError
from runner.spec import LocalPlace, RunSpec

BLOCK = 1 << 20
FILES = (("data", "path"), ("data", "eval_path"), ("data", "chat_template"), ("deepspeed", "config"))
"""Keys that may name a file here."""


@dataclass(frozen=True)
class Parcel:
    """A file or folder that travels."""

    key: str
    """The key of the spec that names it, such as `data.path`."""
    source: Path
    target: str
    """Where it belongs, below the workspace."""
    size: int
    """Bytes."""


def parcels(spec: RunSpec) -> list[Parcel]:
    """Everything on this machine that the spec names. RequestError for a file that is not there."""
    return [_parcel(key, source) for key, source in _named(spec)]


def rewritten(spec: RunSpec, workspace: str, found: list[Parcel]) -> RunSpec:
    """The spec as the pod runs it: its own paths, and a place that is here."""
    changes: dict[str, dict[str, Any]] = {}
    for parcel in found:
        part, _, name = parcel.key.partition(".")
        changes.setdefault(part, {})[name] = f"{workspace}/{parcel.target}"
    changes.setdefault("run", {})["output_dir"] = f"{workspace}/runs"
    parts = {name: getattr(spec, name).model_copy(update=values) for name, values in changes.items()}
    return spec.model_copy(update={**parts, "where": LocalPlace()})


def _named(spec: RunSpec) -> Iterator[tuple[str, Path]]:
    if spec.model.package is None and Path(spec.model.id).is_dir():
        yield "model.id", Path(spec.model.id)
    for part, name in FILES:
        value = getattr(getattr(spec, part), name)
        if value is None or (part == "data" and name.endswith("path") and spec.data.source != "file"):
            continue
        if part == "deepspeed" and not Path(value).is_file():
            continue  # one of the project's own, which the wheel carries
        yield f"{part}.{name}", Path(value).expanduser()


def _parcel(key: str, source: Path) -> Parcel:
    if not source.exists():
        raise RequestError(Problem(f"{key}={source} is not there", None, "name a file or folder of this machine"))
    files = sorted(f for f in source.rglob("*") if f.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    size = 0
    for file in files:
        name = os.fspath(file.relative_to(source)) if source.is_dir() else file.name
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        size += file.stat().st_size
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    shelf = "artifacts" if source.is_dir() else "datasets"
    return Parcel(key, source.absolute(), f"{shelf}/{digest.hexdigest()[:16]}/{source.name}", size)
