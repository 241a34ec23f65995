"""Settings of an emulated RunPod."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Settings:
    """Delays are short, since tests wait for them; the real ones are minutes."""

    key: str = field(default_factory=lambda: "rpa_" + secrets.token_hex(20).upper())
    """The account's API key."""
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
