"""Our worker against a bare PyTorch loop, packed against padded: on the CPU, taking turns."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bench import Benchmark, alone, quartiles, say, table
from benchmarks.turns import Loop, Step, take_turns
from runner.config.command_line import Request
from runner.resolve.steps import resolved
from runner.rundir.directory import RunDir
from runner.spec import RunSpec

WARMUP_STEPS = 2  # the first steps build oneDNN's kernels for every shape
BLOCK = 2  # steps of a turn
PADDED_BATCH = 4  # a packed sequence of 256 tokens holds about as many examples of `commands`
TARGET = 1.05

EXPLANATION = f"""\
## Throughput on a CPU

The default job: {{job}}.

{{steps}} optimiser steps of each loop, after {WARMUP_STEPS} that are not counted. Each loop is a separate process,
and the two that are compared take turns every {BLOCK} steps, so that the load of the machine affects both. The
time of a step is that from the end of the previous one, and includes batch, forward, backward, update and
log line. The ratio is that of the medians.
"""
WORKER = f"""\
### The worker against a bare PyTorch loop

The worker is `runner.train.worker.work`, unchanged. The bare loop, `benchmarks/loops.py`, is plain torch
written for exactly this run: the same model, adapter, batches, autocast, fused AdamW, clipping and
schedule, a head that sees labelled tokens only, and no logging. The target is at most {TARGET - 1:.0%} more time.
"""
SAME = """\
Both train on the same batches in the same order. The losses differ by at most {worst:.6f} in any step (mean
{mean:.3f}).
"""
PACKING = f"""\
### Packed against padded

Packed: one sequence of whole examples that do not attend to each other. Padded: {PADDED_BATCH} examples of the same
data, padded to the longest one. Effective tokens per second exclude padding.
"""
WAITING = """\
### Threads that spin against threads that sleep

Between two of the many thousand parallel loops of a step, a thread either spins until the next one (as
OpenMP does by itself) or gives its core away. On a quiet machine this shows the price of waking up again;
with another busy process beside it, how long all threads wait for the one that was put aside.
"""

Pair = tuple[list[Step], list[Step]]


@dataclass(frozen=True)
class Contestant:
    """One training loop: which, and how its run differs from the default job."""

    what: str
    overrides: tuple[str, ...] = ()
    kind: str = "worker"


@dataclass(frozen=True)
class Comparison:
    """Two loops, the first of which counts as 1."""

    text: str
    base: Contestant
    other: Contestant
    tables: Callable[[Comparison, Pair], str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--steps`, `--only`, `--with`."""
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each loop (default 30)")
    names = " ".join(DEFAULT)
    parser.add_argument("--only", nargs="+", choices=[*COMPARISONS], default=DEFAULT, help=f"default: {names}")
    parser.add_argument("--with", nargs="+", default=[], dest="extra", metavar="KEY=VALUE", help="change every run")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The steps of both loops of every comparison."""
    total = WARMUP_STEPS + options.steps
    extra = tuple(options.extra)
    measured = {}
    for name in options.only:
        say(f"throughput_cpu: {name}")
        with tempfile.TemporaryDirectory(prefix="runner-benchmark-") as folder:
            pair = [loop_of(c, extra, total, Path(folder)) for c in (COMPARISONS[name].base, COMPARISONS[name].other)]
            take_turns(pair, total, BLOCK)
            measured[name] = [columns(loop.steps[WARMUP_STEPS:]) for loop in pair]
    job = _job(spec_of(extra, total, Path("runs")))
    return {"job": job, "steps": options.steps, "comparisons": measured}


def loop_of(contestant: Contestant, extra: tuple[str, ...], total_steps: int, folder: Path) -> Loop:
    """The process of a contestant, its run in `folder`."""
    spec = spec_of((*extra, *contestant.overrides), total_steps, folder)
    return Loop(contestant.what, contestant.kind, RunDir.create(spec).path, spec.hw.env)


def spec_of(overrides: tuple[str, ...], total_steps: int, output_dir: Path) -> RunSpec:
    """The default job on the CPU, without the prompts it answers before and after."""
    ours = ("hw=cpu", f"train.max_steps={total_steps}", "eval.num_prompts=0", f"run.output_dir={output_dir}")
    return resolved(Request(overrides=(*ours, *overrides)))[0]


def _job(spec: RunSpec) -> str:
    """What all the loops share."""
    return (
        f"{spec.model.name}, {spec.method.name}, data {spec.data.name}, {spec.train.precision}, "
        f"{spec.train.attention} attention, sequences of {spec.train.max_length} tokens, "
        f"batch {spec.train.batch_size}, {spec.hw.num_cpus} threads"
    )


def columns(steps: list[Step]) -> dict[str, list[float]]:
    """The steps of a loop as JSON has them: a list per field."""
    return {field.name: [round(getattr(step, field.name), 6) for step in steps] for field in fields(Step)}


def steps_of(columns: dict[str, list[Any]]) -> list[Step]:
    """Those of `columns`."""
    return [Step(*values) for values in zip(*(columns[field.name] for field in fields(Step)), strict=True)]


def section(measured: dict[str, Any]) -> str:
    """Explanation and tables of every comparison that was made."""
    parts = [EXPLANATION.format(job=measured["job"], steps=measured["steps"])]
    for name, (base, other) in measured["comparisons"].items():
        comparison = COMPARISONS[name]
        parts += [comparison.text, comparison.tables(comparison, (steps_of(base), steps_of(other))), ""]
    return "\n".join(parts)


def _seconds(comparison: Comparison, pair: Pair) -> str:
    """Seconds per step, for loops that get the same batches: their ratio can be taken step by step too."""
    rows = []
    for contestant, steps in zip((comparison.base, comparison.other), pair, strict=True):
        low, middle, high = quartiles([step.seconds for step in steps])
        rate = median(step.tokens / step.seconds for step in steps)
        rows.append([contestant.what, f"{middle:.3f}", f"{low:.3f}–{high:.3f}", f"{rate:,.0f}"])
    base, other = ([step.seconds for step in steps] for steps in pair)
    low, _, high = quartiles([b / a for a, b in zip(base, other, strict=True)])
    rows[0] += ["1", ""]
    rows[1] += [f"**{median(other) / median(base):.3f}**", f"{low:.3f}–{high:.3f}"]
    head = ["", "median s per step", "middle half", "tokens/s", "time, ratio", "middle half, step by step"]
    return table(head, rows)


def _seconds_and_losses(comparison: Comparison, pair: Pair) -> str:
    """The same, and the proof that both loops did the same work."""
    losses = [(a.loss, b.loss) for a, b in zip(*pair, strict=True)]
    same = SAME.format(worst=max(abs(b - a) for a, b in losses), mean=sum(a for a, _ in losses) / len(losses))
    return f"{_seconds(comparison, pair)}\n\n{same}"


def _effective(comparison: Comparison, pair: Pair) -> str:
    """Real tokens per second, for loops whose batches differ."""
    rows, rates = [], []
    for contestant, steps in zip((comparison.base, comparison.other), pair, strict=True):
        tokens, positions = sum(step.tokens for step in steps), sum(step.positions for step in steps)
        low, rate, high = quartiles([step.tokens / step.seconds for step in steps])
        rates.append(rate)
        per_step = [f"{median(step.seconds for step in steps):.3f}", f"{tokens / len(steps):,.0f}"]
        padding = f"{1 - tokens / positions:.1%}"
        rows.append([contestant.what, *per_step, padding, f"{rate:,.0f}", f"{low:,.0f}–{high:,.0f}"])
    rows[0] += ["1"]
    rows[1] += [f"**{rates[1] / rates[0]:.3f}**"]
    head = ["", "median s per step", "tokens per step", "padding", "effective tokens/s", "middle half", "speed, ratio"]
    return table(head, rows)


PADDED = ("train.packing=false", f"train.batch_size={PADDED_BATCH}", f"train.micro_batch_size={PADDED_BATCH}")
COMPARISONS = {
    "worker": Comparison(
        WORKER, Contestant("bare PyTorch loop", kind="bare"), Contestant("our worker"), _seconds_and_losses
    ),
    "packing": Comparison(
        PACKING, Contestant("padded", PADDED), Contestant("packed", ("train.packing=true",)), _effective
    ),
    "waiting": Comparison(  # libgomp's own default is 300,000 turns of a loop, about 3 ms
        WAITING,
        Contestant("spinning", ("hw.env.GOMP_SPINCOUNT='300000'",)),
        Contestant("sleeping", ("hw.env.GOMP_SPINCOUNT='0'",)),
        _seconds,
    ),
}
DEFAULT = ("worker", "packing")
BENCHMARK = Benchmark("throughput_cpu", add_options, measure, section, measures=("runner/train",))

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
