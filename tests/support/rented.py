"""What tests of renting share: a run directory, its spec, a key, and a state folder of the test's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from tests.support.front import spec_of

HOURS = 0.5
PLAN: dict[str, Any] = {"hours": HOURS, "usd_per_hour": 0.74, "usd": 0.37, "disk_gib": 8.0}
RTX4090 = "NVIDIA GeForce RTX 4090"
A6000 = "NVIDIA RTX A6000"


@dataclass
class Key:
    """Of a run."""

    public: str


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ledger and cache of the test's own."""
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "state"


def rented_spec(*words: str) -> RunSpec:
    """The demo on a rented RTX 4090; words win."""
    hw = () if any(word.startswith("hw=") for word in words) else ("hw=rtx4090",)
    return spec_of("where=runpod", "model=mistral7b", "method=qlora4", "train.max_steps=10", *hw, *words)


def run_of(spec: RunSpec, folder: Path) -> RunDir:
    """A new run directory."""
    return RunDir.create(spec.model_copy(update={"run": spec.run.model_copy(update={"output_dir": str(folder)})}))
