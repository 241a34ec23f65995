"""Errors as text: all at once, each with its source and its remedy."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from runner.errors import RunnerError
from runner.report.encodings import spelt
from runner.report.invocation import typed

TITLES = {
    1: "The run failed",
    2: "The request is wrong; nothing was started",
    3: "This cannot run",
    130: "Interrupted",
}


def print_problems(console: Console, error: RunnerError, *, started: bool = False, title: str | None = None) -> None:
    """One line per problem, its remedy below it; `started`: the worker was at it already."""
    title = title or TITLES.get(error.exit_code, "Error")
    if started:
        title = title.partition(";")[0]
    with spelt(console):
        console.print(Text(title, style="bold red"))
        for problem in error.problems:
            line = Text("  • ").append(typed(problem.what))
            if problem.source:
                line.append(f"  ({problem.source})", style="dim")
            console.print(line, soft_wrap=True)
            if problem.remedy:
                console.print(Text(f"    → {typed(problem.remedy)}", style="green"), soft_wrap=True)


def problems_as_json(error: RunnerError) -> dict[str, Any]:
    """The same for machines: `{"exit_code": …, "problems": [{"what", "source", "remedy"}]}`."""
    return {"exit_code": error.exit_code, "problems": [vars(problem) for problem in error.problems]}


def dump(content: Any) -> str:
    """JSON for standard output."""
    return json.dumps(content, indent=2, ensure_ascii=False)
