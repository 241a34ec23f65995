"""Clocks of an emulated RunPod: one for time stamps, one for billing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime, timezone


@dataclass
class Clock:
    """Billing can run faster than the world: an hour's bill in a second of test."""

    speed: float = 1.0
    """Billed seconds per second."""
    skew_s: float = 0.0
    """What the answers' time stamps are ahead of this machine's clock."""
    _billed: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def billed(self) -> float:
        """Seconds on the billing clock since it was started."""
        return self._billed + (time.monotonic() - self._since) * self.speed

    def set_speed(self, speed: float) -> None:
        """From now on."""
        self._billed, self._since = self.billed(), time.monotonic()
        self.speed = speed

    def advance(self, seconds: float) -> None:
        """Let billed time pass at once: three hours later, say."""
        self._billed += seconds

    def now(self) -> float:
        """Seconds since the epoch, as answers say it."""
        return time.time() + self.skew_s


def stamp(epoch: float | None) -> str | None:
    """RFC 3339, in UTC."""
    if epoch is None:
        return None
    return datetime.fromtimestamp(epoch, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
