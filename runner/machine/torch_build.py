"""Compatibility of the installed torch with this machine's driver and GPUs, read from files."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from runner.machine.gpus import DRIVER_FILES, Gpu
from runner.rundir.directory import text_of

# Oldest driver branch per major version of CUDA: docs.nvidia.com/deploy/cuda-compatibility, "Minor Version
# Compatibility". Within a major version an older driver of that family serves a newer toolkit.
DRIVER_OF_CUDA = {13: 580, 12: 525, 11: 450}
# Compute capabilities that PyTorch's wheels have kernels for, by the first CUDA of the range: pytorch/test-infra
# pull request 7046 (CUDA 12.6: 5.0 to 9.0; 12.8: 7.0 to 12.0; 13.0: 7.5 to 12.0 with PTX for what comes later).
KERNELS = {(11, 0): (5.0, 9.0), (12, 7): (7.0, 12.1), (13, 0): (7.5, 99.0)}
INDEX = "https://download.pytorch.org/whl"
"""PyTorch's own index of wheels, one folder per CUDA: cu126, cu129, cu130."""
_MODULE = "proc/driver/nvidia/version"


@dataclass(frozen=True)
class Torch:
    """The installed torch, as its files say."""

    version: str
    cuda: tuple[int, int] | None
    """Built for this CUDA; None for a CPU (or ROCm) build."""


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver."""

    version: str | None
    """Such as `580.82.07`."""
    cuda: tuple[int, int] | None
    """The newest CUDA that it (or a forward-compatibility library beside it) serves: (13, 0)."""


def installed_torch() -> Torch | None:
    """Version and CUDA of torch, from torch/version.py; None where it is not installed."""
    try:
        found = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    text = text_of(Path(str(found.locate_file("torch/version.py"))))
    cuda = re.search(r"^cuda\b.*=\s*['\"](\d+)\.(\d+)", text, re.M)
    return Torch(found.version, (int(cuda[1]), int(cuda[2])) if cuda else None)


def driver(root: Path = Path("/")) -> Driver | None:
    """The driver as NVML, else its kernel module, else nvidia-smi names it; None without one."""
    if not any((root / file).exists() for file in DRIVER_FILES):
        version = _from_smi()
        return Driver(version, None) if version else None
    with suppress(Exception):  # no pynvml, or no answer: its errors are its own
        import pynvml  # 40 ms

        pynvml.nvmlInit()
        try:
            version, number = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetCudaDriverVersion_v2()
        finally:
            pynvml.nvmlShutdown()
        return Driver(
            version.decode() if isinstance(version, bytes) else version, (number // 1000, number % 1000 // 10)
        )
    return Driver(module_version(root) or _from_smi(), None)


def module_version(root: Path) -> str | None:
    """Version of the loaded kernel module."""
    found = re.search(r"Kernel Module\b.*?\s(\d{3}\.[\d.]+)", text_of(root / _MODULE))
    return found[1] if found else None


def _from_smi() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        words = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^\s*(\d{3}\.[\d.]+)\s*$", said, re.M)
    return found[1] if found else None


def why_not(torch: Torch, gpus: Sequence[Gpu], driver: Driver | None) -> tuple[str, str] | None:
    """The reason why this build cannot use these GPUs, with its remedy; None where it can."""
    if torch.cuda is None:
        remedy = "install a CUDA build (without an extra index for CPU builds): pytorch.org/get-started/locally"
        return "which does not see the GPUs", remedy
    if driver is not None and (short := _too_old(driver, torch.cuda)):
        branch = DRIVER_OF_CUDA.get(torch.cuda[0])
        remedy = f"install driver {branch} or later" if branch else "install a newer driver"
        older = f", or a torch built for an older CUDA: {reinstall(torch, gpus)}" if torch.cuda[0] > 12 else ""
        return f"and {short}", remedy + older
    fitting = (bounds for first, bounds in reversed(KERNELS.items()) if torch.cuda >= first)
    oldest, newest = next(fitting, KERNELS[(11, 0)])
    for gpu in gpus:
        capability = gpu.compute_capability
        if capability is not None and not oldest <= capability <= newest:
            what = f"without kernels for {gpu.name} (compute capability {capability})"
            if capability < KERNELS[(11, 0)][0]:
                return what, "no build has them: take another GPU, or hw=cpu"
            if capability < oldest:
                return what, f"install the build for CUDA 12.6: {reinstall(torch, gpus)}"
            return what, "install a newer build, CUDA 12.8 or later: pytorch.org/get-started/locally"
    return None


def reinstall(torch: Torch, gpus: Sequence[Gpu]) -> str:
    """The command that installs the same torch for CUDA 12: cards after Hopper need 12.9's, Volta and older 12.6's."""
    newest = max((gpu.compute_capability or 0.0 for gpu in gpus), default=0.0)
    build = "cu129" if newest > KERNELS[(11, 0)][1] else "cu126"
    return f"pip install torch=={torch.version.partition('+')[0]} --index-url {INDEX}/{build}"


def _too_old(driver: Driver, cuda: tuple[int, int]) -> str | None:
    """Why the driver cannot serve a build for `cuda`; None where it can, or says nothing."""
    if driver.cuda is not None:
        return None if driver.cuda[0] >= cuda[0] else "the driver serves CUDA {}.{}".format(*driver.cuda)
    branch = int(driver.version.split(".")[0]) if driver.version else None
    if branch is None or branch >= DRIVER_OF_CUDA.get(cuda[0], 0):
        return None
    return f"the driver is {driver.version}"
