"""The NVIDIA driver and the GPUs, asked through NVML: a few milliseconds a card, no CUDA context, no torch.

The speed between GPUs is measured in processes of its own (`runner.train.all_reduce_benchmark`), with a limit of time.

What a driver or a card does not answer (a GeForce has no ECC, an old NVML lacks a function) is passed over.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.doctor.finding import GIB, DoctorTarget, Finding, State
from runner.machine import detect
from runner.machine.detect import AMPERE, Machine
from runner.machine.gpus import DRIVER_FILES, Gpu, on_the_bus
from runner.machine.torch_build import Driver, installed_torch, module_version
from runner.plan.hardware_speed import machine_of
from runner.report.invocation import install
from runner.spec import HardwareSpec

# nvml.h, nvmlGpuP2PCapsIndex_t. Not pynvml's own names: in 13.615 NVML_P2P_CAPS_INDEX_READ is the tuple (0,).
_P2P_READ, _P2P_NVLINK, _P2P_OK = 0, 2, 0
_UNCORRECTED, _SINCE_BOOT = 1, 0  # NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC
_PROHIBITED = 2  # NVML_COMPUTEMODE_PROHIBITED
# nvmlClocksEventReason…: what a machine is to blame for. Not the power cap (0x4), which every busy card meets.
_SLOWED = {0x20: "heat", 0x40: "heat", 0x80: "the power supply", 0x8: "the hardware"}

IN_USE = 1.0
"""GiB that others may hold on a card without a word: a desktop, a monitoring agent."""


@dataclass(frozen=True)
class Card:
    """One GPU with what NVML says of its health; None where it does not say."""

    gpu: Gpu
    index: int
    """In the order of `CUDA_VISIBLE_DEVICES`."""
    used_gib: float | None = None
    ecc_errors: int | None = None
    """Uncorrectable memory errors since the driver was loaded."""
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    slowed_by: str | None = None
    prohibited: bool = False
    mig: bool = False


@dataclass(frozen=True)
class GpuReport:
    """The driver, its cards and how they reach each other."""

    driver: Driver | None
    """None without one."""
    silence: str | None
    """Why NVML does not answer though a driver is loaded."""
    cards: tuple[Card, ...]
    links: dict[str, int]
    """Pairs of visible cards by how they exchange data: `nvlink`, `pcie`, `none`; empty where NVML does not say."""
    unused: int
    """NVIDIA cards on the bus for which no driver is loaded."""


def read_gpus(machine: Machine, root: Path = Path("/")) -> GpuReport:
    """Ask NVML about the visible GPUs of `machine`."""
    if not machine.gpus and not any((root / file).exists() for file in DRIVER_FILES):
        return GpuReport(None, None, (), {}, on_the_bus(root))
    cards = tuple(Card(gpu, index) for index, gpu in enumerate(machine.gpus))
    try:
        import pynvml  # 40 ms
    except ImportError:
        return GpuReport(Driver(module_version(root), None), None, cards, {}, 0)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuReport(Driver(module_version(root), None), None if cards else str(error), cards, {}, 0)
    try:
        handles = _handles(pynvml, machine)
        driver = Driver(_text(_ask(pynvml, "nvmlSystemGetDriverVersion")) or module_version(root), _cuda(pynvml))
        seen = tuple(_card(pynvml, card, handles[card.gpu.uuid]) for card in cards if card.gpu.uuid in handles)
        return GpuReport(driver, None, seen or cards, _links(pynvml, [handles[card.gpu.uuid] for card in seen]), 0)
    finally:
        pynvml.nvmlShutdown()


def gpu_findings(seen: GpuReport, machine: Machine, target: DoctorTarget | None) -> Iterator[Finding]:
    """The driver, the cards and peer-to-peer."""
    yield _driver(seen, machine)
    if not seen.silence and not seen.unused:  # of which the driver's line speaks
        for one in machine.unusable:
            state: State = "note" if not one.broken else "warning" if machine.gpus else "problem"
            yield Finding("gpus", state, one.what, one.remedy)
    if len(machine.gpus) > machine.together and any(gpu.is_slice for gpu in machine.gpus):
        what = f"MIG slices: {sum(gpu.is_slice for gpu in machine.gpus)}; a run takes "
        what += "the whole GPUs" if machine.together > 1 or not machine.gpus[0].is_slice else "the first of them"
        yield Finding("gpus", "note", what, "CUDA_VISIBLE_DEVICES=MIG-… names another one; NCCL joins none")
    if not seen.cards:
        return
    said = [_judged(card, target) for card in seen.cards]
    healthy = [card for card, finding in zip(seen.cards, said, strict=True) if finding.state == "ok"]
    if healthy:
        yield _together(healthy)
    yield from (finding for finding in said if finding.state != "ok")
    if machine.num_hidden_gpus:
        what = f"CUDA_VISIBLE_DEVICES={machine.visible_devices} hides {machine.num_hidden_gpus}"
        yield Finding("gpus", "note", what, "unset CUDA_VISIBLE_DEVICES to use all of them")
    if len(seen.cards) > 1:
        yield _peers(seen, machine)


def _driver(seen: GpuReport, machine: Machine) -> Finding:
    if seen.driver is None and seen.unused:
        what = f"NVIDIA cards on the bus: {seen.unused}; no driver for them here"
        remedy = (
            "install the driver; in a container: docker run --gpus all, with NVIDIA's container toolkit on the host"
        )
        return Finding("driver", "warning", what, remedy)
    if seen.driver is None:
        return Finding("driver", "ok", "no NVIDIA GPU: runs use the CPU")
    if seen.silence:
        remedy = "reboot (after an update of the driver) or start the container again; nvidia-smi shows the same"
        return Finding("driver", "problem", f"the driver is loaded and does not answer: {seen.silence}", remedy)
    version = f"NVIDIA {seen.driver.version or 'driver of unknown version'}"
    if seen.driver.cuda:
        version += ", CUDA {}.{}".format(*seen.driver.cuda)
    facts = {"version": seen.driver.version, "cuda": list(seen.driver.cuda) if seen.driver.cuda else None}
    if not seen.cards:
        remedy = "see what CUDA_VISIBLE_DEVICES and nvidia-smi say"
        return Finding("driver", "warning", f"{version}, and no GPU is visible", remedy, facts)
    return Finding("driver", "ok", version, facts=facts)


def _judged(card: Card, target: DoctorTarget | None) -> Finding:
    """The worst there is to say of one card."""
    gpu = card.gpu

    def say(state: State, what: str, remedy: str | None) -> Finding:
        return Finding(f"gpu {card.index}", state, f"{gpu.name}: {what}", remedy, {"gpus": [asdict(card)]})

    if card.remap_failed:
        what = "broken memory could not be replaced by spare rows"
        return say("problem", what, "take another card: this one is worn")
    if card.prohibited:
        return say("problem", "its compute mode is PROHIBITED", "nvidia-smi -c DEFAULT, as root")
    if (short := _short(card, target)) is not None:
        remedy = "nvidia-smi shows by whom: wait for them, or name another card by CUDA_VISIBLE_DEVICES"
        return say("problem", short, remedy)
    if card.remap_pending:
        what = "a broken row of its memory waits to be replaced"
        return say("warning", what, "reset it when idle: nvidia-smi --gpu-reset")
    if card.ecc_errors:
        what = f"{card.ecc_errors} uncorrectable memory errors since the driver was loaded"
        return say("warning", what, "take another card; nvidia-smi -q -d ECC says more")
    if card.slowed_by:
        return say("warning", f"slowed down by {card.slowed_by}", "nvidia-smi -q -d PERFORMANCE,TEMPERATURE says more")
    if card.mig:
        what = "MIG is on, and slices are not told apart here"
        return say("warning", what, "name the slice's memory: hw.memory_gib=…")
    if card.used_gib is not None and card.used_gib > IN_USE:
        return say(
            "warning", f"other processes use {card.used_gib:.1f} of {gpu.memory_gib:.1f} GiB", "nvidia-smi shows who"
        )
    if gpu.compute_capability is not None and gpu.compute_capability < AMPERE:
        what = f"{gpu.memory_gib:.1f} GiB, compute capability {gpu.compute_capability}: no bfloat16, no FlashAttention"
        return say("note", what, "train.precision=auto takes fp16 here")
    return say("ok", "nothing to say", None)


def _short(card: Card, target: DoctorTarget | None) -> str | None:
    """Memory that a run needs on this card and other processes hold; None where it is enough, or nothing to do with
    others."""
    if target is None or not target.here or target.plan is None or target.spec.hw.accelerator != "cuda":
        return None
    if card.index >= target.spec.hw.num_gpus or card.used_gib is None or card.used_gib <= IN_USE:
        return None
    needed, free = target.plan.peak_gib["expected"], card.gpu.memory_gib - card.used_gib
    if free >= needed:
        return None
    return f"other processes use {card.used_gib:.1f} of {card.gpu.memory_gib:.1f} GiB; the run needs {needed:.1f}"


def _together(cards: list[Card]) -> Finding:
    """Cards with nothing to say about, those of a kind in one phrase."""
    kinds = Counter((c.gpu.name, c.gpu.memory_gib, c.gpu.compute_capability) for c in cards)
    phrases = []
    for (name, memory, capability), number in kinds.items():
        known = f", compute capability {capability}" if capability is not None else ""
        phrases.append(f"{number} × {name}, {memory:.1f} GiB{' each' if number > 1 else ''}{known}")
    return Finding("gpus", "ok", "; ".join(phrases), facts={"gpus": [asdict(card) for card in cards]})


def _peers(seen: GpuReport, machine: Machine) -> Finding:
    """Cards read each other's memory; GeForce RTX cards do not, whatever a driver says."""
    env = detect.resolve(HardwareSpec(name="local", accelerator="detect"), machine).env
    if "NCCL_P2P_DISABLE" in env:
        names = " and ".join(sorted({card.gpu.name for card in seen.cards}))
        what = f"{names}: none; NCCL can hang looking for it and needs NCCL_P2P_DISABLE=1"
        remedy = "set by the runner; for other programs: export NCCL_P2P_DISABLE=1"
        if seen.links.get("nvlink"):  # RTX 3090s with a bridge
            what = f"{names}: over NVLink, which is not used: these cards get NCCL_P2P_DISABLE=1"
            remedy = "to try it: hw.env.NCCL_P2P_DISABLE=0, and python -m runner doctor --bandwidth with it"
        return Finding("p2p", "note", what, remedy, dict(seen.links))
    if not seen.links:
        return Finding("p2p", "note", "the driver does not say whether the cards reach each other", None)
    without = seen.links.get("none", 0)
    pairs = sum(seen.links.values())
    if without:
        what = f"{without} of {pairs} pairs of cards do not reach each other: their data go through main memory"
        remedy = "nvidia-smi topo -p2p r says which; PCIe's ACS or an IOMMU in the way is for the host's administrator"
        return Finding("p2p", "warning", what, remedy, seen.links)
    over = " and ".join({"nvlink": "NVLink", "pcie": "PCIe"}[kind] for kind in seen.links)
    return Finding("p2p", "ok", f"all cards reach each other over {over}", None, seen.links)


def _ask(pynvml: ModuleType, function: str, *arguments: Any) -> Any:
    """NVML's answer; None where this card, driver or NVML has none."""
    try:
        return getattr(pynvml, function)(*arguments)
    except (pynvml.NVMLError, AttributeError):
        return None


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def _cuda(pynvml: ModuleType) -> tuple[int, int] | None:
    number = _ask(pynvml, "nvmlSystemGetCudaDriverVersion_v2")  # 13000
    return (number // 1000, number % 1000 // 10) if number else None


def _handles(pynvml: ModuleType, machine: Machine) -> dict[str, Any]:
    """NVML's handles of the visible cards, by UUID."""
    every = [_ask(pynvml, "nvmlDeviceGetHandleByIndex", i) for i in range(_ask(pynvml, "nvmlDeviceGetCount") or 0)]
    by_uuid = {_text(_ask(pynvml, "nvmlDeviceGetUUID", handle)): handle for handle in every if handle is not None}
    return {gpu.uuid: by_uuid[gpu.uuid] for gpu in machine.gpus if gpu.uuid in by_uuid}


def _card(pynvml: ModuleType, card: Card, handle: Any) -> Card:
    memory = _ask(pynvml, "nvmlDeviceGetMemoryInfo", handle)
    used = getattr(memory, "used", None)
    _, _, pending, failed = _ask(pynvml, "nvmlDeviceGetRemappedRows", handle) or (None,) * 4
    reasons = _ask(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # drivers before 535
        reasons = _ask(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle) or 0
    return Card(
        card.gpu,
        card.index,
        used_gib=None if used is None else round(used / GIB, 2),
        ecc_errors=_ask(pynvml, "nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_BOOT),
        remap_pending=None if pending is None else bool(pending),
        remap_failed=None if failed is None else bool(failed),
        slowed_by=next((why for bit, why in _SLOWED.items() if reasons & bit), None),
        prohibited=_ask(pynvml, "nvmlDeviceGetComputeMode", handle) == _PROHIBITED,
        mig=bool((_ask(pynvml, "nvmlDeviceGetMigMode", handle) or (0,))[0]),
    )


def _links(pynvml: ModuleType, handles: list[object]) -> dict[str, int]:
    """Pairs of cards by what joins them; empty as soon as NVML does not say."""
    kinds: Counter[str] = Counter()
    for one, other in itertools.combinations(handles, 2):
        read = _ask(pynvml, "nvmlDeviceGetP2PStatus", one, other, _P2P_READ)
        if read is None:
            return {}
        nvlink = _ask(pynvml, "nvmlDeviceGetP2PStatus", one, other, _P2P_NVLINK)
        kinds["none" if read != _P2P_OK else "nvlink" if nvlink == _P2P_OK else "pcie"] += 1
    return dict(kinds)


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
        env = {**os.environ, **hw.env, **detect.only(hw, machine)}
        said = _torchrun(processes, [str(result), backend], env, limit_s)
        if said is not None or not result.is_file():
            return _failed(backend, between, said or "it ended without a result")
        content = json.loads(result.read_text("utf-8"))
    return _judged_speed(content, between, hw)


def unmeasured_finding(num_gpus: int) -> Finding:
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
    return (errors or [line for line in lines if line] or ["it failed without a message"])[0][:300]


def _failed(backend: str, between: str, why: str) -> Finding:
    remedy = "NCCL_DEBUG=WARN says more; if it hangs, NCCL_P2P_DISABLE=1; if it lacks memory, see /dev/shm"
    if backend == "gloo":
        remedy = "GLOO_SOCKET_IFNAME=lo where the host's own name leads nowhere"
    return Finding("bandwidth", "problem", f"{backend} all-reduce over {between} failed: {why}", remedy)


def _judged_speed(content: dict[str, Any], between: str, hw: HardwareSpec) -> Finding:
    """The largest size, beside what a plan counts on for this link (NVLink and PCIe alone)."""
    largest = content["sizes"][-1]
    what = f"{content['backend']} all-reduce over {between}: {largest['bus_gb_s']:.1f} GB/s at {largest['mib']} MiB"
    if content["world_size"] == 1:
        what = f"{content['backend']} starts; one GPU has no peer to exchange with"
        return Finding("bandwidth", "ok", what, None, content)
    planned = machine_of(hw, "bf16") if content["backend"] == "nccl" else None
    if planned is None:
        return Finding("bandwidth", "ok", what, None, content)
    expected = planned.link / 1e9
    facts = {**content, "planned_gb_s": expected}
    if largest["bus_gb_s"] < SLOW * expected:
        remedy = "nvidia-smi topo -m shows how the cards are joined; plans of several GPUs will be too hopeful here"
        return Finding("bandwidth", "warning", f"{what}; plans count on {expected:.0f}", remedy, facts)
    return Finding("bandwidth", "ok", f"{what} (plans count on {expected:.0f})", None, facts)
