"""Cost of a pod while it runs, from the clock and its price."""

from __future__ import annotations

from dataclasses import dataclass, field

from runner.plan.cost import HOURS_PER_MONTH, STORAGE_USD_PER_GB_MONTH

STOPPED_USD_PER_GB_MONTH = 0.20  # volume disk of a stopped pod (docs.runpod.io/pods/pricing, as of 2026-11-20)
WARN_AT = (0.5, 0.8, 1.0)
"""Shares of the cap at which a user is told."""


def storage_usd_per_hour(disk_gb: float) -> float:
    """Container disk and volume disk of a running pod."""
    return disk_gb * STORAGE_USD_PER_GB_MONTH / HOURS_PER_MONTH


def stopped_usd_per_day(volume_gb: float) -> float:
    """What a stopped pod's volume disk costs; its container disk is gone."""
    return volume_gb * STOPPED_USD_PER_GB_MONTH / HOURS_PER_MONTH * 24


@dataclass
class Meter:
    """The live bill of one pod: elapsed time × (its price + its disks), beside what is allowed."""

    usd_per_hour: float
    """Of all its GPUs, as the provider says it."""
    started: float
    """Epoch seconds."""
    disk_gb: float = 0.0
    cap_usd: float | None = None
    before_usd: float = 0.0
    """What earlier pods of the same run have cost."""
    _told: set[float] = field(default_factory=set)

    @property
    def rate(self) -> float:
        """US$ per hour, disks included."""
        return self.usd_per_hour + storage_usd_per_hour(self.disk_gb)

    def usd(self, now: float) -> float:
        """So far, with earlier pods."""
        return self.before_usd + max(0.0, now - self.started) / 3600 * self.rate

    def ends(self) -> float | None:
        """Epoch at which the cap is reached; None without one."""
        if self.cap_usd is None or self.rate <= 0:
            return None
        return self.started + max(0.0, self.cap_usd - self.before_usd) / self.rate * 3600

    def warning(self, now: float) -> str | None:
        """One sentence each time that a further share of the cap is reached."""
        if self.cap_usd is None:
            return None
        share = self.usd(now) / self.cap_usd
        reached = [mark for mark in WARN_AT if share >= mark and mark not in self._told]
        if not reached:
            return None
        self._told.update(reached)
        used = f"${self.usd(now):.2f} of ${self.cap_usd:.2f} (where.max_usd) are used"
        if reached[-1] >= 1:
            return f"{used}: the pod is ended"
        left = ((self.ends() or now) - now) / 60
        return f"{used}, {reached[-1]:.0%}; the rest lasts {left:.0f} minutes"
