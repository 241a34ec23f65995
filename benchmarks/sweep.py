"""What the runs of a sweep cost beside the same runs one by one: short ones, which are mostly start-up."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, quartiles, say, table
from tests.processes import tiny_model, words

RATES = ("1e-3", "2e-3", "3e-3")
STEPS = "train.max_steps=3"
TARGET = 0.5
EXPLANATION = """\
## Sweeps

Three runs of three steps of a tiny model on this machine's CPU: each with a command of its own, and as one sweep
(`-m train.learning_rate=1e-3,2e-3,3e-3`), whose runs are forked from one process that has torch and transformers
loaded. The two take turns; whole processes are timed. Every loss is compared to the last bit.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--repeats`."""
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way (default 5)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both ways, which must train the same; the first round (cold files, no cache) does not count."""
    seconds: dict[str, list[float]] = {"singly": [], "sweep": []}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model")
        for turn in range(options.repeats + 1):
            found = {}
            for way in seconds:
                out = Path(folder) / f"{way}{turn}"
                began = time.perf_counter()
                for rate in RATES if way == "singly" else [",".join(RATES)]:
                    _run(*([] if way == "singly" else ["-m"]), *words(model, out, STEPS, f"train.learning_rate={rate}"))
                if turn:
                    seconds[way].append(round(time.perf_counter() - began, 3))
                found[way] = sorted(map(_losses, out.glob("*/metrics.jsonl")))
            if found["singly"] != found["sweep"] or len(found["sweep"]) != len(RATES):
                raise RuntimeError(f"a sweep has other losses than its runs alone: {found}")
            say(f"sweep: round {turn} of {options.repeats}")
    return {"seconds": seconds, "runs": len(RATES), "same_losses": True}


def _run(*arguments: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "runner", *arguments], cwd=ROOT, env=env, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))


def _losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text("utf-8").splitlines()]


def section(measured: dict[str, Any]) -> str:
    """Seconds of both ways and their ratio."""
    singly, sweep = (quartiles(measured["seconds"][way]) for way in ("singly", "sweep"))
    rows = [
        [what, f"**{middle:.1f}**", f"{low:.1f}–{high:.1f}"]
        for what, (low, middle, high) in (("a command each", singly), ("one sweep", sweep))
    ]
    ratio = sweep[1] / singly[1]
    against = f"target ≤ {TARGET}" + ("" if ratio <= TARGET else ", **missed**")
    lines = table([f"{measured['runs']} runs", "median, s", "middle half"], rows)
    said = f"The sweep takes **{ratio:.2f}** of the time ({against}); the losses are the same."
    return f"{EXPLANATION}\n{lines}\n\n{said}"


BENCHMARK = Benchmark("sweep", add_options, measure, section)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
