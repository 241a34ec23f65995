"""Settings of an emulated RunPod, and its two clocks: one for time stamps, one for billing."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

RESTRICTED = {
    "read_only": "answers GET and GraphQL's queries; everything else is 403",
    "no_graphql": "is 403 at /graphql",
    "no_pods": "answers the catalogue; everything else is 403",
}
"""Kinds of API keys that may do less than the account. RunPod's documentation names Read Only and Restricted, and which
status they get by path is not described: 403 by its description of REST v2, and an assumption for GraphQL."""


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
        """Change the speed from now on."""
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
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Settings:
    """Delays are short, since tests wait for them; the real ones are minutes."""

    key: str = field(default_factory=lambda: "rpa_" + secrets.token_hex(20).upper())
    """The account's API key."""
    restricted: dict[str, str] = field(default_factory=dict)
    """Further keys of the account, and which kind each is: a key of `RESTRICTED`."""
    provision_s: float = 0.15
    """PROVISIONING, until a machine is found."""
    pull_s: float = 0.15
    """STARTING: the image is pulled. On RunPod 28 s from a machine's cache, and 9 to 13 minutes without."""
    runtime_s: float = 0.1
    """RUNNING without a runtime or an address."""
    ssh_delay_s: float = 0.1
    """An address, and nobody answers there yet."""
    restart_s: float = 0.1
    """Between the end of a container and its next start."""
    warning_s: float = 5.0
    """Between SIGTERM and the end, when a pod is pre-empted with a warning."""
    page_size: int = 50
    """Entries on one page of a list."""
    balance_usd: float = 100.0
    """What the account has. At 0, pods without a network volume are terminated and the others stopped."""
    visible: Sequence[Path] = ()
    """Folders of this machine that pods see, and may write to, at the same place: below /tmp and /root they have their
    own otherwise."""
    max_pods: int | None = None
    """No capacity for more than these, whatever is asked for."""
