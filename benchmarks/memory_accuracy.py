"""The plan's memory against the worker's own model and step on fake tensors, side by side."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from itertools import product
from statistics import mean
from typing import Any

from benchmarks.bench import Benchmark, alone, say
from runner.config.command_line import Request
from runner.plan.choose_stage import job_of
from runner.plan.memory import GIB, memory
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.resolve.steps import resolved
from runner.spec import RunSpec

MODELS = ("phi2", "llama2_7b", "mistral7b", "llama3_8b", "llama2_13b", "llama2_70b")
METHODS = ("full", "freeze", "lora")
LENGTHS = (512, 2048, 4096)
MICRO_BATCHES = (1, 4)
NO_TENSOR = ("process", "collectives", "allocator_slack")
TARGET_MEAN, TARGET_WORST = 3.0, 8.0

EXPLANATION = f"""\
## Memory, predicted against simulated

Simulated: the model that `runner.train` builds, with its adapter, TRL's loss and torch's fused AdamW, takes two
steps on fake tensors (`benchmarks/simulate.py`); the second one's peak is shown. Predicted: `plan`, from sizes
alone. Both without what no tensor shows (CUDA context, allocator slack). bf16 arithmetic, FlashAttention, fp32 where
weights train; a batch of b sequences of s tokens, every token with a label. The target: a mean error of
{TARGET_MEAN:.0f}% and no error beyond {TARGET_WORST:.0f}%.

**Mean absolute error {{mean:.2f}}%, worst {{worst:+.2f}}% ({{where}}), over {{count}} runs.** The simulation took
{{simulated:.1f}} s a run, the prediction {{predicted:.1f}} ms.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--models`, `--methods`, `--lengths`."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both peaks of every combination that the model's context allows."""
    warnings.filterwarnings("ignore")
    rows = []
    cases = product(options.models, options.methods, options.lengths, MICRO_BATCHES, (True, False))
    for model, method, length, micro, checkpointing in cases:
        if model == "phi2" and length > 2048:
            continue
        row = compare(spec_of(model, method, length, micro, checkpointing))
        rows.append({"model": model, "method": method, "s": length, "b": micro, "ckpt": checkpointing, **row})
        say(f"{model} {method} s {length} b {micro} ckpt {checkpointing}: {row['error']:+.2f}%")
    return {"rows": rows}


def spec_of(model: str, method: str, length: int, micro: int, checkpointing: bool) -> RunSpec:
    """One run on hardware that is large enough not to matter."""
    overrides = (
        f"model={model}", f"method={method}", "hw=h200", f"train.max_length={length}",
        f"train.micro_batch_size={micro}", f"train.batch_size={micro}", "train.liger=false",
        f"train.gradient_checkpointing={str(checkpointing).lower()}", "train.attention=flash_attention_2",
    )  # fmt: skip
    return resolved(Request(overrides=overrides))[0]


def compare(spec: RunSpec) -> dict[str, Any]:
    """Peak phases and bytes of one run, predicted and simulated."""
    from benchmarks.simulate import simulate  # torch: 5 s

    started = time.perf_counter()
    simulated = simulate(spec)
    between = time.perf_counter()
    predicted = tensors(spec)
    ended = time.perf_counter()
    phase = max(predicted, key=lambda name: predicted[name])
    theirs = max(simulated.peaks, key=lambda name: simulated.peaks[name])
    return {
        "predicted_gib": round(predicted[phase] / GIB, 3),
        "simulated_gib": round(simulated.peak / GIB, 3),
        "error": round(100 * (predicted[phase] / simulated.peak - 1), 3),
        "phase": phase,
        "simulated_phase": theirs,
        "simulated_s": round(between - started, 2),
        "predicted_ms": round(1000 * (ended - between), 2),
    }


def tensors(spec: RunSpec) -> dict[str, float]:
    """The plan's bytes per phase of a step, without what no tensor shows."""
    assert spec.train.precision != "auto"
    training = training_of(shape_of(spec.model), spec.method, spec.train.precision, deepspeed=False)
    phases = memory(training, job_of(spec), int(spec.train.micro_batch_size), int(spec.train.accumulation_steps)).phases
    shown = ("forward", "backward", "step")
    return {name: sum(v for k, v in phases[name].items() if k not in NO_TENSOR) for name in shown}


def section(measured: dict[str, Any]) -> str:
    """The summary."""
    rows = measured["rows"]
    worst = max(rows, key=lambda row: abs(row["error"]))
    return EXPLANATION.format(
        mean=mean(abs(row["error"]) for row in rows),
        worst=worst["error"],
        where=f"{worst['model']} {worst['method']}, s {worst['s']}, b {worst['b']}",
        count=len(rows),
        simulated=mean(row["simulated_s"] for row in rows),
        predicted=mean(row["predicted_ms"] for row in rows),
    )


BENCHMARK = Benchmark("memory_accuracy", add_options, measure, section, measures=("runner/plan",))

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
