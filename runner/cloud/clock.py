"""Clocks of pods: monotonic seconds, the provider's time from its answers, and the pace of polling.

A deadline is written in the clock of the machine that rents. Another process, a day later, may have another clock, or
the same machine a wrong one. Whether a pod is past its deadline is therefore judged by the provider's clock: it says
when the pod was made, and what time it is now.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from runner.cloud.provider import Pod

PACE = "RUNNER_CLOUD_PACE"
LOCAL_PACE = 0.05


def _elapsed() -> float:
    """Seconds that go on while the machine sleeps, where the system counts them (Linux)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


_BEGAN = time.time() - _elapsed()


def now() -> float:
    """Seconds since the epoch by this machine's clock as it was when the process began: set later, it moves nothing."""
    return _BEGAN + _elapsed()


def parse_date(header: str | None) -> float | None:
    """Seconds since the epoch of a `Date` header (RFC 9110, 6.6.1); None for none."""
    try:
        found = parsedate_to_datetime(str(header))
    except (ValueError, TypeError, OverflowError):
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


class ProviderClock:
    """The present time on the clock by which a pod was rented; the provider is asked once."""

    def __init__(self, ask: Callable[[], float | None]) -> None:
        self._ask = ask
        self._there: list[float | None] = []

    def now(self, pod: Pod, rented: float | None) -> float | None:
        """`rented`: when the pod was asked for, by that clock; without it the clock is taken to be right. None where
        the provider does not say what time it is."""
        if not self._there:
            self._there.append(self._ask())
        there = self._there[0]
        if there is None or rented is None or pod.created is None:
            return there
        return there - (pod.created - rented)


def pace(base: str) -> float:
    """Factor on every wait between two polls of the server at that address; `RUNNER_CLOUD_PACE`, else 1, and less for
    an emulator on this machine.

    Waits are for a cloud's sake, which takes seconds and limits requests; a server on this machine does neither.
    """
    named = os.environ.get(PACE)
    if named:
        return float(named)
    try:
        host = urlsplit(base).hostname
    except ValueError:  # no address at all: the first request will say so
        return 1.0
    return LOCAL_PACE if host in ("127.0.0.1", "localhost", "::1") else 1.0
