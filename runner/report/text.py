"""Text for people: errors with their remedies, durations, JSON, and ASCII where a terminal has no Unicode."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from runner.errors import RunnerError
from runner.report.invocation import as_invoked

# One character for one, so that columns stay where they are.
_ASCII = str.maketrans("│┐┌×–—…•→’·█━", "|++x--.*>'.#=")


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


@contextmanager
def ascii_fallback(console: Console) -> Iterator[None]:
    """Print in ASCII where the console's encoding is not Unicode."""
    if not console.options.ascii_only:
        yield
        return
    with console.capture() as captured:
        yield
    console.file.write(captured.get().translate(_ASCII).encode("ascii", "replace").decode("ascii"))


TITLES = {
    1: "The run failed",
    2: "The request is wrong; nothing was started",
    3: "This cannot run",
    130: "Interrupted",
}


CONTROL = re.compile(r"\x1b\][^\x07\x1b]*(\x07|\x1b\\)?|\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal obeys (ECMA-48, and xterm's OSC), but for tabs and line breaks."""


def without_control_sequences(text: str) -> str:
    """A text without terminal control sequences: parts of it may be a stranger's, such as a pod's."""
    return CONTROL.sub("", text)


def print_problems(console: Console, error: RunnerError, *, started: bool = False, title: str | None = None) -> None:
    """One line per problem, its remedy below it; `started`: the worker was at it already."""
    title = title or TITLES.get(error.exit_code, "Error")
    if started:
        title = title.partition(";")[0]
    with ascii_fallback(console):
        console.print(Text(title, style="bold red"))
        for problem in error.problems:
            line = Text("  • ").append(without_control_sequences(as_invoked(problem.what)))
            if problem.source:
                line.append(f"  ({without_control_sequences(problem.source)})", style="dim")
            console.print(line, soft_wrap=True)
            if problem.remedy:
                remedy = without_control_sequences(as_invoked(problem.remedy))
                console.print(Text(f"    → {remedy}", style="green"), soft_wrap=True)


def problems_as_json(error: RunnerError) -> dict[str, object]:
    """The same for machines: `{"exit_code": …, "problems": [{"what", "source", "remedy"}]}`."""
    return {"exit_code": error.exit_code, "problems": [vars(problem) for problem in error.problems]}


def dump(content: object) -> str:
    """JSON for standard output."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def duration(seconds: float) -> str:
    """`48 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60 or not math.isfinite(seconds):
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
