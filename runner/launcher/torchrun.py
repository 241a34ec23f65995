"""The command that starts the worker: one process, or torchrun with one per GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any, TextIO

from runner.launcher import inherited_ranks
from runner.machine import detect, gpus, hostfile
from runner.machine.processes import die_with_parent
from runner.plan.worker_environment import arguments, several, variables
from runner.rundir import lock
from runner.rundir.directory import RunDir
from runner.spec import RunSpec


def ranks_of(spec: RunSpec, node: int) -> range:
    """The processes of one machine among all of the run."""
    each = spec.hw.processes_per_node
    return range(node * each, (node + 1) * each)


def log_of(node: int) -> str:
    """The file in `logs/` with torchrun's own words on that machine."""
    return f"launcher{node or ''}.log"


def start_processes(
    run: RunDir, spec: RunSpec, log: TextIO, stdout: TextIO | None = None, *, node: int = 0, address: str | None = None
) -> subprocess.Popen[Any]:
    """Start this machine's processes; `log` takes torchrun's own words."""
    return subprocess.Popen(
        torchrun_command(run, spec, node),
        env=process_environment(spec, address),
        stdin=subprocess.DEVNULL if node else None,
        stdout=stdout,
        stderr=log if several(spec) else None,
        start_new_session=True,
        pass_fds=lock.inherited_locks(),
        preexec_fn=partial(die_with_parent, os.getpid()),
    )


def torchrun_command(run: RunDir, spec: RunSpec, node: int = 0) -> list[str]:
    """The command for machine number `node`. A rewound run meets under another id, so that no machine joins what
    another is still leaving.
    """
    rewinds = run.read("rewinds.json").get("count", 0)
    return [sys.executable, *arguments(spec, str(run.spec_file), f"{run.id}-{rewinds}", str(node))]


def process_environment(spec: RunSpec, address: str | None = None) -> dict[str, str]:
    """This process's over our own defaults, under what the hardware profile sets; without places of other launchers.

    `address` is this machine's own towards the others, where several are not to find it by themselves.
    """
    hw = spec.hw
    own = variables(spec, os.cpu_count())
    # gloo takes the interface of the host name, and 127.0.0.1 where that does not resolve: the others then wait for it
    # in vain. NCCL looks through the interfaces by itself.
    found = hostfile.interface(str(hw.rendezvous), address) if hw.num_nodes > 1 else None
    if found is not None:
        own["GLOO_SOCKET_IFNAME"] = found
    if gpus.is_wsl() or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:  # its driver has no such segments; torch's older name
        own.pop("PYTORCH_ALLOC_CONF", None)
    shown = detect.only(hw)  # the order of devices is a default, the devices are not
    order = {name: value for name, value in shown.items() if name != gpus.VARIABLE}
    devices = {name: shown[name] for name in shown.keys() - order.keys()}
    return {**order, **own, **inherited_ranks.without_ranks(os.environ), **hw.env, **devices}
