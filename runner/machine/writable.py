"""Tests by writing whether the folders that a run fills can be written to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runner.errors import CannotRunError, Problem
from runner.hub import config_json
from runner.paths import cache_dir
from runner.spec import RunSpec

BLOCK = 2**20


def check_caches(spec: RunSpec) -> None:
    """CannotRunError for caches that this run would fill and cannot."""
    if found := list(problems(spec)):
        raise CannotRunError(*found)


def problems(spec: RunSpec) -> Iterator[Problem]:
    """One per such cache; what a pod downloads is put on its own disk."""
    folders = [("the cache", cache_dir(), "RUNNER_CACHE")]
    if not spec.is_rented and (_downloads_model(spec) or spec.data.source == "hub"):
        folders.append(("the Hugging Face cache", config_json.cache_folder(), "HF_HOME"))
    for title, folder, variable in folders:
        if why := why_not(folder):
            remedy = f"name another folder: export {variable}=…"
            yield Problem(f"{title} ({folder}) cannot be written to: {why}", variable, remedy)


def why_not(folder: Path, *, synced: bool = False) -> str | None:
    """Return why 1 MiB cannot be written to and read from `folder` or its nearest parent; None if it can. Leaves
    nothing. `synced`: flushed to the disk."""
    block = os.urandom(BLOCK)  # random: a file system that compresses cannot make it nothing
    try:
        with tempfile.NamedTemporaryFile(dir=nearest(folder), prefix=".runner-doctor-") as file:
            file.write(block)
            file.flush()
            if synced:
                os.fsync(file.fileno())
            if Path(file.name).read_bytes() != block:
                return "what was read back is not what was written"
    except OSError as error:
        return error.strerror or str(error)
    return None


def nearest(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there: where it would be made."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if os.path.exists(folder))


def _downloads_model(spec: RunSpec) -> bool:
    model = spec.model
    return not (
        model.package
        or model.gguf_file
        or model.from_scratch
        or Path(model.id).expanduser().is_dir()
        or config_json.is_cached(model.id)
    )
