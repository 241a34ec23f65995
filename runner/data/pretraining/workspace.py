"""Folders of a pretraining experiment: shards, tokenizer and caches, here or on a pod's volume.

datasets/train/<experiment>/      shards and their manifest.json
datasets/val/<experiment>/
artifacts/tokenizer/<experiment>/
hf_cache/                         what the Hub's libraries keep
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config import json_text
from runner.spec import Objective, Pretrain


@dataclass(frozen=True)
class Workspace:
    """The folders of one experiment."""

    root: Path
    experiment: str

    @property
    def train(self) -> Path:
        """Shards to train on."""
        return self.root / "datasets" / "train" / self.experiment

    @property
    def val(self) -> Path:
        """Shards that are held out."""
        return self.root / "datasets" / "val" / self.experiment

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's bundle."""
        return self.root / "artifacts" / "tokenizer" / self.experiment

    @property
    def hf_cache(self) -> Path:
        """Return the folder for `HF_HOME`."""
        return self.root / "hf_cache"


def workspace_of(objective: Objective) -> Workspace | None:
    """None for an objective that trains on the rows of `data` as they are."""
    if not isinstance(objective, Pretrain) or objective.experiment is None:
        return None
    root = objective.root or os.environ.get("RUNNER_WORKSPACE") or "."
    return Workspace(Path(root).expanduser(), objective.experiment)


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of shards; empty if there is none, or it is unreadable."""
    return json_object(folder / "manifest.json")


def json_object(file: Path) -> dict[str, Any]:
    """A mapping that was written as JSON; empty where there is none, or none that can be read."""
    try:
        content = json_text.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_whole(folder: Path) -> bool:
    """All shards were written, and are there as they were written."""
    manifest = manifest_of(folder)
    return bool(manifest.get("complete") and manifest.get("shards")) and not has_lost(folder)


def is_ready(folder: Path, shards: str) -> bool:
    """A run can train on the shards that are there: on all of them, or with `objective.shards=reuse` on those of a
    stream that was interrupted, too."""
    return is_whole(folder) or (shards == "reuse" and bool(manifest_of(folder).get("shards")) and not has_lost(folder))


def has_lost(folder: Path) -> bool:
    """A shard that was written is not there as it was written."""
    shards = manifest_of(folder).get("shards", [])
    return any(_size(folder / shard["file"]) != shard["bytes"] for shard in shards)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None
