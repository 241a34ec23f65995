"""`python -m benchmarks [NAME [OPTIONS]]`: measure one or all, keep the results, write docs/benchmarks.md.

The accuracy of the plan's memory goes to docs/planning.md, where its formulas are.
`--docs` only writes both pages again from the results that are there. `python -m benchmarks.NAME
[--json FILE]` measures without touching either.
"""

from __future__ import annotations

import json
import sys

from benchmarks import memory_accuracy, startup, throughput_cpu
from benchmarks.bench import ROOT, write
from runner.report import planning_page

BENCHMARKS = {b.name: b for b in (startup.BENCHMARK, throughput_cpu.BENCHMARK, memory_accuracy.BENCHMARK)}
PAGE = ROOT / "docs" / "benchmarks.md"

INTRO = """\
<!-- Written by `python -m benchmarks` from benchmarks/results/: run it again instead of editing. -->

# Benchmarks

What the README claims, measured. `python -m benchmarks` (or `make bench`) repeats everything on your
machine and writes this page again; `python -m benchmarks NAME` repeats one of them: {names}.
How exact the plan's memory is (`memory_accuracy`) stands in [planning.md](planning.md#how-exact-is-it).

A median stands with its middle half (25th to 75th percentile): where that is wide, the machine was not
quiet.
"""


def page() -> str:
    """docs/benchmarks.md, from the results that are there."""
    sections = [
        benchmark.show(json.loads(benchmark.file.read_text("utf-8")))
        for benchmark in BENCHMARKS.values()
        if benchmark.file.is_file() and benchmark is not memory_accuracy.BENCHMARK
    ]
    names = ", ".join(f"`{name}`" for name in BENCHMARKS)
    return "\n".join([INTRO.format(names=names), *sections])


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 for a name that is not there."""
    name, *options = arguments or ["all"]
    if name in ("-h", "--help"):
        print(__doc__, f"NAME is one of: {', '.join(BENCHMARKS)}.", sep="\n")
        return 0
    if name not in {"all", "--docs", *BENCHMARKS}:
        print(f"there is no benchmark {name}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if name != "--docs":
        for benchmark in BENCHMARKS.values() if name == "all" else [BENCHMARKS[name]]:
            write(benchmark.file, benchmark.run(options))
    for file, text in ((PAGE, page()), (planning_page.PAGE, planning_page.page())):
        file.write_text(text, "utf-8")
        print(f"written: {file.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
