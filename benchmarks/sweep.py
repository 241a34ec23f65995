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
from tests.support.processes import tiny_model, words

RATES = ("1e-3", "2e-3", "3e-3")
STEPS = "train.max_steps=3"
TARGET = 0.5
EXPLANATION = """\
## Sweeps

Three runs of three steps of a tiny model on this machine's CPU: each with a command of its own; as one sweep
(`-m train.learning_rate=1e-3,2e-3,3e-3`) whose runs start from nothing, as they do on GPUs; and as one whose runs are
forked from a process that has torch and transformers loaded. The three take turns; whole processes are timed. Every
loss is compared to the last bit.
"""
WAYS = {"singly": "a command each", "cold": "one sweep, each run from nothing", "sweep": "one sweep, forked"}
COLD = (
    "from runner.cli.main import main; from runner.launcher import warm_workers; "
    "warm_workers.can_fork = lambda spec: False; main()"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--repeats`."""
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way (default 5)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way, which must train the same; the first round (cold files, no cache) does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model")
        for turn in range(options.repeats + 1):
            found = {}
            for way in seconds:
                out = Path(folder) / f"{way}{turn}"
                began = time.perf_counter()
                for rate in RATES if way == "singly" else [",".join(RATES)]:
                    start = ("-c", COLD) if way == "cold" else ("-m", "runner")
                    swept = () if way == "singly" else ("-m",)
                    _run(*start, *swept, *words(model, out, STEPS, f"train.learning_rate={rate}"))
                if turn:
                    seconds[way].append(round(time.perf_counter() - began, 3))
                found[way] = sorted(map(_losses, out.glob("*/metrics.jsonl")))
            if any(losses != found["singly"] for losses in found.values()) or len(found["sweep"]) != len(RATES):
                raise RuntimeError(f"a sweep has other losses than its runs alone: {found}")
            say(f"sweep: round {turn} of {options.repeats}")
    return {"seconds": seconds, "runs": len(RATES), "same_losses": True}


def _run(*arguments: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))


def _losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text("utf-8").splitlines()]


def section(measured: dict[str, Any]) -> str:
    """Seconds of every way, and the ratio of the sweeps."""
    found = {way: quartiles(measured["seconds"][way]) for way in WAYS}
    rows = [[WAYS[way], f"**{middle:.1f}**", f"{low:.1f}–{high:.1f}"] for way, (low, middle, high) in found.items()]
    ratio = found["sweep"][1] / found["cold"][1]
    against = f"target ≤ {TARGET}" + ("" if ratio <= TARGET else ", **missed**")
    lines = table([f"{measured['runs']} runs", "median, s", "middle half"], rows)
    said = f"Forking takes **{ratio:.2f}** of a sweep's time ({against}); the losses are the same."
    return f"{EXPLANATION}\n{lines}\n\n{said}"


BENCHMARK = Benchmark(
    "sweep", add_options, measure, section, measures=("runner/train", "runner/launcher", "runner/runs")
)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
