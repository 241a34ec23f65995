"""TensorBoard in a pod: a real ssh server, the real TensorBoard, started once and asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from runner.cloud import pod_shell
from runner.emulator.container import free_port
from tests.support.emulated import needs_sshd
from tests.support.sshd import server

pytestmark = needs_sshd


@pytest.fixture
def port() -> Iterator[str]:
    """Whatever this test starts there is ended."""
    found = str(free_port())
    yield found
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "tensorboard.main" in words and found in words:
            os.kill(process.pid, signal.SIGTERM)


def test_it_shows_the_runs_on_the_pods_disk(tmp_path: Path, port: str) -> None:
    from torch.utils.tensorboard import SummaryWriter

    runs = tmp_path / "workspace" / "runs"
    with SummaryWriter(str(runs / "run-1" / "tensorboard")) as writer:
        writer.add_scalar("loss", 1.5, 1)
    (runs / "run-1" / "install.json").write_text(json.dumps({"python": sys.executable}))
    (tmp_path / "rp").write_text(f"export RUNNER_WORKSPACE={tmp_path / 'workspace'}\n")
    with server(tmp_path / "ssh") as there:
        connection = there.connection()
        for _ in range(2):  # the second finds the first
            assert pod_shell.serve_tensorboard(connection, port, f"RUNNER_RP_ENVIRONMENT={tmp_path / 'rp'}; ") is None
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=20) as answer:
            assert json.load(answer) == ["run-1/tensorboard"]
        connection.close()
    ours = [p for p in psutil.process_iter(["cmdline"]) if port in (p.info["cmdline"] or [])]
    assert len({p.pid for p in ours if "tensorboard.main" in p.info["cmdline"]}) == 1


def test_a_pod_without_it_says_what_to_do(tmp_path: Path, port: str) -> None:
    (tmp_path / "bin").mkdir()
    python = f"{sys.base_exec_prefix}/bin/python3"  # without site-packages, as images have it
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {python} -S "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    with server(tmp_path / "ssh") as there:
        connection = there.connection()
        why = pod_shell.serve_tensorboard(connection, port, f"export PATH={tmp_path / 'bin'}:$PATH; ")
        connection.close()
    assert why is not None and "a run installs it" in why
