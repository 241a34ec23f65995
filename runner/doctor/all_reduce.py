"""Run `runner.train.all_reduce_benchmark` in processes of its own, with a limit of time, and judge its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runner.doctor.finding import DoctorTarget, Finding
from runner.machine import detect
from runner.machine.detect import Machine
from runner.machine.torch_build import installed_torch
from runner.plan.hardware_speed import machine_of
from runner.report.invocation import install
from runner.spec import HardwareSpec

LIMIT_S = 180.0
"""torch is loaded by every process (seconds; more from a cold disk), then ranks wait 60 s for each other at most."""
ENDING_S = 45.0
"""torchrun ends its workers on SIGTERM, and kills them after 30 s."""
SLOW = 0.5
"""Share of the bandwidth that plans count on: below it, something is wrong with the link or its settings."""


def bandwidth_finding(machine: Machine, target: DoctorTarget | None, limit_s: float = LIMIT_S) -> Finding:
    """All-reduce between the GPUs (of the run, or all visible), or between two CPU processes where there are none."""
    torch = installed_torch()
    if torch is None:
        return Finding("bandwidth", "problem", "not measured: torch is not installed", install("train"))
    hw = detect.resolve(HardwareSpec(name="local", accelerator="detect"), machine)
    if target is not None and target.here and detect.why_not_here(target.spec.hw, machine) is None:
        hw = target.spec.hw
    on_gpus = hw.accelerator == "cuda" and torch.cuda is not None
    backend, processes = ("nccl", hw.num_gpus) if on_gpus else ("gloo", 2)
    between = f"{processes} GPU{'s' * (processes > 1)}" if on_gpus else f"{processes} CPU processes"
    with tempfile.TemporaryDirectory(prefix="runner-doctor-") as folder:
        result = Path(folder) / "bandwidth.json"
        said = _torchrun(
            processes, [str(result), backend], {**os.environ, **hw.env, **detect.only(hw, machine)}, limit_s
        )
        if said is not None or not result.is_file():
            return _failed(backend, between, said or "it ended without a result")
        content = json.loads(result.read_text("utf-8"))
    return _judged(content, between, hw)


def unmeasured(num_gpus: int) -> Finding:
    """Said of several GPUs where nobody asked for the measurement."""
    what = f"all-reduce over {num_gpus} GPUs: not measured"
    return Finding("bandwidth", "note", what, "python -m runner doctor --bandwidth measures it (10 s and more)")


def _torchrun(processes: int, arguments: list[str], env: dict[str, str], limit_s: float) -> str | None:
    """Start the ranks and wait; None where all is well, else what went wrong. No process is left behind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "runner.train.all_reduce_benchmark", *arguments]
    quiet = {"OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    launcher = subprocess.Popen(
        command, env={**env, **quiet}, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = launcher.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {limit_s:g} s"
    finally:
        if launcher.poll() is None:  # out of time, or Ctrl-C
            _end(launcher)
    return None if launcher.returncode == 0 else _reason(output)


def _end(launcher: subprocess.Popen[str]) -> None:
    launcher.terminate()  # workers are in sessions of their own: only torchrun can end them
    try:
        launcher.communicate(timeout=ENDING_S)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.communicate()


def _reason(output: str) -> str:
    """The first error that a rank's stack trace ends with."""
    lines = [line.split("]: ", 1)[-1].strip() for line in output.splitlines()]
    errors = [line for line in lines if line.split(":")[0].split(".")[-1].endswith("Error") and ": " in line]
    return (errors or [line for line in lines if line] or ["it failed without a word"])[0][:300]


def _failed(backend: str, between: str, why: str) -> Finding:
    remedy = "NCCL_DEBUG=WARN says more; if it hangs, NCCL_P2P_DISABLE=1; if it lacks memory, see /dev/shm"
    if backend == "gloo":
        remedy = "GLOO_SOCKET_IFNAME=lo where the host's own name leads nowhere"
    return Finding("bandwidth", "problem", f"{backend} all-reduce over {between} failed: {why}", remedy)


def _judged(content: dict[str, Any], between: str, hw: HardwareSpec) -> Finding:
    """The largest size, beside what a plan counts on for this link (NVLink and PCIe alone)."""
    largest = content["sizes"][-1]
    what = f"{content['backend']} all-reduce over {between}: {largest['bus_gb_s']:.1f} GB/s at {largest['mib']} MiB"
    if content["world_size"] == 1:
        return Finding(
            "bandwidth", "ok", f"{content['backend']} starts; one GPU has nobody to exchange with", None, content
        )
    planned = machine_of(hw, "bf16") if content["backend"] == "nccl" else None
    if planned is None:
        return Finding("bandwidth", "ok", what, None, content)
    expected = planned.link / 1e9
    facts = {**content, "planned_gb_s": expected}
    if largest["bus_gb_s"] < SLOW * expected:
        remedy = "nvidia-smi topo -m shows how the cards are joined; plans of several GPUs will be too hopeful here"
        return Finding("bandwidth", "warning", f"{what}; plans count on {expected:.0f}", remedy, facts)
    return Finding("bandwidth", "ok", f"{what} (plans count on {expected:.0f})", None, facts)
