"""Findings of `doctor` as a table and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.doctor.finding import STATES, DoctorTarget, Finding, exit_code
from runner.report.encodings import spelt

_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red"}


def findings_as_json(found: Sequence[Finding], wanted: DoctorTarget | None) -> dict[str, Any]:
    """`{"exit_code", "run", "checks": [{"name", "state", "found", "remedy", "facts"}]}`; `run` null without words."""
    run = None
    if wanted is not None:
        spec = wanted.spec
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
    with spelt(console):
        console.print(table, highlight=False)
        console.print(verdict(found))


def verdict(found: Sequence[Finding]) -> Text:
    """How many of each, the worst first."""
    number = Counter(finding.state for finding in found)
    counts = [f"{number[state]} {state}{'s' * (number[state] > 1)}" for state in reversed(STATES[1:]) if number[state]]
    rest = f" ({', '.join(counts)})" if counts else ""
    if number["problem"]:
        return Text(f"Not ready{rest}", style="bold red")
    return Text(f"Ready{rest}", style="bold green")
