"""The main job, `python -m runner`, as the README shows it: whole runs with several seeds."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, say, table
from runner.rundir.directory import RunDir

SEEDS = (42, 43, 44)
"""The first is the default, and the run that the README shows."""

EXPLANATION = """\
## The main job

`python -m runner` and nothing else: the default recipe on this CPU, the whole of it (loading, held-out answers before
and after, training, saving), once with each seed. The held-out prompts share no sentence with the training rows.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--seeds`."""
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What `summary.json` of each run says."""
    with tempfile.TemporaryDirectory(prefix="runner-benchmark-") as folder:
        return {"runs": [_run(Path(folder) / str(seed), seed) for seed in options.seeds]}


def _run(folder: Path, seed: int) -> dict[str, Any]:
    say(f"main_job: seed {seed}")
    words = [f"train.seed={seed}", f"run.output_dir={folder}"]
    subprocess.run([sys.executable, "-m", "runner", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    summary = RunDir(run).summary
    return {
        "seed": seed,
        "eval": summary["eval"],
        "train": summary["train"],
        "seconds": summary["seconds"],
        "peak_memory_gib": summary["peak_memory_gib"],
        "plan": summary["plan"],
    }


def section(measured: dict[str, Any]) -> str:
    """A row for each seed."""
    runs: Sequence[dict[str, Any]] = measured["runs"]
    rows = [
        [
            str(run["seed"]),
            " → ".join(f"{run['eval'][when]['num_exact']} of {run['eval'][when]['num_prompts']}" for when in WHEN),
            " → ".join(f"{run['eval'][when]['loss']:.4f}" for when in WHEN),
            f"{run['train']['tokens_per_second']:.0f}",
            f"{run['train']['seconds']:.0f}",
            f"{run['seconds']:.0f}",
            f"{run['peak_memory_gib']:.2f}",
        ]
        for run in runs
    ]
    head = ["seed", "answered exactly", "held-out loss", "tokens/s", "training, s", "whole run, s", "peak, GiB"]
    said = "; ".join(
        f"{name} {runs[0]['plan'][key]['predicted']:.{digits}f} {unit} predicted, "
        f"{median(run['plan'][key]['measured'] for run in runs):.{digits}f} measured"
        for name, key, unit, digits in PLANNED
    )
    return f"{EXPLANATION}\n{table(head, rows)}\n\nThe plan beside the median: {said}.\n"


WHEN = ("before", "after")
PLANNED = (("memory", "peak_gib", "GiB", 2), ("speed", "tokens_per_second", "tokens/s", 0), ("time", "seconds", "s", 0))
BENCHMARK = Benchmark("main_job", add_options, measure, section)


if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
