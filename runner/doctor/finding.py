"""A finding of `doctor`, and the run that the machine is checked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from runner.errors import CannotRunError
from runner.plan.plan import Plan
from runner.spec import RunSpec

State = Literal["ok", "note", "warning", "problem"]
"""`note`: worth knowing; `warning`: a run may be slow or fail; `problem`: it fails."""

STATES: tuple[State, ...] = ("ok", "note", "warning", "problem")
"""From best to worst."""

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One check and what came of it."""

    name: str
    """Subject of the check: `driver`, `disk`, `HF_TOKEN`."""
    state: State
    """The worst decides the exit code."""
    found: str
    """In one line."""
    remedy: str | None = None
    """Remedy; None where there is nothing to do."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same in numbers, units in their names: for `--json`."""


@dataclass(frozen=True)
class DoctorTarget:
    """The run that the machine is checked for."""

    spec: RunSpec
    """With nothing left open."""
    plan: Plan | None
    """None for a model whose shape is not known."""

    @property
    def here(self) -> bool:
        """True if the run is on this machine, not rented."""
        return self.spec.where.name == "local"


def size_text(size: float) -> str:
    """Bytes, as `63.0 GiB` or `64 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def exit_code(findings: Iterable[Finding]) -> int:
    """0, or that of CannotRunError where there is a problem."""
    return CannotRunError.exit_code if any(f.state == "problem" for f in findings) else 0
