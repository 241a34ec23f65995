"""From a validated run to one in which nothing is left open. Pure: no torch, clock, network or files."""

from __future__ import annotations

from typing import Any

from runner.errors import Problem, RequestError
from runner.spec import RunSpec

# On a CPU in bf16, packed, eager attention takes 0.74 to 0.98 of SDPA's time at 256 and 512 tokens
# (docs/benchmarks.md); at 1,024 it is slower, and its scores, heads × s² per layer, take 4.5 instead of 2.5 GiB.
EAGER_UP_TO = 512
MAX_MICRO_BATCH = 8  # larger ones gain little speed on any GPU once a sequence has 512 tokens


def resolve(spec: RunSpec) -> tuple[RunSpec, list[str]]:
    """The run with every `auto` decided that the hardware decides, and what a user should know about it.

    `spec.hw` must be detected already. What only the machine that trains can know (which kernels
    are installed on a GPU) stays `auto` and is recorded there.
    """
    train: dict[str, Any] = {"precision": _precision(spec)}
    on_gpu = spec.hw.accelerator == "cuda"
    if spec.train.attention == "auto" and not (on_gpu and spec.hw.flash_attention):
        short_on_cpu = not on_gpu and spec.train.max_length <= EAGER_UP_TO
        train["attention"] = "eager" if short_on_cpu else "sdpa"
    if spec.train.gradient_checkpointing == "auto":
        train["gradient_checkpointing"] = on_gpu
    if spec.train.liger == "auto" and not on_gpu:
        train["liger"] = False
    micro, accumulation, notes = _batch(spec)
    train |= {"micro_batch_size": micro, "accumulation_steps": accumulation}
    train["batch_size"] = micro * accumulation * spec.hw.world_size  # as run, so that spec.json repeats it
    stage = spec.deepspeed.name
    if stage == "auto" and spec.hw.world_size == 1:
        stage = "none"
    resolved = spec.model_copy(
        update={
            "train": spec.train.model_copy(update=train),
            "deepspeed": spec.deepspeed.model_copy(update={"name": stage}),
        }
    )
    return resolved, notes


def _precision(spec: RunSpec) -> str:
    if spec.train.precision != "auto":
        return spec.train.precision
    if spec.hw.bf16:
        return "bf16"
    # Without bf16 a GPU still has fast fp16 (T4: 65 against 8 TFLOP/s); a CPU has nothing below fp32.
    return "fp16" if spec.hw.accelerator == "cuda" else "fp32"


def _batch(spec: RunSpec) -> tuple[int, int, list[str]]:
    """Micro batch and accumulation whose product over all processes comes nearest to the global batch."""
    world, wanted = spec.hw.world_size, spec.train.batch_size
    micro, accumulation = spec.train.micro_batch_size, spec.train.accumulation_steps
    micros = [micro] if isinstance(micro, int) else range(min(MAX_MICRO_BATCH, wanted), 0, -1)
    pairs = [
        (m, accumulation if isinstance(accumulation, int) else max(1, round(wanted / (world * m)))) for m in micros
    ]
    best = min(pairs, key=lambda pair: (abs(pair[0] * pair[1] * world - wanted), -pair[0]))
    total = best[0] * best[1] * world
    fixed = isinstance(micro, int) and isinstance(accumulation, int)
    if fixed and total != wanted:
        raise RequestError(
            Problem(
                f"train.micro_batch_size={micro} × train.accumulation_steps={accumulation} × {world} process"
                f"{'es' * (world > 1)} = {total}, but train.batch_size={wanted}",
                None,
                f"write train.batch_size={total}, or leave accumulation_steps at auto",
            )
        )
    notes = []
    if total != wanted:
        notes.append(f"global batch {wanted} rounded to {total} = {best[0]} × {best[1]} × {world} processes")
    return best[0], best[1], notes
