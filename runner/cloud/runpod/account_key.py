"""RunPod credentials: API key and base URL, from the variables that RunPod's SDK reads."""

from __future__ import annotations

import hashlib
import os

from runner.cloud.provider_errors import NoKeyError
from runner.errors import Problem

KEY = "RUNPOD_API_KEY"
BASE_URL = "RUNPOD_API_BASE_URL"
DEFAULT_BASE_URL = "https://api.runpod.io"
CONSOLE = "https://console.runpod.io"
KEYS_PAGE = f"{CONSOLE}/user/settings"
BILLING_PAGE = f"{CONSOLE}/user/billing"


def base_url() -> str:
    """Address of the API, without the `/v2` that every path begins with: some write it there, too."""
    base = (os.environ.get(BASE_URL) or DEFAULT_BASE_URL).strip().rstrip("/")
    return base.removesuffix("/v2")


def api_key() -> str:
    """The account's key; NoKeyError without one, or where it can be none."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        made = f"export RUNPOD_API_KEY=…, made at {KEYS_PAGE}"
        raise NoKeyError(Problem("RUNPOD_API_KEY is not set", "environment", made))
    if not (key.isascii() and key.isprintable()) or " " in key:
        what = "RUNPOD_API_KEY is no key: it has a blank, a line break or a letter that no key has"
        raise NoKeyError(Problem(what, "environment", f"copy it again, on one line, from {KEYS_PAGE}"))
    return key


def fingerprint(key: str) -> str:
    """Says in the ledger which account a pod belongs to, without giving the key away: 48 bits of a one-way hash."""
    return hashlib.blake2b(key.encode(), digest_size=6, person=b"runner-account").hexdigest()


def wrong_key_problem(said: str) -> Problem:
    """401."""
    remedy = f"make a key with write access at {KEYS_PAGE} and export RUNPOD_API_KEY=…"
    return Problem(f"RunPod does not accept RUNPOD_API_KEY: {said}", "environment", remedy)


ACTS = {"POST /v2/pods": "rent a pod", "DELETE /v2/pods": "end a pod", "GET /v2/pods": "look at pods",
        "GET /v2/catalog": "look at GPUs and prices", "GET /v2/network-volumes": "look at network volumes",
        "POST /v2/network-volumes": "make a network volume"}  # fmt: skip
"""What requests are for, by method and the beginning of the path."""


def not_allowed_problem(method: str, path: str, said: str) -> Problem:
    """403: a key of the kinds Restricted and Read Only, which may do less than the account."""
    asked = f"{method} {path}"
    act = "start or stop a pod" if path.endswith("/action") else None
    act = act or next((words for begins, words in ACTS.items() if asked.startswith(begins)), f"do {asked}")
    what = f"RUNPOD_API_KEY is accepted, and may not {act}: {said}"
    remedy = f"give that key Read/Write at {KEYS_PAGE} (Read Only and Restricted have less), or export another one"
    return Problem(what, "environment", remedy)


def no_graphql_problem(said: str) -> Problem:
    """A bid, which goes through GraphQL, by a key that may not use it."""
    what = f"RUNPOD_API_KEY is accepted, and may not bid for spot machines, which takes GraphQL: {said}"
    return Problem(what, "where.spot", f"give that key Read/Write for GraphQL at {KEYS_PAGE}, or leave where.spot out")


def no_balance_problem(said: str) -> Problem:
    """402."""
    return Problem(f"RunPod: {said}", None, f"add funds at {BILLING_PAGE}; nothing was rented")
