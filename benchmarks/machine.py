"""The machine and the versions a number was measured with; nothing that names this copy or its user."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from runner import __version__
from runner.machine import detect

# What decides how fast a CPU multiplies in bfloat16; Arm says `bf16` and `i8mm` instead.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "hydra-core", "pydantic")


def machine() -> dict[str, Any]:
    """CPU, cores, memory (GiB), the flags that matter, and how busy the machine was before the start."""
    found = detect.detect()
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "cpu": _cpu_model(info),
        "cores": found.num_cpus,
        "memory_gib": round(found.memory_gib, 1) if found.memory_gib else None,
        "flags": [flag for flag in FLAGS if flag in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, str]:
    """Python, this project and the packages that decide its speed; those not installed are left out."""
    found = {"Python": platform.python_version(), "runner": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_model(info: dict[str, str]) -> str:
    if name := info.get("model name"):
        # A virtual machine may hide the model ("AMD EPYC"): family and model tell the generation.
        return f"{name} (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else name
    try:
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return platform.processor() or platform.machine()
    return done.stdout.strip()
