"""The attention kernel of a run: what `train.attention` means for its model and hardware, and its name in the plan."""

from __future__ import annotations

from runner.plan.architectures import TRAITS
from runner.plan.autograd.ops import AttentionKernel
from runner.spec import ModelSpec, RunSpec

KERNELS: dict[AttentionKernel, str] = {
    "flash": "a flash kernel, no mask",
    "blockwise": "each document in blocks, no mask",
    "per_document": "SDPA once per document, no mask",
    "scores": "each document's scores, no mask",
    "sdpa": "SDPA with a mask of all pairs of tokens",
    "eager": "all pairs of tokens",
}


def needs_scores(model: ModelSpec) -> bool:
    """Scores go through tanh or have a sink beside them, which neither SDPA nor torch's flash kernel knows."""
    traits = TRAITS.get(model.architecture or "")
    return traits is not None and (traits.softcap or traits.biased_experts)


def has_sinks(model: ModelSpec) -> bool:
    """gpt-oss: scores have a sink beside them, and no mask keeps packed documents apart."""
    traits = TRAITS.get(model.architecture or "")
    return traits is not None and traits.biased_experts


def attention_kernel(spec: RunSpec) -> AttentionKernel:
    """The kernel that `train.attention` means on the run's hardware: as train/varlen_attention.py chooses."""
    named, hw = spec.train.attention, spec.hw
    if named in ("sdpa", "eager"):
        return named
    if named.startswith("flash"):
        return "flash"
    if needs_scores(spec.model):
        return "scores"
    if hw.accelerator == "cpu":
        return "blockwise"
    return "flash" if hw.flash_attention and spec.train.precision != "fp32" else "per_document"
