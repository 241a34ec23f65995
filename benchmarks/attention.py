"""Attention over documents against what a CPU took before: the worker with packed rows, taking turns."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bench import Benchmark, alone, quartiles, say, table
from benchmarks.throughput_cpu import BLOCK, WARMUP_STEPS, Contestant, columns, loop_of, spec_of, steps_of
from benchmarks.turns import Step, take_turns
from runner.paths import CONF

BEFORE = {256: "eager", 512: "eager", 1024: "sdpa", 2048: "sdpa"}
"""What `train.attention=auto` took on a CPU, by the tokens of a packed row, before there was `varlen`."""
ROWS, SEED = 600, 0
WORDS = 70, 0.6
"""Median of an answer's words, and the spread of its logarithm."""
TARGETS = {1024: 1.25, 2048: 1.7}

EXPLANATION = f"""\
## Attention over documents, on a CPU

Packed rows of short instructions ({ROWS} made-up rows of common words, answers of {WORDS[0]} words in the median,
spread log-normally) under `train.attention=varlen` and under what `auto` took before: eager attention up to 512
tokens, SDPA with a mask beyond. {{job}}. {{steps}} optimiser steps of each, after {WARMUP_STEPS} that are not
counted, in processes of their own that take turns every {BLOCK} steps and get the same batches. The target:
{TARGETS[1024]} × at 1 × 1,024, {TARGETS[2048]} × at 1 × 2,048, and never slower.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--steps`, `--lengths`."""
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each loop (default 12)")
    parser.add_argument("--lengths", nargs="+", type=int, choices=[*BEFORE], default=[*BEFORE])


def common_words() -> list[str]:
    """Common words."""
    texts = [page.read_text("utf-8") for page in sorted((CONF / "data").glob("*.yaml"))]
    return sorted({word.lower() for text in texts for word in text.split() if word.isalpha()})


def rows(file: Path) -> None:
    """Write the rows, the same every time."""
    draw, words = random.Random(SEED), common_words()
    with file.open("w", encoding="utf-8") as out:
        for _ in range(ROWS):
            count = min(600, max(5, round(draw.lognormvariate(0, WORDS[1]) * WORDS[0])))
            asked, answer = (" ".join(draw.choice(words) for _ in range(n)) for n in (12, count))
            out.write(json.dumps({"instruction": asked, "output": answer}) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The steps of both, by the length of a row."""
    total = WARMUP_STEPS + options.steps
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="runner-benchmark-") as folder:
        file = Path(folder) / "rows.jsonl"
        rows(file)
        for length in options.lengths:
            say(f"attention: {length} tokens")
            job = (
                "data=file",
                f"data.path={file}",
                f"train.max_length={length}",
                "train.packing=true",
                "train.batch_size=1",
            )
            contestants = [Contestant(name, (f"train.attention={name}",)) for name in (BEFORE[length], "varlen")]
            pair = [loop_of(contestant, job, total, Path(folder)) for contestant in contestants]
            take_turns(pair, total, BLOCK)
            measured[str(length)] = [columns(loop.steps[WARMUP_STEPS:]) for loop in pair]
    spec = spec_of((), total, Path("runs"))
    shared = f"{spec.model.title}, {spec.method.name}, {spec.train.precision}, {spec.hw.num_cpus} threads"
    return {"job": shared, "steps": options.steps, "lengths": measured}


def _row(length: int, before: list[Step], now: list[Step]) -> list[str]:
    """One length: real tokens per second of both, the ratio step by step, the furthest losses."""
    ratios = [a.seconds / b.seconds for a, b in zip(before, now, strict=True)]
    low, middle, high = quartiles(ratios)
    speeds = [sum(step.tokens for step in steps) / sum(step.seconds for step in steps) for steps in (before, now)]
    apart = max(abs(a.loss - b.loss) for a, b in zip(before, now, strict=True))
    target = f"{TARGETS[length]}" if length in TARGETS else "1"
    return [
        f"1 × {length:,}", BEFORE[length], *(f"{speed:,.0f}" for speed in speeds), f"**{middle:.2f}**",
        f"{low:.2f}–{high:.2f}", target, f"{apart:.4f}",
    ]  # fmt: skip


def section(measured: dict[str, Any]) -> str:
    """Explanation and one row per length."""
    head = ["row", "before", "tokens/s before", "with varlen", "speed, ratio", "middle half", "target", "losses apart"]
    body = [_row(int(n), *(steps_of(c) for c in pair)) for n, pair in measured["lengths"].items()]
    return EXPLANATION.format(job=measured["job"], steps=measured["steps"]) + "\n" + table(head, body)


MEASURES = ("runner/train/varlen_attention.py", "runner/train/varlen_kernels.py")
BENCHMARK = Benchmark("attention", add_options, measure, section, measures=MEASURES)

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
