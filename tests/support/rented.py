"""What tests of renting share: a run directory, its spec, a key, and a state folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from runner.cloud.lease import Lease
from runner.cloud.ledger import Ledger
from runner.cloud.rent_pod import acquire
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from tests.support.front import spec_of

if TYPE_CHECKING:
    from runner.emulator.server import Emulator

HOURS = 0.5
PLAN: dict[str, Any] = {"hours": HOURS, "usd_per_hour": 0.74, "usd": 0.37, "disk_gib": 8.0}
RTX4090 = "NVIDIA GeForce RTX 4090"
A6000 = "NVIDIA RTX A6000"


KEY = "ssh-ed25519 AAAA test"
"""Public key of a run."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ledger and cache of the test's own."""
    monkeypatch.setenv("RUNNER_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "state"


@pytest.fixture
def hello(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod is ready when its port is mapped: what these tests are about ends where SSH begins."""
    monkeypatch.setattr("runner.cloud.readiness.says_hello", lambda host, port: True)


def impatient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Give a pod's end up after so long."""
    monkeypatch.setattr("runner.cloud.termination.LEAST_PATIENCE_S", seconds)
    monkeypatch.setattr("runner.cloud.termination.PATIENCE_S", seconds)


def rented_spec(*words: str) -> RunSpec:
    """The demo on a rented RTX 4090; words win."""
    hw = () if any(word.startswith("hw=") for word in words) else ("hw=rtx4090",)
    return spec_of("where=runpod", "model=mistral7b", "method=qlora4", "train.max_steps=10", *hw, *words)


def run_of(spec: RunSpec, folder: Path) -> RunDir:
    """A new run directory."""
    return RunDir.create(spec.model_copy(update={"run": spec.run.model_copy(update={"output_dir": str(folder)})}))


def rent(folder: Path, *words: str, say: Callable[[str], None] = print) -> Lease:
    """Rent a pod for the demo, with a new run directory in `folder`."""
    spec = rented_spec("where.setup_minutes=0.2", "where.bad_host_minutes=0.02", *words)
    return acquire(run_of(spec, folder / "runs"), spec, PLAN, KEY, say)


def states(name: str) -> list[str]:
    """Every state that the ledger has had a pod in."""
    return [new for _, new, _ in Ledger().transitions(name)]


def creates(emulator: Emulator) -> int:
    """Pods that were asked for."""
    return sum(e.method == "POST" and e.path == "/v2/pods" for e in emulator.exchanges)
