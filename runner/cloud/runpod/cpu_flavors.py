"""CPU flavours: RunPod's CPU pods come with a power of two of vCPUs."""

from __future__ import annotations

FEWEST, MOST = 2, 32


def vcpus(wanted: int | None, fewest: int = FEWEST, most: int = MOST) -> int:
    """The smallest number of vCPUs that is rented and holds as many, or the most there are."""
    found = fewest
    while found < min(wanted or fewest, most):
        found *= 2
    return found
