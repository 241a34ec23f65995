"""Resolve the `auto`s that follow from the hardware alone. Pure."""

from __future__ import annotations

from typing import Any

from runner.plan import pod_packages
from runner.spec import RunSpec

# On a CPU in bf16, packed, eager attention takes 0.74 to 0.98 of SDPA's time at 256 and 512 tokens
# (docs/benchmarks.md); at 1,024 it is slower, and its scores, heads × s² per layer, take 4.5 instead of 2.5 GiB.
EAGER_UP_TO = 512


def settled(spec: RunSpec) -> RunSpec:
    """The `auto`s that the hardware alone decides."""
    train: dict[str, Any] = {"precision": _precision(spec)}
    on_gpu = spec.hw.accelerator == "cuda"
    flash = on_gpu and spec.hw.flash_attention and train["precision"] != "fp32"  # it has kernels for 16 bits alone
    flash = flash and (spec.where.name != "runpod" or pod_packages.has_flash(spec))
    if spec.train.attention == "auto" and not flash:
        micro = spec.train.micro_batch_size if spec.train.packing else 1  # a packed micro batch is one row
        row = spec.train.max_length * (micro if isinstance(micro, int) else 1)
        short_on_cpu = not on_gpu and row <= EAGER_UP_TO
        train["attention"] = "eager" if short_on_cpu else "sdpa"
    if spec.train.gradient_checkpointing == "auto":
        train["gradient_checkpointing"] = on_gpu
    if spec.train.liger == "auto" and not on_gpu:
        train["liger"] = False
    return spec.model_copy(update={"train": spec.train.model_copy(update=train)})


def _precision(spec: RunSpec) -> str:
    if spec.train.precision != "auto":
        return spec.train.precision
    if spec.hw.bf16:
        return "bf16"
    # Without bf16 a GPU still has fast fp16 (T4: 65 against 8 TFLOP/s); a CPU has nothing below fp32.
    return "fp16" if spec.hw.accelerator == "cuda" else "fp32"
