"""Processor, main memory, /dev/shm and disks, within what the container is allowed; keys in the environment.

A disk is tried: a file is written, synced and read back."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runner.cloud.provider_errors import CloudError
from runner.cloud.providers import connect, provider_class
from runner.config import credentials
from runner.data.pretraining.workspace import Workspace, workspace_of
from runner.doctor.finding import GIB, DoctorTarget, Finding, State, size_text
from runner.errors import CannotRunError, Problem, RunnerError
from runner.hub import config_json
from runner.machine import writable
from runner.machine.detect import Machine
from runner.paths import cache_dir
from runner.plan.host_memory import CPU_PROCESS, CUDA_PROCESS
from runner.plan.memory import FREE_SHARE
from runner.plan.plan import Plan
from runner.spec import RunInfo, RunSpec

# NVIDIA asks for `docker run --shm-size=1g` (NCCL's user guide, "Runtime and MPI issues"); DeepSpeed 0.19 warns
# under 512 MiB. With four GPUs Docker's 64 MiB were too little for segments of 9.2 MiB (NVIDIA/nccl issue 342).
SHM_ASKED, SHM_LEAST = 1.0, 0.5  # GiB
_MORE_SHM = "docker run --shm-size=1g (or --ipc=host); in Kubernetes an emptyDir with medium: Memory at /dev/shm"


def system_findings(machine: Machine, target: DoctorTarget | None, root: Path = Path("/")) -> Iterator[Finding]:
    """CPU, memory, shared memory."""
    yield _cpu(machine)
    yield _memory(machine, target, root)
    yield _shm(len(machine.gpus), root / "dev/shm")


def _cpu(machine: Machine) -> Finding:
    cores, there = machine.num_cpus, os.cpu_count() or machine.num_cpus
    what = "1 core" if cores == 1 else f"{cores} cores"
    if there > cores:
        what += f" of {there} (affinity, or the container's quota)"
    what += ", bfloat16" if machine.cpu_bf16 else ", no bfloat16"
    facts = {"num_cpus": cores, "bf16": machine.cpu_bf16}
    if cores < len(machine.gpus):
        remedy = "give the container a core per GPU at least: every process tokenises, and feeds its own"
        return Finding("cpu", "warning", f"{what}, for {len(machine.gpus)} GPUs", remedy, facts)
    if not machine.cpu_bf16 and not machine.gpus:  # 410 to 480 tokens/s against 117 to 143: machine/detect.py
        remedy = "a CPU with AVX512-BF16, AMX or Arm's BF16 trains three times as fast"
        return Finding("cpu", "note", f"{what}: runs use fp32", remedy, facts)
    return Finding("cpu", "ok", what, None, facts)


def _memory(machine: Machine, target: DoctorTarget | None, root: Path) -> Finding:
    """Main memory that the container may use, what is free of it, and what a run takes."""
    total, installed, free = machine.memory_gib, _meminfo(root, "MemTotal"), _meminfo(root, "MemAvailable")
    if total is None:
        return Finding("memory", "note", "the system does not say how much there is")
    facts: dict[str, float | None] = {"memory_gib": total, "free_gib": free}
    what = f"{total:.1f} GiB"
    if installed is not None and total < 0.99 * installed:
        what += f" (the container's limit; the machine has {installed:.1f})"
    if free is not None:
        free = facts["free_gib"] = min(free, total)
        what += f", {free:.1f} free"
    if target is None or target.plan is None or not target.here:
        least = len(machine.gpus) * CUDA_PROCESS / GIB or CPU_PROCESS / GIB
        if free is not None and free < least:
            remedy = f"a run's processes take {least:.1f} GiB before they load a model: end other programs"
            return Finding("memory", "warning", what, remedy, facts)
        return Finding("memory", "ok", what, None, facts)
    needed = facts["needed_gib"] = target.plan.host_ram_gib
    what += f"; the run takes {needed:.1f}"
    if needed > FREE_SHARE * total:
        remedy = "a larger machine or container limit, or a run that takes less: python -m runner plan says for what"
        return Finding("memory", "problem", what, remedy, facts)
    if free is not None and needed > free:
        return Finding("memory", "warning", what, "end the processes that use the rest", facts)
    return Finding("memory", "ok", what, None, facts)


def _meminfo(root: Path, name: str) -> float | None:
    """A line of /proc/meminfo, in GiB."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", (root / "proc/meminfo").read_text("utf-8"), re.M)
    except OSError:
        return None
    return round(int(found[1]) / 2**20, 2) if found else None


def _shm(num_gpus: int, folder: Path) -> Finding:
    """Shared memory: NCCL's between processes of one machine, and that of data loaders with workers."""
    try:
        size, _, free = shutil.disk_usage(folder)
    except OSError:
        return Finding("/dev/shm", "ok", "not there, not needed outside of Linux")
    facts = {"size_gib": round(size / GIB, 3), "free_gib": round(free / GIB, 3)}
    what = f"{size_text(free)} free of {size_text(size)}"
    remedy = _MORE_SHM if size < SHM_ASKED * GIB else "delete what ended programs left there: ls -l /dev/shm"
    if num_gpus > 1 and free < SHM_LEAST * GIB:
        return Finding("/dev/shm", "problem", f"{what}: NCCL cannot start on {num_gpus} GPUs", remedy, facts)
    if free < SHM_ASKED * GIB:
        return Finding("/dev/shm", "warning", f"{what}: little for NCCL, or for a data loader's workers", remedy, facts)
    return Finding("/dev/shm", "ok", what, None, facts)


_FOR = {
    "HF_TOKEN": "gated and private models and data sets",
    "WANDB_API_KEY": "track=wandb; without it a run is recorded offline",
    "RUNPOD_API_KEY": "where=runpod, and today's prices in a plan",
}


def key_findings(target: DoctorTarget | None) -> Iterator[Finding]:
    """One line per key."""
    rents = provider_class(target.spec.where.name).key_variable if target and target.spec.is_rented else None
    for name in dict.fromkeys([*_FOR, *filter(None, [rents])]):
        yield _key(name, target, name == rents)


def _key(name: str, target: DoctorTarget | None, rents: bool) -> Finding:
    value = os.environ.get(name, "")
    if value.strip() and (value != value.strip() or value[0] in "\"'" or value[-1] in "\"'" or "\n" in value):
        remedy = "export it again without"
        return Finding(name, "warning", "set, with a space, a line break or a quote around it", remedy)
    if target and rents:
        return _rents(name, target.spec)
    if value.strip():
        return Finding(name, "ok", "set")
    if key := credentials.find_key(name):
        return Finding(name, "ok", f"not set; {key.source} is used")
    need = _need(name, target) if target else None
    if need is None:
        return Finding(name, "note", f"not set; needed for {_FOR[name]}")
    what, remedy = need
    return Finding(name, "warning" if name == "WANDB_API_KEY" else "problem", f"not set, and {what}", remedy)


def _rents(name: str, spec: RunSpec) -> Finding:
    """Ask the cloud whether it accepts the key. Whether that may also rent is told by the first request for a pod."""
    try:
        api = connect(spec.where.name)
        api.check_key(spec)
        usd = api.balance()
    except CloudError as error:
        return Finding(name, "warning", f"set, and the cloud could not be asked: {error}", "try again later")
    except RunnerError as error:
        (problem, *_) = error.problems
        return Finding(name, "problem", problem.what, problem.remedy)
    if usd is not None:
        return Finding(name, "ok", f"set, and accepted: the account has ${usd:.2f}")
    return Finding(name, "ok", "set, and accepted; it cannot read the balance, which is not checked before renting")


def _need(name: str, target: DoctorTarget) -> tuple[str, str] | None:
    """Why the run needs the key, and what to do; None where it does not."""
    spec, plan = target.spec, target.plan
    if name == "HF_TOKEN" and spec.model.gated and (plan is None or "weights" in plan.disk):
        page = f"https://huggingface.co/{spec.model.id}"
        return f"{spec.model.id} is gated", f"accept its licence at {page}, then export HF_TOKEN=…"
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if name == "WANDB_API_KEY" and spec.track.name == "wandb" and not offline:
        return "track=wandb: the run is recorded offline", "export WANDB_API_KEY=… or wandb login"
    return None


LITTLE, NOTHING = 10.0, 0.5
"""GiB free, where no run is named: less than a 7B model with what comes out of it; less than the demo run."""
TIGHT = 0.9
"""Share of the free space for a run: what others write meanwhile, and logs, are not in the plan."""


@dataclass
class Folder:
    """One of the folders a run writes to."""

    title: str
    path: Path
    setting: str
    """The key or variable that moves it elsewhere."""
    terms: tuple[str, ...]
    """Terms of the plan's disk that lie here."""
    needed_gib: float = 0.0


@dataclass
class _Disk:
    folders: list[Folder] = field(default_factory=list)
    free: int = 0
    size: int = 0


def check_disk(spec: RunSpec, plan: Plan | None) -> list[str]:
    """Notes, before a run starts here; CannotRunError where a disk has less room than the plan says."""
    target = DoctorTarget(spec, plan)
    writing = [f for f in run_folders(target) if not writable.why_not(writable.nearest(f.path))] if target.here else []
    found = [_room(disk, planned=True) for disk in _disks(writing)] if plan else []  # others are told as unwritable
    problems = [Problem(one.found, None, one.remedy) for one in found if one.state == "problem"]
    if problems:
        raise CannotRunError(*problems)
    return [f"{one.found}: {one.remedy}" for one in found if one.state != "ok"]


def disk_findings(target: DoctorTarget | None) -> Iterator[Finding]:
    """One line per disk, and one per folder that cannot be written to."""
    found = run_folders(target)
    for folder in found:
        failure = writable.why_not(writable.nearest(folder.path), synced=True)
        if failure:
            what = f"{folder.title} ({folder.path}) cannot be written to: {failure}"
            yield Finding("disk", "problem", what, f"name another folder: {folder.setting}")
    for disk in _disks(found):
        yield _room(disk, planned=target is not None and target.here and target.plan is not None)


def _disks(folders: Iterable[Folder]) -> list[_Disk]:
    """The disks that the folders are on."""
    disks: dict[int, _Disk] = {}
    for folder in folders:
        there = writable.nearest(folder.path)
        try:
            device, usage = there.stat().st_dev, shutil.disk_usage(there)
        except OSError:
            continue  # it cannot be written to
        disk = disks.setdefault(device, _Disk())
        disk.folders.append(folder)
        disk.free, disk.size = usage.free, usage.total
    return list(disks.values())


def run_folders(target: DoctorTarget | None) -> list[Folder]:
    """Return the folders of runs, cache and Hub, and the data that a run writes to each."""
    output = Path(target.spec.run.output_dir if target else RunInfo().output_dir).expanduser()
    nvme = target.spec.deepspeed.nvme_path if target else None
    objective = target.spec.objective if target else None
    place = workspace_of(objective) if objective else None
    ours = target is not None and target.spec.model.package is not None  # unpacked from a package, not downloaded
    found = [
        Folder("runs", output, "run.output_dir=…", ("checkpoints", "final_model", *(() if nvme else ("offloaded",)))),
        Folder("cache", cache_dir(), "RUNNER_CACHE=…", ("tokenised", *(("weights",) if ours else ()))),
        Folder("Hugging Face cache", _hub_cache(place), "HF_HOME=…", ("data", *(() if ours else ("weights",)))),
    ]
    if place is not None:
        found.append(Folder("shards", place.root, "objective.root=…", ("shards",)))
    if nvme:
        found.append(Folder("offload", Path(nvme).expanduser(), "deepspeed.nvme_path=…", ("offloaded",)))
    if target is not None and target.here and target.plan is not None:
        for folder in found:
            folder.needed_gib = sum(target.plan.disk.get(term, 0.0) for term in folder.terms)
    return found


def _hub_cache(place: Workspace | None) -> Path:
    """Pretraining from a corpus has one of its own, unless `HF_HOME` names another (objectives/pretraining.py)."""
    return config_json.cache_folder() if place is None or os.environ.get("HF_HOME") else place.hf_cache


def _room(disk: _Disk, *, planned: bool) -> Finding:
    names = ", ".join(folder.title for folder in disk.folders)
    needed = sum(folder.needed_gib for folder in disk.folders)
    free = disk.free / GIB
    what = f"{size_text(disk.free)} of {size_text(disk.size)} free for {names}"
    facts = {
        "free_gib": round(free, 2),
        "size_gib": round(disk.size / GIB, 2),
        "needed_gib": round(needed, 2) if planned else None,
        "folders": {folder.title: str(folder.path) for folder in disk.folders},
    }
    largest = max(disk.folders, key=lambda folder: folder.needed_gib)
    remedy = f"make room, or name a folder on a larger disk: {largest.setting}"
    state: State = "ok"
    if planned:
        what += f"; the run takes {needed:.1f}"
        state = "problem" if needed > free else "warning" if needed > TIGHT * free else "ok"
    else:
        state = "problem" if free < NOTHING else "warning" if free < LITTLE else "ok"
    return Finding("disk", state, what, None if state == "ok" else remedy, facts)
