"""Which attention kernels are installed here: read from the packages' records, nothing is imported."""

from __future__ import annotations

from importlib import metadata

from runner import hardware
from runner.spec import RunSpec

NO_FLASH = "flash-attn is not installed: attention is SDPA's, which makes a mask for packed rows"


def flash_attn() -> str | None:
    """Version of flash-attn; None without it. By the package: flash-attn-4 calls its module the same."""
    try:
        return metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return None


def known(spec: RunSpec) -> RunSpec:
    """`train.attention=auto` decided where the run is on this machine's own GPUs, which could run FlashAttention, and
    which do not have it."""
    hw = spec.hw
    could = spec.train.attention == "auto" and hw.accelerator == "cuda" and hw.flash_attention
    if not could or spec.where.name != "local" or hardware.why_not_here(hw) or flash_attn() is not None:
        return spec
    return spec.model_copy(update={"train": spec.train.model_copy(update={"attention": "sdpa"})})
