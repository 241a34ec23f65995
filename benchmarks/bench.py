"""One benchmark: how it is measured, kept as JSON and shown as a section of docs/benchmarks.md."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.machine import machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Result = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by its name, the one typed after `python -m benchmarks`."""

    name: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    """Options → the numbers, which must survive JSON."""
    section: Callable[[dict[str, Any]], str]
    """Those numbers → Markdown: explanation first, then the tables."""
    measures: tuple[str, ...] = ("runner",)
    """Folders and files of this repository whose changes make the numbers old."""

    @property
    def file(self) -> Path:
        """Where the last result is kept."""
        return RESULTS / f"{self.name}.json"

    def run(self, arguments: Sequence[str]) -> Result:
        """Measure, with everything a reader needs to judge and repeat it."""
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks {self.name}")
        self.add_options(parser)
        options = parser.parse_args(arguments)
        about = {
            "benchmark": self.name,
            "command": " ".join([parser.prog, *arguments]),
            "date": date.today().isoformat(),
            "commit": git("rev-parse", "--short=12", "HEAD"),
            "machine": machine(),
            "versions": versions(),
        }
        return about | {"measured": self.measure(options)}

    def show(self, result: Result) -> str:
        """The section, and under it what it was measured on."""
        return f"{self.section(result['measured']).rstrip()}\n\n{_measured_on(result)}\n"


def alone(benchmark: Benchmark, arguments: Sequence[str]) -> None:
    """`python -m benchmarks.NAME`: print the section; `--json FILE` keeps the result, docs/ stays as it is."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path, metavar="FILE")
    own, rest = parser.parse_known_args(arguments)
    result = benchmark.run(rest)
    if own.json:
        write(own.json, result)
    print(benchmark.show(result))


def git(*words: str) -> str | None:
    """What git says in this repository; None where it is no clone, or git is not installed."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write(file: Path, result: Result) -> None:
    """One result as JSON, a list of numbers on one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}\"]*\]", lambda found: " ".join(found[0].split()), text)
    file.write_text(text + "\n", "utf-8")


def say(text: str) -> None:
    """A line for whoever waits; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others, numbers, to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def _measured_on(result: Result) -> str:
    on = result["machine"]
    facts = [on["cpu"], f"{on['cores']} cores"]
    facts += [f"{on['memory_gib']} GiB"] if on["memory_gib"] else []
    facts += [f"flags {', '.join(on['flags'])}"] if on["flags"] else []
    facts += [on["system"]]
    facts += [f"load average before the start {on['load_before']}"] if on["load_before"] is not None else []
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = f" at {result['commit']}" if result.get("commit") else ""
    return f"Measured on {result['date']}{commit} with `{result['command']}`: {'; '.join(facts)}. {packages}."
