"""The command that starts the worker: one process, or torchrun with one per GPU (or per share of a CPU)."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from runner import gpus, hardware, run_lock
from runner.execute import inherited, network
from runner.plan.start import CPU_ENV, LOCALHOST, MEETING_SECONDS, arguments, several, variables
from runner.rundir import RunDir
from runner.spec import RunSpec

__all__ = [
    "CPU_ENV", "LAUNCHED", "LOCALHOST", "MEETING_SECONDS", "command", "die_with_parent", "environment", "log_of",
    "ranks_of", "several", "start",
]  # fmt: skip

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
"""This process was started by torchrun."""


def ranks_of(spec: RunSpec, node: int) -> range:
    """The processes of one machine among all of the run."""
    each = spec.hw.processes_per_node
    return range(node * each, (node + 1) * each)


def log_of(node: int) -> str:
    """The file in `logs/` with torchrun's own words on that machine."""
    return f"launcher{node or ''}.log"


def start(
    run: RunDir, spec: RunSpec, log: TextIO, stdout: TextIO | None = None, *, node: int = 0, address: str | None = None
) -> subprocess.Popen[Any]:
    """Start this machine's processes; `log` takes torchrun's own words."""
    return subprocess.Popen(
        command(run, spec, node),
        env=environment(spec, address),
        stdin=subprocess.DEVNULL if node else None,
        stdout=stdout,
        stderr=log if several(spec) else None,
        start_new_session=True,
        pass_fds=run_lock.inherited(),
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


def command(run: RunDir, spec: RunSpec, node: int = 0) -> list[str]:
    """What to execute on machine number `node`. A rewound run meets under another id, so that no machine joins what
    another is still leaving.
    """
    rewinds = run.read("rewinds.json").get("count", 0)
    return [sys.executable, *arguments(spec, str(run.spec_file), f"{run.id}-{rewinds}", str(node))]


def environment(spec: RunSpec, address: str | None = None) -> dict[str, str]:
    """This process's over our own defaults, under what the hardware profile sets; without places of other launchers.

    `address` is this machine's own towards the others, where several are not to find it by themselves.
    """
    hw = spec.hw
    own = variables(spec, os.cpu_count())
    # gloo takes the interface of the host name, and 127.0.0.1 where that does not resolve: the others then wait for it
    # in vain. NCCL looks through the interfaces by itself.
    found = network.interface(str(hw.rendezvous), address) if hw.num_nodes > 1 else None
    if found is not None:
        own["GLOO_SOCKET_IFNAME"] = found
    if gpus.is_wsl() or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # its driver has no such segments; torch's older name
        own.pop("PYTORCH_ALLOC_CONF", None)
    shown = hardware.only(hw)  # the order of devices is a default, the devices are not
    order = {name: value for name, value in shown.items() if name != gpus.VARIABLE}
    devices = {name: shown[name] for name in shown.keys() - order.keys()}
    return {**order, **own, **inherited.cleaned(os.environ), **hw.env, **devices}


def die_with_parent(parent: int | None = None, number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent is gone (Linux; prctl(2), PR_SET_PDEATHSIG): a run whose launcher was
    killed saves a checkpoint and ends, instead of going on unseen.

    Called in the new process; it ends at once if `parent` (by default torchrun, for its workers) is gone already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, number)
    orphan = os.getppid() != parent if parent is not None else LAUNCHED and not _is_torchrun(os.getppid())
    if orphan:
        os._exit(1)


def _is_torchrun(pid: int) -> bool:
    try:
        return b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
