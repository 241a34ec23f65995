"""SSH key of a run, derived from the API key and the run's id, so that any machine with both can connect.

Whoever has the API key may end, stop and rent pods in its name; to reach them as well gives away nothing more. From
the SSH key nobody gets back to the API key: HMAC-SHA-256 (RFC 2104) goes one way. A copy is kept, for the day on which
the API key is exchanged while a pod runs.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.cloud.providers import DEFAULT, connect
from runner.errors import CannotRunError, Problem
from runner.paths import state_dir
from runner.report.invocation import install

PURPOSE = b"llm-finetuning-runner ssh key v1\0"


@dataclass(frozen=True)
class KeyPair:
    """One run's key."""

    private: Path
    """File with the private half, mode 0600."""
    public: str
    """The line for `authorized_keys`."""


def key_pair(run_id: str, provider: str = DEFAULT) -> KeyPair:
    """The run's key: from its file if that is a whole key, else derived from the provider's key, and the file with it.

    A file may be empty or garbled: a disk that broke down, or a machine that lost power, has its name and not its
    content. RequestError without an API key, CannotRunError without the package that knows the curve.
    """
    file = _file(run_id)
    with suppress(Exception):  # no file, no key, or one of an algorithm that does not exist: a garbled name
        return KeyPair(file, _line(_curve().load_ssh_private_key(file.read_bytes(), None), run_id))
    text, line = _made(run_id, provider)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    return KeyPair(file, line)


def delete_key(run_id: str) -> None:
    """The pod is gone: its key opens nothing any more."""
    with suppress(OSError):
        _file(run_id).unlink()


def _file(run_id: str) -> Path:
    return state_dir() / "keys" / run_id


def _made(run_id: str, provider: str) -> tuple[bytes, str]:
    """Private key in OpenSSH's form, public line. Ed25519 takes any 32 bytes as its secret (RFC 8032, 5.1.5)."""
    secret, form = connect(provider).secret, _curve()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    seed = hmac.new(secret.encode(), PURPOSE + run_id.encode(), hashlib.sha256).digest()
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption()), _line(key, run_id)


def _line(key: Any, run_id: str) -> str:
    """For `authorized_keys`."""
    form = _curve()
    return f"{key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH).decode()} runner-{run_id}"


def _curve() -> Any:
    """The package's part that reads and writes keys."""
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        what = "renting a pod needs the package cryptography, which is not installed"
        raise CannotRunError(Problem(what, None, install("cloud"))) from None
    return serialization
