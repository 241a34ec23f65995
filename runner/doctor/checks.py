"""All checks of this machine, in the order in which they are reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runner.doctor import bandwidth as all_reduce
from runner.doctor import disk, gpu_checks, keys, software, system
from runner.doctor.finding import DoctorTarget, Finding
from runner.machine import detect
from runner.machine.detect import Machine
from runner.report.tables import in_one_line


def examine(wanted: DoctorTarget | None = None, *, bandwidth: bool = False, root: Path = Path("/")) -> list[Finding]:
    """Look at this machine, for a run if one is named. `root` is where `proc`, `sys` and `dev` are.

    `bandwidth` measures an all-reduce, in processes that import torch: 10 s and more.
    """
    machine = detect.detect(root)
    seen = gpu_checks.look(machine, root)
    found = [*_run(wanted, machine), *gpu_checks.findings(seen, machine, wanted)]
    if bandwidth:
        found.append(all_reduce.finding(machine, wanted))
    elif len(machine.gpus) > 1:
        found.append(all_reduce.unmeasured(len(machine.gpus)))
    found += disk.findings(wanted)
    found += system.findings(machine, wanted, root)
    found += software.findings(machine, seen.driver, wanted)
    found += keys.findings(wanted)
    return found


def _run(wanted: DoctorTarget | None, machine: Machine) -> Iterator[Finding]:
    """The hardware that the run names, and its plan."""
    if wanted is None:
        return
    spec, plan = wanted.spec, wanted.plan
    reason = detect.why_not_here(spec.hw, machine) if wanted.here else None
    if reason:
        remedy = "hw=local uses what this machine has; python -m runner fit says what else would do"
        yield Finding("hardware", "problem", reason, remedy)
    if plan is None:
        yield Finding("run", "note", f"no plan: the shape of {spec.model.id} is not known here", None)
        return
    for refusal in plan.reasons:
        yield Finding("run", "problem", refusal, "python -m runner plan, with the same words, says what would fit")
    if not plan.reasons:
        elsewhere = "" if wanted.here else f"; {spec.where.name}: only started from this machine"
        yield Finding("run", "ok", in_one_line(plan.as_dict()) + elsewhere)
