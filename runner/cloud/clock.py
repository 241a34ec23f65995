"""Clocks of pods: monotonic seconds, and the provider's time from its answers.

A deadline is written in the clock of the machine that rents. Another process, a day later, may have another clock, or
the same machine a wrong one. Whether a pod is past its deadline is therefore judged by RunPod's clock: it says when the
pod was made, and in the header `Date` what time it is now.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timezone
from email.utils import parsedate_to_datetime

from runner.cloud.runpod.types import Pod


def _elapsed() -> float:
    """Seconds that go on while the machine sleeps, where the system counts them (Linux)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


_BEGAN = time.time() - _elapsed()


def now() -> float:
    """Seconds since the epoch by this machine's clock as it was when the process began: set later, it moves nothing."""
    return _BEGAN + _elapsed()


def parsed(header: str | None) -> float | None:
    """Seconds since the epoch of a `Date` header (RFC 9110, 6.6.1); None for none."""
    try:
        found = parsedate_to_datetime(str(header))
    except (ValueError, TypeError, OverflowError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


class ProviderClock:
    """What time it is now on the clock by which a pod was rented; RunPod is asked once."""

    def __init__(self, ask: Callable[[], float | None]) -> None:
        self._ask = ask
        self._there: list[float | None] = []

    def now(self, pod: Pod, rented: float | None) -> float | None:
        """`rented`: when the pod was asked for, by that clock; without it the clock is taken to be right. None where
        RunPod does not say what time it is."""
        if not self._there:
            self._there.append(self._ask())
        there = self._there[0]
        if there is None or rented is None or pod.created is None:
            return there
        return there - (pod.created - rented)
