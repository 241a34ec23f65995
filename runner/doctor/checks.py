"""All checks of this machine, in the order in which they are reported, as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.doctor import gpu_checks, software, system
from runner.doctor.finding import STATES, DoctorTarget, Finding, exit_code
from runner.machine import detect
from runner.machine.detect import Machine
from runner.report.tables import in_one_line
from runner.report.text import ascii_fallback


def examine_machine(target: DoctorTarget | None = None, *, bandwidth: bool = False) -> list[Finding]:
    """Look at this machine, for a run if one is named.

    `bandwidth` measures an all-reduce, in processes that import torch: 10 s and more.
    """
    machine = detect.detect()
    seen = gpu_checks.read_gpus(machine)
    found = [*_run(target, machine), *gpu_checks.gpu_findings(seen, machine, target)]
    if bandwidth:
        found.append(gpu_checks.bandwidth_finding(machine, target))
    elif len(machine.gpus) > 1:
        found.append(gpu_checks.unmeasured_finding(len(machine.gpus)))
    found += system.disk_findings(target)
    found += system.system_findings(machine, target)
    found += software.software_findings(machine, seen.driver, target)
    found += system.key_findings(target)
    return found


def _run(target: DoctorTarget | None, machine: Machine) -> Iterator[Finding]:
    """The hardware that the run names, and its plan."""
    if target is None:
        return
    spec, plan = target.spec, target.plan
    reason = detect.why_not_here(spec.hw, machine) if target.here else None
    if reason:
        remedy = "hw=local uses what this machine has; python -m runner fit says what else would do"
        yield Finding("hardware", "problem", reason, remedy)
    if plan is None:
        yield Finding("run", "note", f"no plan: the shape of {spec.model.id} is not known here", None)
        return
    for refusal in plan.reasons:
        yield Finding("run", "problem", refusal, "python -m runner plan, with the same words, says what would fit")
    if not plan.reasons:
        elsewhere = "" if target.here else f"; {spec.where.name}: only started from this machine"
        yield Finding("run", "ok", in_one_line(plan) + elsewhere)


_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


class DoctorReport(TypedDict):
    """The answer of `doctor --json`."""

    exit_code: int
    """0, or 3 where there is a problem."""
    run: dict[str, str] | None
    """Model, method, hw, deepspeed and where of the run that was asked about; null without words."""
    checks: list[Any]
    """Findings; see below."""


def findings_as_json(found: Sequence[Finding], target: DoctorTarget | None) -> DoctorReport:
    """The findings for machines."""
    run = None
    if target is not None:
        spec = target.spec
        run = {part: getattr(spec, part).name for part in ("model", "method", "hw", "deepspeed", "where")}
    return {"exit_code": exit_code(found), "run": run, "checks": [asdict(finding) for finding in found]}


def print_findings(console: Console, found: Sequence[Finding]) -> None:
    """A line per check, what to do about it below; the count last."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in found:
        style = _STYLE[finding.state]
        said = Text(finding.found)
        if finding.remedy:
            said.append(f"\n→ {finding.remedy}", style="dim" if finding.state == "note" else "green")
        table.add_row(Text(finding.state, style=style), Text(finding.name), said)
    with ascii_fallback(console):
        console.print(table, highlight=False)
        console.print(count_line(found))


def count_line(found: Sequence[Finding]) -> Text:
    """Return the number of findings by state, worst first."""
    number = Counter(finding.state for finding in found)
    counts = [f"{number[state]} {state}{'s' * (number[state] > 1)}" for state in reversed(STATES[1:]) if number[state]]
    rest = f" ({', '.join(counts)})" if counts else ""
    if number["problem"]:
        return Text(f"Not ready{rest}", style="bold red")
    return Text(f"Ready{rest}", style="bold green")
