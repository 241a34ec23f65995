"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass

from runner.rundir.directory import RunDir


@dataclass(frozen=True)
class Outcome:
    """How a worker ended."""

    run: RunDir
    exit_code: int
