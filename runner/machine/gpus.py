"""This machine's GPUs: what the NVIDIA driver says of each, which of them CUDA shows, and why others are not used.

They come from NVML, else from `nvidia-smi`. A machine without one is read in a few milliseconds, from the driver's
device files alone.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.rundir.directory import text_of

# One of these exists wherever an NVIDIA driver is loaded (the last: Windows' subsystem for Linux).
# Without one, pynvml is not even imported: that alone takes 40 ms.
DRIVER_FILES = ("dev/nvidiactl", "proc/driver/nvidia", "dev/dxg")
_WSL_SMI = "/usr/lib/wsl/lib"  # Windows' driver puts its nvidia-smi there, and not every shell has that on PATH
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor; base class of display controllers, "3D controller" included
_NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED
_SLICEABLE = re.compile(r"\b[AH]\d{2,3}|\b(GH|GB|B)\d{3}|RTX PRO")  # nvidia-smi is asked for slices of these alone
_SLICE = re.compile(r"^\s+MIG (?P<profile>\S*?(?P<gb>\d+)gb\S*)\s+Device\s+\d+:\s+\(UUID: (?P<uuid>MIG-[^)\s]+)\)")
_SLICE_SHARE = 0.95  # of a profile's name: 3g.20gb has 19.6 GiB, 1g.5gb 4.75 (NVML on an A100, 40 GB)
VARIABLE = "CUDA_VISIBLE_DEVICES"
ON_THE_CPU = "hw=cpu runs on the CPU"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, or a MIG slice of one."""

    name: str
    """As the driver reports it, without the vendor: `H100 80GB HBM3`."""
    uuid: str
    """`GPU-…` or `MIG-…`, by which `CUDA_VISIBLE_DEVICES` may name it."""
    memory_gib: float
    """All of its memory, in GiB; with `unified` all of the machine's."""
    compute_capability: float | None = None
    """8.9 for Ada; None where the driver is too old to say."""
    unified: bool = False
    """It has no memory of its own but the machine's: GB10, Jetson."""

    @property
    def is_slice(self) -> bool:
        """A part of a GPU that MIG has divided: CUDA gives a process one of them, and NCCL joins none."""
        return self.uuid.startswith("MIG-")


@dataclass(frozen=True)
class Unusable:
    """A GPU that is there and is not used."""

    what: str
    """Which one, and why not."""
    remedy: str
    broken: bool = False
    """It has a driver, so somebody counts on it."""

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


@dataclass(frozen=True)
class Found:
    """GPUs that were found, `CUDA_VISIBLE_DEVICES` aside."""

    by_index: tuple[tuple[Gpu, ...], ...] = ()
    """In the order of bus addresses: the GPU itself, its MIG slices, or nothing for one that does not answer."""
    unusable: tuple[Unusable, ...] = ()

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """All that can be used."""
        return tuple(gpu for some in self.by_index for gpu in some)

    @property
    def by_number(self) -> bool:
        """Numbers in `CUDA_VISIBLE_DEVICES` mean the same here and to CUDA: none is broken or divided."""
        return all(len(some) == 1 and not some[0].is_slice for some in self.by_index)


def find_gpus(root: Path = Path("/")) -> Found:
    """All NVIDIA GPUs, hidden ones included. `root` is where `proc`, `sys` and `dev` are."""
    loaded = any((root / file).exists() for file in DRIVER_FILES)
    found, silence = Found(), ""
    if loaded or os.name == "nt":
        answer = _from_nvml()
        found, silence = (answer, "") if isinstance(answer, Found) else (Found(), answer)
    if not found.by_index:
        found = _from_nvidia_smi() or found
    if not found.by_index and not found.unusable:
        return Found((), tuple(_others(root, loaded, silence)))
    return found


def _from_nvml() -> Found | str:
    """GPUs as NVML sees them, or why it cannot be asked."""
    try:
        import pynvml  # 40 ms
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return str(error)
    try:
        seen = [_read_nvml(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return str(error)
    finally:
        pynvml.nvmlShutdown()
    return Found(tuple(gpus for gpus, _ in seen), tuple(problem for _, problem in seen if problem))


def _read_nvml(pynvml: ModuleType, index: int) -> tuple[tuple[Gpu, ...], Unusable | None]:
    """One GPU, or its slices; or what is wrong with it: a card that fell off the bus still counts."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = float(f"{major}.{minor}")
        name = _text(pynvml.nvmlDeviceGetName(handle)).removeprefix("NVIDIA ")
        divided = (_ask(pynvml, "nvmlDeviceGetMigMode", handle) or (0,))[0] == 1
        most = _ask(pynvml, "nvmlDeviceGetMaxMigDeviceCount", handle) if divided else None
        if most is None:
            uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
            memory = _memory(pynvml, handle)
            return (Gpu(name, uuid, memory or 0.0, capability, unified=memory is None),), None
    except pynvml.NVMLError as error:
        return (), _dead(index, str(error))
    slices = []
    for number in range(most):
        part = _ask(pynvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
        if part is not None:
            said = _ask(pynvml, "nvmlDeviceGetName", part) or f"{name} MIG"
            size = pynvml.nvmlDeviceGetMemoryInfo(part).total / 2**30
            uuid = _text(pynvml.nvmlDeviceGetUUID(part))
            slices.append(Gpu(_text(said).removeprefix("NVIDIA "), uuid, round(size, 2), capability))
    return tuple(slices), None if slices else _undivided(index, name)


def _memory(pynvml: ModuleType, handle: Any) -> float | None:
    """GiB; None for a GPU without memory of its own."""
    try:
        return round(float(pynvml.nvmlDeviceGetMemoryInfo(handle).total) / 2**30, 2)
    except pynvml.NVMLError as error:
        if getattr(error, "value", None) == _NOT_SUPPORTED or "not supported" in str(error).lower():
            return None
        raise


def _ask(pynvml: ModuleType, function: str, *arguments: Any) -> Any:
    """NVML's answer; None where this card, driver or NVML has none."""
    try:
        return getattr(pynvml, function)(*arguments)
    except (pynvml.NVMLError, AttributeError):
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes before nvidia-ml-py 12


def _dead(index: int, why: str) -> Unusable:
    remedy = "the others are used; nvidia-smi and dmesg (Xid) say more: reset it, reboot, or take another machine"
    return Unusable(f"GPU {index} does not answer: {why}", remedy, broken=True)


def _undivided(index: int, name: str) -> Unusable:
    remedy = (
        f"make one (nvidia-smi mig -i {index} -cgi 0 -C), or switch MIG off (nvidia-smi -i {index} -mig 0), as root"
    )
    return Unusable(f"GPU {index} ({name}): MIG is on, and no slice of it is here", remedy, broken=True)


def _from_nvidia_smi() -> Found | None:
    """GPUs as the driver's own tool prints them; None where it is missing, says nothing or takes over 10 s."""
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL_SMI)
    if tool is None:
        return None
    said = _said(tool, "--query-gpu=name,uuid,memory.total,compute_cap", "--format=csv,noheader,nounits")
    rows = [row for row in csv.reader(said.splitlines(), skipinitialspace=True) if row]
    seen = [_read_smi(index, row) for index, row in enumerate(rows)]
    by_index = tuple(gpus for gpus, _ in seen)
    if not any(by_index):
        return None
    divided = (
        _slices(_said(tool, "-L")) if any(_SLICEABLE.search(gpu.name) for some in by_index for gpu in some) else {}
    )
    parts = tuple(tuple(part for gpu in some for part in _parts(gpu, divided)) for some in by_index)
    return Found(parts, tuple(problem for _, problem in seen if problem))


def _said(tool: str, *words: str) -> str:
    try:
        return subprocess.run([tool, *words], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""


def _read_smi(index: int, row: list[str]) -> tuple[tuple[Gpu, ...], Unusable | None]:
    """A line of its answer. A number may be missing: `[N/A]`, or `[Not Supported]` for memory that is the machine's."""
    cells = [cell.strip() for cell in row]
    if len(cells) != 4 or not cells[1].startswith("GPU-"):
        lost = re.search(r"lost|unknown error|err!|unable to determine", " ".join(cells), re.IGNORECASE)
        return (), _dead(index, ", ".join(cells)) if lost else None
    name, uuid, mib, capability = cells
    number = re.fullmatch(r"\d+\.\d+", capability)
    if re.search(r"lost|unknown error|err!", mib, re.IGNORECASE):
        return (), _dead(index, mib.strip("[]"))
    known = re.fullmatch(r"\d+(\.\d+)?", mib)
    memory = round(float(mib) / 1024, 2) if known else 0.0
    return (
        Gpu(name.removeprefix("NVIDIA "), uuid, memory, float(capability) if number else None, unified=not known),
    ), None


def _slices(said: str) -> dict[str, list[tuple[str, str, float]]]:
    """UUID of a GPU → profile, UUID and GiB of its slices, of `nvidia-smi -L`."""
    found: dict[str, list[tuple[str, str, float]]] = {}
    whole = ""
    for line in said.splitlines():
        if card := re.match(r"GPU \d+: .*\(UUID: (GPU-[^)\s]+)\)", line):
            whole = card[1]
        elif part := _SLICE.match(line):
            size = round(_SLICE_SHARE * float(part["gb"]), 2)
            found.setdefault(whole, []).append((part["profile"], part["uuid"], size))
    return found


def _parts(gpu: Gpu, divided: dict[str, list[tuple[str, str, float]]]) -> list[Gpu]:
    slices = divided.get(gpu.uuid, [])
    made = [replace(gpu, name=f"{gpu.name} MIG {name}", uuid=uuid, memory_gib=size) for name, uuid, size in slices]
    return [replace(part, unified=False) for part in made] or [gpu]


def _others(root: Path, loaded: bool, silence: str) -> list[Unusable]:
    """GPUs without a word from an NVIDIA driver."""
    if loaded:
        remedy = f"reboot (after an update of the driver), or restart the container; {ON_THE_CPU}"
        why = f": {silence}" if silence else " to NVML or nvidia-smi"
        return [Unusable(f"the NVIDIA driver is loaded and does not answer{why}", remedy, broken=True)]
    found = []
    if cards := on_the_bus(root):
        remedy = "install it; in a container: docker run --gpus all, with NVIDIA's container toolkit on the host"
        found.append(Unusable(f"NVIDIA cards on the bus: {cards}; no driver for them here", remedy))
    if (root / "dev/kfd").exists():
        found.append(Unusable("an AMD GPU (ROCm) is not used: this project drives NVIDIA's alone", ON_THE_CPU))
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.append(Unusable("Apple's GPU (MPS) is not used: this project drives NVIDIA's alone", ON_THE_CPU))
    return found


def on_the_bus(root: Path) -> int:
    """NVIDIA's display controllers that the kernel sees, with or without a driver."""
    devices = (root / "sys/bus/pci/devices").glob("*")
    return sum(text_of(d / "vendor").strip() == _NVIDIA and text_of(d / "class").startswith(_DISPLAY) for d in devices)


# ── CUDA_VISIBLE_DEVICES ───────────────────────────────────────────────────────────────────────


def visible(found: Found, setting: str | None) -> tuple[Gpu, ...]:
    """The GPUs that CUDA would show under `CUDA_VISIBLE_DEVICES=setting`; without it whole ones before slices.

    CUDA's own rules: indices or beginnings of UUIDs; the first entry that names nothing new ends
    the list. (Its default order puts the fastest first; for GPUs that differ, set
    `CUDA_DEVICE_ORDER=PCI_BUS_ID` to make indices mean the same here and there.)
    """
    if setting is None:
        return tuple(sorted(found.gpus, key=lambda gpu: gpu.is_slice))
    chosen: list[Gpu] = []
    for entry in _entries(setting):
        if entry.isdecimal():
            matches = found.by_index[int(entry)][:1] if int(entry) < len(found.by_index) else ()
            if not matches and int(entry) < len(found.by_index):
                continue  # broken: `unusable` says so
        else:
            named = [gpu for gpu in found.gpus if entry.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(entry)]
            matches = tuple(named)
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return tuple(chosen)


def only(gpus: tuple[Gpu, ...], setting: str | None, by_number: bool) -> dict[str, str]:
    """Variables under which CUDA shows exactly `gpus`, the first of those visible under `CUDA_VISIBLE_DEVICES=setting`.

    Numbers where they are certain (and what was set is kept as it was written), else UUIDs.
    """
    if not by_number:
        return {VARIABLE: ",".join(gpu.uuid for gpu in gpus)}
    if setting is not None:
        return {VARIABLE: ",".join(_entries(setting)[: len(gpus)])}
    # The order in which they were looked at: CUDA's own puts the fastest first.
    return {VARIABLE: ",".join(map(str, range(len(gpus)))), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def _entries(setting: str) -> list[str]:
    return [part.strip() for part in setting.split(",")]


def is_wsl(root: Path = Path("/")) -> bool:
    """Windows' subsystem for Linux, the second: its driver has no `expandable_segments`."""
    return (root / "dev/dxg").exists() or "microsoft" in text_of(root / "proc/sys/kernel/osrelease").lower()
