"""Launch options that are not stored in spec.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.cloud.sweep_pool import Pool
    from runner.launcher.warm_workers import WarmWorkers


@dataclass(frozen=True)
class LaunchOptions:
    """Options of the command line that concern rented machines, and what the runs of a sweep share."""

    yes: bool = False
    """Do not ask."""
    detach: bool = False
    """Leave as soon as it trains."""
    pool: Pool | None = None
    """The pods of the sweep that the run is a point of."""
    warm: WarmWorkers | None = None
    """Warm workers that start the runs of a sweep on this machine, one after the other."""


DEFAULT_OPTIONS = LaunchOptions()
"""None of them."""
