"""Rank variables (`LOCAL_RANK`, `WORLD_SIZE`, …) inherited from another launcher.

accelerate, transformers, DeepSpeed and torchrun each take some of these variables for theirs. `LOCAL_RANK=0` alone
makes accelerate start a process group, and with `WORLD_SIZE=2` it waits half an hour for a process that never comes;
`ACCELERATE_MIXED_PRECISION` changes the numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from runner.errors import Problem, RequestError

_PLACES = re.compile(
    r"(LOCAL_|NODE_|GROUP_|CROSS_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|(LOCAL|CROSS)_SIZE|ROLE_NAME"
    r"|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET|ACCELERATE|FSDP)_\w+"
    r"|(OMPI|MV2)_COMM_WORLD_\w+|PMIX?_(RANK|SIZE|LOCAL_RANK|LOCAL_SIZE)|MPI_LOCAL(RANKID|NRANKS)"
)
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_NTASKS")
_LAUNCHERS = {
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate": "accelerate launch",
    "accelerate.commands.launch": "accelerate launch",
    "accelerate.commands.accelerate_cli": "accelerate launch",
    "deepspeed": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed",
    "slurmstepd": "srun",
    **dict.fromkeys(("mpirun", "mpiexec", "orterun", "orted", "prterun", "prted", "hydra_pmi_proxy"), "mpirun"),
}
"""By the name of the program, or of the module that Python runs."""


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those places: who starts a process says where it stands."""
    return {name: value for name, value in environment.items() if not _PLACES.fullmatch(name)}


def inherited_rank_notes() -> list[str]:
    """Notes on variables that were found, and on the keys that replace them."""
    found = sorted(name for name in os.environ if _PLACES.fullmatch(name))
    if not found:
        return []
    more = f" and {len(found) - 4} more" if len(found) > 5 else ""
    listed = ", ".join(found if not more else found[:4]) + more
    return [f"not used, of another launcher: {listed}; hw.num_gpus, hw.num_processes and hw.num_nodes say who trains"]


def refuse_copies() -> None:
    """RequestError for one of several copies that a launcher has started: each would be a run of its own."""
    sizes = [os.environ.get(name, "") for name in _SIZES]
    copies = max((int(size) for size in sizes if size.isdigit()), default=1)
    launcher = _launcher(os.getppid()) if copies > 1 else None
    if launcher is None:
        return
    what = f"{launcher} starts {copies} copies of the runner, and each would be a run of its own"
    remedy = (
        f"type python -m runner … without {launcher}: it starts a process per GPU (hw.num_gpus={copies}), "
        f"or per share of a CPU (hw.num_processes={copies})"
    )
    raise RequestError(Problem(what, launcher, remedy))


def _launcher(parent: int) -> str | None:
    """Which one the parent process is, if it is one."""
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    names = [Path(word).name.partition(":")[0] for word in words[:2]]
    if "-m" in words[1:4]:  # python -u -m torch.distributed.run
        names.append(words[words.index("-m", 1) + 1])
    return next((_LAUNCHERS[name] for name in names if name in _LAUNCHERS), None)
