"""RunPod credentials: API key and base URL, from the variables that RunPod's SDK reads."""

from __future__ import annotations

import hashlib
import os
from urllib.parse import urlsplit

from runner.cloud.runpod.errors import NoKeyError, no_key, odd_key

KEY = "RUNPOD_API_KEY"
BASE_URL = "RUNPOD_API_BASE_URL"
DEFAULT_BASE_URL = "https://api.runpod.io"
PACE = "RUNNER_CLOUD_PACE"
LOCAL_PACE = 0.05


def base_url() -> str:
    """Address of the API, without the `/v2` that every path begins with: some write it there, too."""
    base = (os.environ.get(BASE_URL) or DEFAULT_BASE_URL).strip().rstrip("/")
    return base.removesuffix("/v2")


def api_key() -> str:
    """The account's key; NoKeyError without one, or where it can be none."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise NoKeyError(no_key())
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise NoKeyError(odd_key())
    return key


def fingerprint(key: str) -> str:
    """Says in the ledger which account a pod belongs to, without giving the key away: 48 bits of a one-way hash."""
    return hashlib.blake2b(key.encode(), digest_size=6, person=b"runner-account").hexdigest()


def pace() -> float:
    """What every wait between two looks is multiplied by; `RUNNER_CLOUD_PACE`, else 1, and less for an emulator here.

    Waits are for RunPod's sake, which takes seconds and limits requests; a server on this machine does neither.
    """
    named = os.environ.get(PACE)
    if named:
        return float(named)
    try:
        host = urlsplit(base_url()).hostname
    except ValueError:  # no address at all: the first request will say so
        return 1.0
    return LOCAL_PACE if host in ("127.0.0.1", "localhost", "::1") else 1.0
