"""Lines of `runner/` that the tests reach, in their own process and in the workers, launchers and pods they start."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, table

PYTEST = ("-m", "pytest", "-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder")

EXPLANATION = """\
## Lines that the tests reach

[coverage.py](https://coverage.readthedocs.io) follows {suites}, with every process that they start. A process that is
killed without warning, as many are here, writes nothing: what only such ones run counts as not reached.
By room: [ARCHITECTURE.md](../ARCHITECTURE.md#rooms). The files with most lines that nothing reaches:
"""
SHOWN = 12


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--slow`, `--data`."""
    parser.add_argument("--slow", action="store_true", help="the slow tests too")
    parser.add_argument("--data", type=Path, metavar="FILE", help="read this data file and run no test")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Statements and those that no test reached, by file."""
    suites = {"not slow": "the fast tests", "slow": "the slow tests"}
    if not options.slow:
        del suites["slow"]
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder) / "data"
        if options.data is None:
            for marks in suites:
                _coverage("run", *PYTEST, "-m", marks, data=data)
            _coverage("combine", "--quiet", data=data)
        report = Path(folder) / "report.json"
        _coverage("json", "--quiet", "-o", str(report), data=data)
        files = json.loads(report.read_text("utf-8"))["files"]
    found = {
        name.replace("\\", "/"): [file["summary"]["num_statements"], file["summary"]["missing_lines"]]
        for name, file in sorted(files.items())
    }
    return {"suites": " and ".join(suites.values()), "files": found}


def _coverage(*words: str, data: Path) -> None:
    environment = {**os.environ, "COVERAGE_FILE": str(data)}
    subprocess.run([sys.executable, "-m", "coverage", *words], cwd=ROOT, env=environment, check=True)


def section(measured: dict[str, Any]) -> str:
    """The whole, and the files with most lines that nothing reaches."""
    files = measured["files"]
    statements, missing = (sum(counts[i] for counts in files.values()) for i in (0, 1))
    most = sorted(files.items(), key=lambda item: -item[1][1])[:SHOWN]
    rows = [
        [f"`{name}`", f"{of:,}", f"{not_reached:,}", f"{1 - not_reached / of:.0%}"] for name, (of, not_reached) in most
    ]
    rows.insert(0, ["all of `runner/`", f"{statements:,}", f"{missing:,}", f"{1 - missing / statements:.1%}"])
    head = ["", "statements", "not reached", "reached"]
    return f"{EXPLANATION.format(suites=measured['suites'])}\n{table(head, rows)}\n"


BENCHMARK = Benchmark("coverage", add_options, measure, section, ("runner", "tests"))


if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
