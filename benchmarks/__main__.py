"""`python -m benchmarks [NAME [OPTIONS]]`: measure one or all, keep the results, write docs/benchmarks.md.

The accuracy of the plan's memory goes to docs/planning.md, where its formulas are; which method runs on which ZeRO
stage to docs/compatibility.md; what killing runs does to them to docs/reliability.md. `--docs` only writes the pages
again from the results that are there. `--age` says how old every result and every price is, by days and by commits to
what it measures, and exits with 1 where one is too old for a release. `python -m benchmarks.NAME [--json FILE]`
measures without touching either.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import (
    age,
    attention,
    chaos,
    chaos_agents,
    chaos_cloud,
    chaos_pods,
    coverage,
    data,
    gpu,
    main_job,
    matrix,
    matrix_page,
    memory_accuracy,
    mutants,
    objectives,
    peers,
    reliability_page,
    startup,
    sweep,
    throughput_cpu,
)
from benchmarks.bench import ROOT, write
from docs.generate import planning_page

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        main_job,
        startup,
        sweep,
        throughput_cpu,
        gpu,
        attention,
        peers,
        data,
        objectives,
        memory_accuracy,
        matrix,
        chaos,
        chaos_cloud,
        chaos_agents,
        chaos_pods,
        mutants,
        coverage,
    )
}  # fmt: skip
ELSEWHERE = {"memory_accuracy", "matrix", "chaos", "chaos_cloud", "chaos_agents", "chaos_pods"}
"""Shown on pages of their own."""
PAGE = ROOT / "docs" / "benchmarks.md"

INTRO = """\
<!-- Written by `python -m benchmarks` from benchmarks/results/: run it again instead of editing. -->

# Benchmarks

Measurements behind the claims of the README. `python -m benchmarks` (or `make bench`) repeats all but `gpu`,
`coverage` and `peers` (which installs LLaMA-Factory) on your machine and rewrites this page;
`python -m benchmarks NAME` repeats one: {names}.
The accuracy of the plan's memory (`memory_accuracy`) is in [planning.md](planning.md#accuracy).

A median is given with its middle half (25th to 75th percentile), which is wide if the machine was busy.
"""


def page() -> str:
    """docs/benchmarks.md, from the results that are there."""
    sections = [
        benchmark.show(json.loads(benchmark.file.read_text("utf-8")))
        for benchmark in BENCHMARKS.values()
        if benchmark.file.is_file() and benchmark.name not in ELSEWHERE
    ]
    if not gpu.BENCHMARK.file.is_file():
        sections.append(gpu.NOT_MEASURED)
    names = ", ".join(
        f"`{name}`" if benchmark.file.is_file() else f"`{name}` (not measured yet)"
        for name, benchmark in BENCHMARKS.items()
    )
    return "\n".join([INTRO.format(names=names), *sections])


def pages() -> Iterator[tuple[Path, str]]:
    """Every page that is made from results, and what it says now."""
    yield PAGE, page()
    yield planning_page.PAGE, planning_page.page()
    if matrix.BENCHMARK.file.is_file():
        result = json.loads(matrix.BENCHMARK.file.read_text("utf-8"))
        yield matrix_page.PAGE, matrix_page.page(result, matrix.BENCHMARK.show(result))
    yield reliability_page.PAGE, reliability_page.page()


def main(arguments: list[str]) -> int:
    """Exit code 0, or 2 for a name that is not there."""
    name, *options = arguments or ["all"]
    if name in ("-h", "--help"):
        print(__doc__, f"NAME is one of: {', '.join(BENCHMARKS)}.", sep="\n")
        return 0
    if name == "--age":
        found: list[age.Age | age.PriceAge] = [*age.ages(BENCHMARKS.values()), *age.prices()]
        print(*found, sep="\n")
        return int(any(one.old for one in found))
    if name not in {"all", "--docs", *BENCHMARKS}:
        print(f"there is no benchmark {name}; there are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    if name != "--docs":
        chosen = (
            [b for b in BENCHMARKS.values() if b not in (gpu.BENCHMARK, coverage.BENCHMARK, peers.BENCHMARK)]
            if name == "all"
            else [BENCHMARKS[name]]
        )
        for benchmark in chosen:
            write(benchmark.file, benchmark.run(options))
    for file, text in pages():
        before = file.read_text("utf-8") if file.is_file() else ""
        file.write_text(text, "utf-8")
        print(f"written: {file.relative_to(ROOT)}", *changes(before, text), sep="\n")
    return 0


def changes(before: str, after: str) -> list[str]:
    """Lines of a page that say something else now, old and new, without those on what was measured where."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    said = [line for line in lines if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    return [f"  {line}" for line in said if line[1:].strip() and not line[1:].startswith("Measured on ")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
