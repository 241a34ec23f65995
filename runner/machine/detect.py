"""Detects this machine's hardware without torch, and whether it can stand for a named one.

A machine without a GPU is read in a few milliseconds, from `/proc`, `/sys` and the driver's device
files alone; its GPUs come from `gpus.py`.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.config import conf_files
from runner.machine import gpus
from runner.machine.gpus import Gpu, Unusable
from runner.machine.processes import control_group
from runner.rundir.directory import text_of
from runner.spec import HardwareSpec

# bfloat16 and FlashAttention 2 both came with Ampere.
AMPERE = 8.0

# Drivers differ by up to 2% in what they show of a card (Tesla T4: 15109 or 15360 MiB). An RTX
# A6000 whose ECC was switched on has 46068 of 49140 MiB, 94%: what was planned for it may not fit.
ENOUGH = 0.95

# GeForce cards do no peer-to-peer over PCIe, and NCCL can hang trying (NVIDIA/nccl-tests#117);
# conf/hw/rtx4090.yaml says more. Set as soon as there are two of them.
NO_PEER_TO_PEER = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
_CONSUMER = re.compile(r"GeForce RTX [345]0\d\d")

# Facts that a driver does not tell (the first: an old one) and a catalogue entry for the same GPU does.
_FROM_CATALOGUE = ("compute_capability", "tflops_bf16", "bandwidth_gb_s", "interconnect", "usd_per_hour", "price_date")


@dataclass(frozen=True)
class Machine:
    """Hardware that this process may use."""

    gpus: tuple[Gpu, ...]
    """GPUs that `CUDA_VISIBLE_DEVICES` leaves visible, in its order."""
    visible_devices: str | None
    """`CUDA_VISIBLE_DEVICES`; None where it is not set."""
    num_hidden_gpus: int
    """GPUs that it hides."""
    num_cpus: int
    """Cores, after affinity and the container's quota."""
    memory_gib: float | None
    """Main memory, after the container's limit; None where the system does not say."""
    cpu_bf16: bool
    """The CPU multiplies in bfloat16 (AVX512-BF16, AMX or Arm's BF16)."""
    unusable: tuple[Unusable, ...] = ()
    """GPUs that are there and are not used, with why."""
    by_number: bool = True
    """Numbers in `CUDA_VISIBLE_DEVICES` are certain: no GPU is broken or divided."""

    @property
    def together(self) -> int:
        """GPUs that can train together: all whole ones, or one slice."""
        whole = sum(not gpu.is_slice for gpu in self.gpus)
        return whole or min(1, len(self.gpus))

    @property
    def hides_all(self) -> bool:
        """`CUDA_VISIBLE_DEVICES` names none, so that the CPU is what is wanted: empty, or `-1`."""
        setting = self.visible_devices
        return setting is not None and re.match(r"\s*(\d|GPU-|MIG-)", setting) is None

    @property
    def remarks(self) -> list[str]:
        """Hardware that is present and not used, and why."""
        said = [str(one) for one in self.unusable]
        if self.num_hidden_gpus and not self.gpus:
            hidden = "the only GPU" if self.num_hidden_gpus == 1 else f"all {self.num_hidden_gpus} GPUs"
            said.append(f"CUDA_VISIBLE_DEVICES={self.visible_devices} hides {hidden}: the run is on the CPU")
        return said

    def __str__(self) -> str:
        """Such as `2 × GeForce RTX 4090 (24.0 GiB)` or `no NVIDIA GPU (2 CPU cores, 23.5 GiB)`."""
        if self.gpus:
            smallest = min(gpu.memory_gib for gpu in self.gpus)
            text = f"{len(self.gpus)} × {_name(self.gpus)} ({smallest:.1f} GiB)"
        else:
            memory = f", {self.memory_gib:.1f} GiB" if self.memory_gib else ""
            cores = "1 CPU core" if self.num_cpus == 1 else f"{self.num_cpus} CPU cores"
            text = f"no NVIDIA GPU ({cores}{memory})"
        if self.num_hidden_gpus:
            text += f"; CUDA_VISIBLE_DEVICES={self.visible_devices} hides {self.num_hidden_gpus}"
        return "; ".join([text, *(one.what for one in self.unusable)])


def detect(root: Path = Path("/")) -> Machine:
    """Look at this machine. `root` is where `proc`, `sys` and `dev` are; a test puts its own there."""
    found = gpus.find_gpus(root)
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    memory = _memory_gib(root)
    visible = gpus.visible(found, setting)
    return Machine(
        gpus=tuple(replace(gpu, memory_gib=memory) if gpu.unified and memory else gpu for gpu in visible),
        visible_devices=setting,
        num_hidden_gpus=len(found.gpus) - len(visible),
        num_cpus=_cores(root),
        memory_gib=memory,
        cpu_bf16=_cpu_bf16(root),
        unusable=found.unusable,
        by_number=found.by_number,
    )


def resolve(hw: HardwareSpec, machine: Machine | None = None) -> HardwareSpec:
    """`hw` with `detect` replaced by what this machine has, and a CPU's missing facts filled in.

    What the user wrote (any field that was set and is not null) is kept, `num_gpus=0` included:
    it means the CPU. Named GPUs (`cuda`) come back unchanged.
    """
    if hw.accelerator == "cuda":
        return hw
    machine = machine or detect()
    given = {key: value for key, value in hw.model_dump(exclude_unset=True).items() if value is not None}
    del given["accelerator"]
    num_gpus = 0 if hw.accelerator == "cpu" else given.get("num_gpus", machine.together)
    found = _gpu_facts(machine, num_gpus) if num_gpus else _cpu_facts(machine)
    env = {**found.get("env", {}), **given.get("env", {})}
    return HardwareSpec.model_validate({**found, **given, "env": env, "num_gpus": num_gpus})


def why_not_here(hw: HardwareSpec, machine: Machine | None = None) -> str | None:
    """Return why `hw` is not available on this machine, as a sentence; None if it is.

    It can where the first `num_gpus` visible GPUs have at least 95% of the memory each, and bfloat16
    if the profile counts on it. The name does not matter: an H200 will do for an H100.
    """
    if hw.accelerator != "cuda":
        return None
    if (own := hw.env.get(gpus.VARIABLE)) is not None and len(_named(own)) < _each(hw):
        return f"{hw.name} needs {_each(hw)} GPUs, and hw.env.{gpus.VARIABLE}={own} names {len(_named(own))}"
    machine = machine or detect()
    used = machine.gpus[: hw.num_gpus]  # those that a launcher takes
    if len(used) > 1 and any(gpu.is_slice for gpu in used):
        return f"{hw.name} needs {hw.num_gpus} GPUs, and NCCL joins no MIG slices; this machine has {machine}"
    if len(used) == hw.num_gpus and all(_serves(gpu, hw) for gpu in used):
        return None
    memory = f" ({hw.memory_gib:.1f} GiB)" if hw.memory_gib else ""
    sentence = f"{hw.name} needs {hw.num_gpus} × {hw.gpu or 'GPU'}{memory}; this machine has {machine}"
    lacks_bf16 = hw.bf16 and any(_before_ampere(gpu) for gpu in used)
    return sentence + ", without bfloat16" if lacks_bf16 else sentence


def serving(hw: HardwareSpec, machine: Machine) -> str | None:
    """`CUDA_VISIBLE_DEVICES` for GPUs of this machine that would do where the first ones do not; None without them."""
    able = [gpu.uuid for gpu in machine.gpus if _serves(gpu, hw) and not gpu.is_slice]
    return ",".join(able[: hw.num_gpus]) if len(able) >= hw.num_gpus else None


def only(hw: HardwareSpec, machine: Machine | None = None) -> dict[str, str]:
    """Variables under which the processes of a run see exactly its GPUs: the first `num_gpus` that are visible.

    One process that sees several would have transformers use DataParallel. Empty where nothing has to be hidden.
    A run on the CPU sees none.
    """
    if hw.accelerator == "cpu":
        return {gpus.VARIABLE: ""}
    if hw.accelerator != "cuda":
        return {}
    number = _each(hw)
    if own := hw.env.get(gpus.VARIABLE):
        return {gpus.VARIABLE: ",".join(_named(own)[:number])}
    machine = machine or detect()
    used = machine.gpus[:number]
    if len(used) == len(machine.gpus) and machine.by_number:
        return {}
    return gpus.only(used, machine.visible_devices, machine.by_number)


def _each(hw: HardwareSpec) -> int:
    """GPUs of one machine."""
    return min(hw.num_gpus, hw.processes_per_node)


def _named(setting: str) -> list[str]:
    return [entry.strip() for entry in setting.split(",") if entry.strip()]


def _serves(gpu: Gpu, hw: HardwareSpec) -> bool:
    return gpu.memory_gib >= ENOUGH * (hw.memory_gib or 0) and not (hw.bf16 and _before_ampere(gpu))


def _before_ampere(gpu: Gpu) -> bool:
    return gpu.compute_capability is not None and gpu.compute_capability < AMPERE


def _name(gpus: tuple[Gpu, ...]) -> str:
    return " + ".join(dict.fromkeys(gpu.name for gpu in gpus))


def _cpu_facts(machine: Machine) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "num_cpus": machine.num_cpus,
        "memory_gib": machine.memory_gib,
        "host_memory_gib": machine.memory_gib,
        "bf16": machine.cpu_bf16,
        "interconnect": "none",
    }


def _gpu_facts(machine: Machine, num_gpus: int) -> dict[str, Any]:
    """Facts of the GPUs that will be used; where they differ, of the weakest."""
    host = {"accelerator": "cuda", "num_cpus": machine.num_cpus, "host_memory_gib": machine.memory_gib}
    used = machine.gpus[:num_gpus]
    if not used:  # asked for and not there: why_not_here says so
        return host
    known = [gpu.compute_capability for gpu in used if gpu.compute_capability is not None]
    catalogued = _catalogued(_name(used))
    capability = min(known, default=catalogued.get("compute_capability"))
    ampere = None if capability is None else capability >= AMPERE
    consumer = any(_CONSUMER.search(gpu.name) for gpu in used)
    return {
        **catalogued,
        **host,
        "gpu": _name(used),
        "memory_gib": min(gpu.memory_gib for gpu in used) or None,
        "compute_capability": capability,
        "bf16": ampere,
        "flash_attention": bool(ampere),
        "env": NO_PEER_TO_PEER if consumer and num_gpus > 1 else {},
    }


def _catalogued(gpu: str) -> dict[str, Any]:
    """Facts of a GPU in `conf/hw` by its exact name; empty for an unknown one."""
    for name in conf_files.options("hw"):
        values = conf_files.load_choice("hw", name)
        if values.get("gpu") == gpu:
            return {key: values[key] for key in _FROM_CATALOGUE if key in values}
    return {}


def _cores(root: Path) -> int:
    """Cores this process may run on, and no more than its control group's quota pays for."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [_ratio(*text.split()[:2]) for text in control_group(root, "", "cpu.max") if len(text.split()) > 1]
    paid = control_group(root, "cpu", "cpu.cfs_quota_us")
    periods = control_group(root, "cpu", "cpu.cfs_period_us")
    quotas += [_ratio(quota, period) for quota, period in zip(paid, periods, strict=False)]
    return max(1, min([cores, *(math.ceil(q) for q in quotas if q is not None)]))


def _ratio(quota: str, period: str) -> float | None:
    """CPUs' worth of time; None for no limit (`max`, or -1 in version 1)."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _memory_gib(root: Path) -> float | None:
    """Main memory in GiB, and no more than the control group may use; None where nobody says."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", text_of(root / "proc/meminfo"), re.M)
    sizes = [int(total[1]) * 1024] if total else []
    if not sizes and hasattr(os, "sysconf"):
        try:  # macOS
            sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError):
            return None
    limits = [*control_group(root, "", "memory.max"), *control_group(root, "memory", "memory.limit_in_bytes")]
    sizes += [int(text) for text in limits if text.isdecimal()]  # not "max"; version 1 writes 2⁶³ for it
    return round(min(sizes) / 2**30, 2) if sizes else None


def _cpu_bf16(root: Path) -> bool:
    """The CPU has bfloat16 products: three times faster than fp32 where it does (measured, AVX512-BF16)."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text_of(root / "proc/cpuinfo"), re.M)
    if found:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(found[1].split()))  # the last: Arm
    if platform.system() != "Darwin":
        return False
    try:  # Apple's M2 and later
        ask = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=1).stdout.strip() == "1"
    except (OSError, subprocess.SubprocessError):
        return False
