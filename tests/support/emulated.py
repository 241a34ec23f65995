"""An emulated RunPod for tests: `emulator` is a fixture, `Emulator(root)` the same by hand (runner/emulator).

    def test_it(emulator: Emulator) -> None:
        emulator.inject("no_capacity", gpu="NVIDIA L4", times=2)     # faults.KINDS has all
        pod = runpod.create_pod(…)
        assert emulator.billed(pod["id"]) < 0.01 and emulator.pods() == {}

The fixture exports RUNPOD_API_BASE_URL (without /v2: the SDK's paths begin with it) and RUNPOD_API_KEY.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.emulator.container import sshd
from runner.emulator.server import Emulator
from tests.support.openapi import answer_errors, request_errors
from tests.support.processes import until

__all__ = ["IMAGE", "Emulator", "emulator", "key_pair", "needs_sshd", "pod_body", "rest", "ssh", "until"]

IMAGE = "runpod/pytorch:1.0.7-cu1281-torch280-ubuntu2404"
needs_sshd = pytest.mark.skipif(
    sshd() is None, reason="no sshd: an emulated pod is a real ssh server (apt-get install openssh-server)"
)


@pytest.fixture
def emulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """A RunPod of this test's own, found by the SDK through the environment.

    At the end every answer is held against RunPod's own description, and every request that was answered well.
    """
    with Emulator(tmp_path / "emulator") as found:
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("runpod.api_key", found.key)  # the SDK reads the variable when it is imported
        yield found
        assert not (errors := undescribed(found)), "\n".join(errors)


def undescribed(emulator: Emulator) -> list[str]:
    """What of the exchanges is not as RunPod's description says, but for faults."""
    found = []
    for e in list(emulator.exchanges):
        if e.path == "/graphql" or e.faulty or not e.status or e.media_type == "text/event-stream":
            continue
        errors = answer_errors(e.method, e.path, e.status, e.answer, e.media_type)
        errors += request_errors(e.method, e.path, e.query, e.body) if e.status < 400 else []
        found += [f"{e.method} {e.path} → {e.status}: {error}" for error in errors]
    return found


@pytest.fixture(scope="session")
def key_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key without a passphrase; the public one is beside it, with .pub."""
    file = tmp_path_factory.mktemp("key") / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    return file


def rest(method: str, path: str, json: Any = None, params: Any = None, key: str | None = None) -> Any:
    """A request by the official SDK's own hand, for what it does not wrap."""
    import os

    from runpod.api.rest import run_rest_request

    api_key = key or os.environ["RUNPOD_API_KEY"]
    return run_rest_request(method, path, json=json, params=params, api_key=api_key)


def pod_body(key: Path | None = None, **more: Any) -> dict[str, Any]:
    """The smallest pod that can be reached by ssh."""
    env = {"PUBLIC_KEY": key.with_suffix(".pub").read_text("utf-8").strip()} if key else {}
    gpu = {"id": "NVIDIA L4", "count": 1}
    body = {"name": "a-pod", "image": IMAGE, "gpu": gpu, "cloud": "SECURE", "disk": 10, "ports": ["22/tcp"]}
    return {**body, **more, "env": {**env, **more.get("env", {})}}


def ssh(pod_id: str, key: Path, command: str, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a command in a pod as soon as it can be reached, by the address that the API tells."""

    def attempt() -> subprocess.CompletedProcess[str] | None:
        direct = rest("GET", f"/v2/pods/{pod_id}")["ssh"]["direct"]
        if direct is None:
            return None
        options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR"]
        words = ["ssh", "-i", str(key), "-p", str(direct["port"]), *(w for o in options for w in ("-o", o))]
        done = subprocess.run(
            [*words, f"{direct['username']}@{direct['host']}", command], capture_output=True, text=True
        )
        return None if done.returncode == 255 else done

    found: subprocess.CompletedProcess[str] = until(attempt, seconds)
    return found
