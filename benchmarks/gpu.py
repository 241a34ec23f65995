"""One command on a GPU: the plan's memory and speed beside what real runs measure, MFU, kernels, and a bare loop.

    python -m benchmarks gpu --minutes 8

Every case is `python -m runner …` itself, on a model of the catalogue's sizes with random weights; no network. The
cases come most valuable first, and one that does not end before the time is up is not begun. What was measured is
kept in .gpu-benchmark/ as it comes: the same command goes on where it stopped, for the same commit and GPU.
`--tiny` takes models of 64 hidden units, so that all of it runs on a CPU within a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import profiled_step
from benchmarks.bench import ROOT, Benchmark, alone, git, say, table
from benchmarks.turns import Loop
from runner.plan.model_shape import shape_of
from runner.plan.step_time import flops_per_token
from runner.plan.trainable import training_of
from runner.rundir.directory import RunDir

MODELS = ("mistral7b", "llama3_8b", "phi2")
METHODS = ("lora", "full", "qlora4", "qlora8", "freeze")
LENGTHS = (4096, 1024)
PHI2_CONTEXT = 2048
STEPS, WARMUP = 8, profiled_step.STEP
"""Steps of a run; those that count come after `WARMUP`, the last of which was profiled."""
BATCH = 4
"""Sequences of a step, packed; how many are computed at once the plan decides."""
KEPT = ROOT / ".gpu-benchmark"
MATRIX = 8192
NOT_MEASURED = """\
## On a GPU

Not measured yet: `python -m benchmarks gpu` on a machine with an NVIDIA GPU writes this section. It runs three
models, five methods and two lengths, as far as `--minutes` permits, and compares them with the plan.
"""
EXPLANATION = """\
## On a GPU

{device}, CUDA {cuda}. Random weights of the catalogue's sizes; packed rows of random words, {mean} tokens on average;
{batch} sequences a step. Every line is a run of the real command. Tokens/s is the median of the steps after the
first {warmup}. MFU counts the operations that the model needs (nothing twice, attention within documents), as a share
of {peak:.1f} TFLOP/s, which a bf16 product of two {matrix}² matrices reached just before. The bare loop is
`benchmarks/loops.py`: the same model, batches and attention, nothing logged.
"""


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    method: str
    length: int

    @property
    def name(self) -> str:
        """Name of its file in `KEPT`, without `.json`."""
        return f"{self.model}-{self.method}-{self.length}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--minutes`, `--models`, `--methods`, `--lengths`, `--tiny`, `--no-bare`, `--fresh`."""
    parser.add_argument("--minutes", type=float, default=30, help="begin no case after this time (default 30)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--tiny", action="store_true", help="models of 64 hidden units, for a CPU")
    parser.add_argument("--no-bare", action="store_true", help="without the bare loop")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Most valuable first: one model with every method at the longest length, then the lengths, then the models."""
    for model, length, method in product(options.models, options.lengths, options.methods):
        yield Case(model, method, min(length, PHI2_CONTEXT) if model == "phi2" else length)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every case that the time was enough for; SystemExit without a GPU, but for `--tiny`."""
    deadline = time.monotonic() + 60 * options.minutes
    if options.fresh:
        shutil.rmtree(KEPT, ignore_errors=True)
    peak = _matmul_peak(256 if options.tiny else MATRIX)
    if peak["device"] == "CPU" and not options.tiny:
        raise SystemExit("torch sees no GPU here; --tiny runs the same code on a CPU")
    about = {"commit": git("rev-parse", "HEAD"), "device": peak["device"], "tiny": options.tiny}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="runner-gpu-") as folder:
        made: Path | None = None
        for case in dict.fromkeys(cases(options)):
            kept = KEPT / f"{case.name}.json"
            row = _known(kept, about)
            if row is None:
                if time.monotonic() > deadline:
                    say(f"gpu: no time for {case.name}; the same command goes on there")
                    continue
                model = Path(folder) / case.model
                if made != model:  # one at a time: 14 GB of a 7B
                    if made:
                        shutil.rmtree(made)
                    _python("benchmarks.random_model", case.model, str(model), *(["--tiny"] if options.tiny else []))
                    made = model
                row = _measure(case, model, Path(folder), bare=not options.no_bare, tiny=options.tiny)
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps({**about, "row": row}), "utf-8")
            say(f"gpu: {case.name}: {_in_words(row)}")
            rows.append(row)
    return {**peak, "tiny": options.tiny, "matrix": 256 if options.tiny else MATRIX, "rows": rows}


def _known(file: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier start of this benchmark measured, of the same commit and GPU."""
    if not file.is_file():
        return None
    kept: dict[str, Any] = json.loads(file.read_text("utf-8"))
    row: dict[str, Any] = kept.pop("row")
    return row if kept == about else None


def _matmul_peak(size: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_python("benchmarks.matmul_peak", str(size)))
    return found


def _python(module: str, *words: str) -> str:
    """Standard output of a module of ours in a process of its own, which gives its GPU memory back."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, env=_environment(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def _measure(case: Case, model: Path, folder: Path, *, bare: bool, tiny: bool) -> dict[str, Any]:
    """One run of the command, or why there is none."""
    from benchmarks.random_model import write_rows  # torch

    rows, out = folder / f"rows-{case.length}.jsonl", folder / "runs"
    length = min(case.length, 128) if tiny else case.length
    mean = write_rows(rows, 2 * STEPS * BATCH * length, length)
    shutil.rmtree(out, ignore_errors=True)
    words = (
        "model=hub", f"model.id={model}", f"method={case.method}", "deepspeed=none", "data=file",
        f"data.path={rows}", "data.eval_fraction=0", f"train.max_length={length}", f"train.batch_size={BATCH}",
        "train.packing=true", f"train.max_steps={STEPS}", "eval.num_prompts=0", f"run.output_dir={out}",
        "--config-dir", str(_profiling(folder)), "track=profiled_step",
    )  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "runner", *words], cwd=folder, env=_environment(), capture_output=True, text=True
    )
    about = {**asdict(case), "mean_document": mean, "seconds": round(time.monotonic() - began, 1)}
    found = sorted(out.glob("*/spec.json"))
    if done.returncode or not found:
        return {**about, "exit_code": done.returncode, "reason": _reason(done.stdout + done.stderr)}
    run = RunDir(found[0].parent)
    row = {**about, **_measured(run, mean)}
    if bare:
        row["bare_tokens_per_second"] = _bare(run)
    shutil.rmtree(out, ignore_errors=True)
    return row


def _profiling(folder: Path) -> Path:
    """A folder of choices with `track=profiled_step`, as a user adds a tracker."""
    own = folder / "conf"
    (own / "track").mkdir(parents=True, exist_ok=True)
    code = f"{profiled_step.__file__}:ProfiledStep"
    (own / "track" / "profiled_step.yaml").write_text(f"name: own\ncode: {code}\n", "utf-8")
    return own


def _reason(text: str) -> str:
    """The first mistake, or the first line that speaks of memory, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["ended without output"]
    said = [line for line in lines if line.startswith("•") or "memory" in line or "GiB" in line] or lines[-1:]
    return said[0].lstrip("• ")[:200]


def _measured(run: RunDir, mean_document: int) -> dict[str, Any]:
    """Speed, MFU, kernels, and the plan beside the memory of each phase."""
    spec, summary = run.spec, json.loads((run.path / "summary.json").read_text("utf-8"))
    environment = json.loads((run.path / "environment.json").read_text("utf-8"))
    steps = [line for line in run.metrics() if line["step"] > WARMUP]
    assert spec.train.precision != "auto"
    shape = shape_of(spec.model)
    training = training_of(shape, spec.method, spec.train.precision, deepspeed=False)
    flops = flops_per_token(
        shape, mean_document,
        method=training.method, trained_layers=training.trained_layers, backward_layers=training.backward_layers,
        adapter_parameters=training.adapter_weights, checkpointing=False,
    )  # fmt: skip
    speed = median(line["effective_tokens_per_second"] for line in steps)
    kernels = run.path / profiled_step.FILE
    return {
        "tokens_per_second": round(speed, 1),
        "model_tflops": round(speed * flops / 1e12, 6),
        "micro_batch": spec.train.micro_batch_size,
        "checkpointing": spec.train.gradient_checkpointing,
        "precision": spec.train.precision,
        "attention": environment["attention"],
        "loss": [steps[0]["loss"], steps[-1]["loss"]],
        "plan": {key: summary["plan"][key] for key in ("peak_gib", "phases", "tokens_per_second")},
        "kernels": json.loads(kernels.read_text("utf-8")) if kernels.is_file() else [],
    }


def _bare(run: RunDir) -> float | None:
    """Median tokens/s of the bare loop on the same run; None where it fails (mostly: memory)."""
    loop = Loop("bare loop", "bare", run.path, run.spec.hw.env)
    try:
        loop.start()
        loop.turn(STEPS)
    except RuntimeError as error:
        say(f"gpu: {str(error).splitlines()[-1]}")
        return None
    finally:
        loop.stop()
    return round(median(step.tokens / step.seconds for step in loop.steps[WARMUP:]), 1)


def _in_words(row: Mapping[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    return f"{row['tokens_per_second']:,.0f} tokens/s, {row['plan']['peak_gib']['measured']:.1f} GiB"


def section(measured: dict[str, Any]) -> str:
    """Table of the runs, and what did not run."""
    ran = [row for row in measured["rows"] if "reason" not in row]
    head = [
        "model", "method", "tokens", "micro batch", "attention", "GiB predicted", "measured", "error",
        "tokens/s predicted", "measured", "error", "MFU", "× bare loop",
    ]  # fmt: skip
    lines = []
    for row in ran:
        memory, speed = row["plan"]["peak_gib"], row["plan"]["tokens_per_second"]
        bare = row.get("bare_tokens_per_second")
        lines.append([
            row["model"], row["method"], f"{row['length']}", f"{row['micro_batch']}", row["attention"],
            _number(memory["predicted"], ".2f"), _number(memory["measured"], ".2f"), _number(memory["error"], "+.1%"),
            _number(speed["predicted"], ",.0f"), f"{row['tokens_per_second']:,.0f}", _number(speed["error"], "+.0%"),
            f"{row['model_tflops'] / measured['tflops']:.0%}", _number(bare and row["tokens_per_second"] / bare, ".2f"),
        ])  # fmt: skip
    mean = ran[0]["mean_document"] if ran else 0
    text = EXPLANATION.format(
        device=measured["device"], cuda=measured["cuda"], mean=mean, batch=BATCH, warmup=WARMUP,
        peak=measured["tflops"], matrix=measured["matrix"],
    )  # fmt: skip
    refused = [f"- {_name(row)}: {row['reason']}" for row in measured["rows"] if "reason" in row]
    kernels = [f"- {_name(row)}: " + ", ".join(f"`{k}` {share:.0%}" for k, share in row["kernels"][:5]) for row in ran]
    parts = [text, table(head, lines)]
    parts += ["\nNot run:\n", *refused] if refused else []
    parts += ["\n<details><summary>Longest kernels of a step</summary>\n", *kernels, "\n</details>"] if kernels else []
    return "\n".join(parts)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']} {row['method']} {row['length']}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


BENCHMARK = Benchmark("gpu", add_options, measure, section, measures=("runner/train", "runner/plan"))

if __name__ == "__main__":
    alone(BENCHMARK, sys.argv[1:])
