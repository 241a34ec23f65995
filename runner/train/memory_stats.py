"""Peak memory of this process by phase; detection of out-of-memory errors."""

from __future__ import annotations

import ctypes
import errno
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, Literal

import torch

from runner.report.failure_causes import GPU_MEMORY, PINNED_MEMORY
from runner.rundir.json_files import OutOfMemory

GIB = 2**30
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Peak:
    """Highest values over some time, in GiB."""

    resident: float
    """Main memory in use (RSS), pages of mapped files included."""
    reserved: float | None = None
    """Taken from the GPU by torch's allocator; None without a GPU."""
    allocated: float | None = None
    """Of that, in tensors."""

    def merged(self, other: Peak) -> Peak:
        """The higher value of each."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Peak(*(a if b is None else b if a is None else max(a, b) for a, b in pairs))

    @property
    def held(self) -> float:
        """The figure that the plan predicts: reserved on a GPU, resident on a CPU."""
        return self.resident if self.reserved is None else self.reserved


class Peaks:
    """Measures from one call of `end` to the next; a phase that comes twice counts with its higher peak."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.phases: dict[str, Peak] = {}
        self.resets = _reset(on_gpu)

    def end(self, phase: str) -> None:
        """Count what was measured since the last call as `phase`."""
        now = peak_since_reset(self.on_gpu)
        self.phases[phase] = self.phases[phase].merged(now) if phase in self.phases else now
        self.resets = _reset(self.on_gpu)

    def overall(self) -> Peak:
        """The peak of all phases, and of the time since."""
        peak = peak_since_reset(self.on_gpu)
        for other in self.phases.values():
            peak = peak.merged(other)
        return peak

    def as_dict(self) -> dict[str, Any]:
        """The measurements for `summary.json`; phases only where they can be told apart."""
        phases = {name: peak.held for name, peak in self.phases.items()} if self.resets else {}
        return {**asdict(self.overall()), "outside": _outside() if self.on_gpu else None, "phases": phases}


def gpu_in_use() -> bool:
    """True once CUDA is initialised: a query before that would create a context of half a GiB."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch's


def peak_since_reset(on_gpu: bool) -> Peak:
    """The peak since the last reset."""
    resident = _resident()
    if not on_gpu:
        return Peak(resident)
    return Peak(resident, torch.cuda.max_memory_reserved() / GIB, torch.cuda.max_memory_allocated() / GIB)


def _resident() -> float:
    """`VmHWM` where there is one (proc_pid_status(5)): in `ru_maxrss` is also what the process that started this one
    held at that moment, and no reset takes that away."""
    with suppress(OSError):
        for line in STATUS.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / GIB if sys.platform == "darwin" else usage * 1024 / GIB  # macOS counts bytes, Linux KiB


def _reset(on_gpu: bool) -> bool:
    """Reset the peaks; False where that of main memory cannot be reset, so that phases cannot be told apart.

    What is free but kept, by torch's allocator or by the C library, goes back first: the next phase would seem to use
    it. Linux: "5" in clear_refs resets the peak of the resident size (proc_pid_clear_refs(5)).
    """
    if on_gpu:
        if gpu_in_use():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return True
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5", "ascii")
    except OSError:
        return False
    return True


def _outside() -> float:
    """GiB of the GPU in use outside torch's allocator: CUDA context, libraries, other processes."""
    free, total = torch.cuda.mem_get_info()
    return float(total - free - torch.cuda.memory_reserved()) / GIB


# ── out of memory ──────────────────────────────────────────────────────────────────────────────

_CPU = ("defaultcpuallocator: can't allocate memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """Facts of an out-of-memory error; None for any other error.

    `kind` is `cuda` or `cpu` (main memory), `message` the allocator's first line, `phase` that of the step, where the
    stack shows it; sizes in GiB.
    """
    for cause in _causes(error):
        kind = _kind(cause)
        if kind:
            lines = (str(cause).strip() or type(cause).__name__).splitlines()
            text = next((line.strip() for line in lines if GPU_MEMORY.search(line)), lines[0])
            found: OutOfMemory = {"kind": kind, "message": text, "phase": _phase_of(cause.__traceback__)}
            found.update(_memory_now())
            return found
    return None


def _memory_now() -> OutOfMemory:
    on_gpu = gpu_in_use()
    peak = peak_since_reset(on_gpu)
    free, total = torch.cuda.mem_get_info() if on_gpu else (None, None)
    return {
        "allocated_gib": _rounded(peak.allocated),
        "reserved_gib": _rounded(peak.reserved),
        "resident_gib": _rounded(peak.resident),
        "outside_gib": _rounded(_outside() if on_gpu else None),
        "total_gib": None if total is None else _rounded(total / GIB),
        "free_gib": None if free is None else _rounded(free / GIB),
    }


def _rounded(size: float | None) -> float | None:
    return None if size is None else round(size, 3)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _kind(error: BaseException) -> Literal["cuda", "cpu"] | None:
    if isinstance(error, torch.OutOfMemoryError):
        return "cuda"
    if GPU_MEMORY.search(str(error)):  # DeepSpeed's offload and the data loader lock pages of main memory with CUDA
        called = [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]
        return "cpu" if PINNED_MEMORY.search(f"{error}\n{called}") else "cuda"
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "cpu"
    return "cpu" if isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _CPU) else None


def _phase_of(stack: TracebackType | None) -> str | None:
    """`eval`, `backward`, `step` or `forward`, by the functions that were being run."""
    codes = [frame.f_code for frame, _ in walk_tb(stack)]
    called = {code.co_name for code in codes}
    stepping = any(code.co_name == "step" and "optim" in code.co_filename for code in codes)
    if called & {"evaluation_loop", "generate"}:
        return "eval"
    if "backward" in called:
        return "backward"
    if stepping or "clip_grad_norm_" in called:
        return "step"
    return "forward" if "compute_loss" in called else None
