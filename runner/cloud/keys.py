"""The SSH key of a run: made from the account's API key and the run's id, so that any machine with both can come in.

Whoever has the API key may end, stop and rent pods in its name; to reach them as well gives away nothing more. From
the SSH key nobody gets back to the API key: HMAC-SHA-256 (RFC 2104) goes one way. A copy is kept, for the day on which
the API key is exchanged while a pod runs.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

from runner.cloud.account import api_key
from runner.errors import CannotRunError, Problem
from runner.invocation import install
from runner.paths import state_dir

PURPOSE = b"llm-finetuning-runner ssh key v1\0"


@dataclass(frozen=True)
class KeyPair:
    """One run's key."""

    private: Path
    """File with the private half, mode 0600."""
    public: str
    """The line for `authorized_keys`."""


def pair(run_id: str) -> KeyPair:
    """The run's key, from its file or made anew.

    RequestError without an API key, CannotRunError without the package that knows the curve.
    """
    folder = state_dir() / "keys"
    private, public = folder / run_id, folder / f"{run_id}.pub"
    if private.is_file() and public.is_file():
        return KeyPair(private, public.read_text("utf-8").strip())
    text, line = _made(run_id)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file, content in ((private, text), (public, line + "\n")):
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(content)
        temporary.replace(file)
    return KeyPair(private, line)


def forget(run_id: str) -> None:
    """The pod is gone: its key opens nothing any more."""
    for name in (run_id, f"{run_id}.pub"):
        (state_dir() / "keys" / name).unlink(missing_ok=True)


def _made(run_id: str) -> tuple[str, str]:
    """Private key in OpenSSH's form, public line. Ed25519 takes any 32 bytes as its secret (RFC 8032, 5.1.5)."""
    account = api_key()
    try:
        from cryptography.hazmat.primitives import serialization as form
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        what = "renting a pod needs the RunPod SDK, which is not installed"
        raise CannotRunError(Problem(what, None, install("cloud"))) from None
    seed = hmac.new(account.encode(), PURPOSE + run_id.encode(), hashlib.sha256).digest()
    key = Ed25519PrivateKey.from_private_bytes(seed)
    text = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    line = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    return text.decode(), f"{line.decode()} runner-{run_id}"
