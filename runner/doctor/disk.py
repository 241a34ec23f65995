"""Free space and write access on the disks a run uses: a file is written, synced and read back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from runner.data.pretraining.workspace import Workspace, workspace_of
from runner.doctor.finding import GIB, DoctorTarget, Finding, State, in_words
from runner.errors import CannotRunError, Problem
from runner.hub import config
from runner.machine import writable
from runner.paths import cache_dir
from runner.plan.plan import Plan
from runner.spec import RunInfo, RunSpec

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
    writing = [f for f in folders(target) if not writable.why_not(writable.nearest(f.path))] if target.here else []
    found = [_room(disk, planned=True) for disk in _disks(writing)] if plan else []  # others are told as unwritable
    problems = [Problem(one.found, None, one.remedy) for one in found if one.state == "problem"]
    if problems:
        raise CannotRunError(*problems)
    return [f"{one.found}: {one.remedy}" for one in found if one.state != "ok"]


def disk_findings(target: DoctorTarget | None) -> Iterator[Finding]:
    """One line per disk, and one per folder that cannot be written to."""
    found = folders(target)
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


def folders(target: DoctorTarget | None) -> list[Folder]:
    """Where runs, our cache and the Hub's are, and what a run puts into each."""
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
    """Pretraining from a corpus has one of its own, unless `HF_HOME` names another (train/pretraining_stages.py)."""
    return config.cache() if place is None or os.environ.get("HF_HOME") else place.hf_cache


def _room(disk: _Disk, *, planned: bool) -> Finding:
    names = ", ".join(folder.title for folder in disk.folders)
    needed = sum(folder.needed_gib for folder in disk.folders)
    free = disk.free / GIB
    what = f"{in_words(disk.free)} of {in_words(disk.size)} free for {names}"
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
