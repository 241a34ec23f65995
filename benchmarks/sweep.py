"""What the runs of a sweep cost beside the same runs one by one: short ones, which are mostly start-up."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Benchmark, alone, quartiles, say, table
from tests.support.processes import tiny_model, words

RATES = ("1e-3", "2e-3", "3e-3")
SHORT = ("train.max_steps=3", "eval.num_prompts=0", "hw=cpu", "hw.num_cpus=1")
TARGET = 0.5
EXPLANATION = """\
## Sweeps

Three runs of three steps on this machine's CPU, without prompts: as three commands; as one sweep (`-m
train.learning_rate=1e-3,2e-3,3e-3`) whose runs start separately, as on GPUs (tiny model only); and as one sweep whose
runs are forked from a process that has loaded torch and transformers. The variants take turns. Whole processes and
their children are timed, with one thread each, since waiting threads count as CPU time. Losses are compared bit for
bit.
"""
WAYS = {"singly": "separate commands", "cold": "one sweep, separate processes", "sweep": "one sweep, forked"}
MODELS = {"tiny": ("a tiny model", ("singly", "cold", "sweep")), "smollm2": ("SmolLM2 135M, LoRA", ("singly", "sweep"))}
COLD = (
    "from runner.cli.main import main; from runner.launcher import warm_workers; "
    "warm_workers.can_fork = lambda spec: False; main()"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--repeats`, `--warm-ups` and `--models`."""
    parser.add_argument("--repeats", type=int, default=5, help="runs of each way (default 5)")
    parser.add_argument("--warm-ups", type=int, default=1, help="rounds before them that do not count (default 1)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: both")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every way, which must train the same; warm-up rounds (cold files, no cache) do not count."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_model(Path(folder) / "model")
        asked: dict[str, Callable[[Path], list[str]]] = {
            "tiny": lambda out: words(tiny, out, *SHORT),
            "smollm2": lambda out: ["model=smollm2_135m", "method=lora", f"run.output_dir={out}", *SHORT],
        }
        for model in options.models:
            found[model] = _measured(model, asked[model], Path(folder) / model, options)
    return {"models": found, "runs": len(RATES), "same_losses": True}


def _measured(
    model: str, asked: Callable[[Path], list[str]], folder: Path, options: argparse.Namespace
) -> dict[str, dict[str, list[float]]]:
    """Seconds by the clock and of the CPU, by way."""
    ways = MODELS[model][1]
    found: dict[str, dict[str, list[float]]] = {"wall": {way: [] for way in ways}, "cpu": {way: [] for way in ways}}
    for turn in range(1 - options.warm_ups, options.repeats + 1):
        losses = {}
        for way in ways:
            out = folder / f"{way}{turn}"
            began, used = time.perf_counter(), _cpu()
            for rate in RATES if way == "singly" else [",".join(RATES)]:
                start = ("-c", COLD) if way == "cold" else ("-m", "runner")
                swept = () if way == "singly" else ("-m",)
                _run(*start, *swept, *asked(out), f"train.learning_rate={rate}")
            if turn > 0:
                found["wall"][way].append(round(time.perf_counter() - began, 3))
                found["cpu"][way].append(round(_cpu() - used, 3))
            losses[way] = sorted(map(_losses, out.glob("*/metrics.jsonl")))
        if any(one != losses["singly"] for one in losses.values()) or len(losses["sweep"]) != len(RATES):
            raise RuntimeError(f"a sweep has other losses than its runs alone: {losses}")
        say(f"sweep: {model}, round {turn} of {options.repeats}: {found}")
    return found


def _cpu() -> float:
    """CPU seconds of all processes that have ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(*arguments: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))


def _losses(file: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in file.read_text("utf-8").splitlines()]


def section(measured: dict[str, Any]) -> str:
    """Seconds of every way and model, and the ratios of the forked sweep."""
    rows, said = [], []
    for model, seconds in measured["models"].items():
        title, ways = MODELS[model]
        for way in ways:
            wall, cpu = (quartiles(seconds[kind][way]) for kind in ("wall", "cpu"))
            each = f"{cpu[0]:.1f}–{cpu[2]:.1f}"
            rows.append([f"{title}: {WAYS[way]}", f"{wall[1]:.1f}", f"**{cpu[1]:.1f}**", each])
        ratios = {kind: _ratio(seconds[kind]) for kind in ("cpu", "wall")}
        against = f"target ≤ {TARGET}" + ("" if ratios["cpu"] <= TARGET else ", **missed**")
        said.append(
            f"{title[0].upper()}{title[1:]}: a forked sweep takes **{ratios['cpu']:.2f}** of the CPU time of a command "
            f"each ({against}), and {ratios['wall']:.2f} of the time by the clock."
        )
    head = [f"{measured['runs']} runs", "median, s", "median, CPU s", "middle half, CPU s"]
    return f"{EXPLANATION}\n{table(head, rows)}\n\n" + "\n".join(said) + "\nThe losses are the same."


def _ratio(seconds: dict[str, list[float]]) -> float:
    """Median of the rounds' own ratios: what is slow in one round is slow for all its ways."""
    pairs = zip(seconds["sweep"], seconds["singly"], strict=True)
    return quartiles([swept / alone for swept, alone in pairs])[1]


BENCHMARK = Benchmark(
    "sweep", add_options, measure, section, measures=("runner/train", "runner/launcher", "runner/runs")
)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
