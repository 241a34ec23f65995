"""`method=`: what trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from runner.spec.base_model import Layers, Part
from runner.spec.layer_ranges import parse_layers


class Full(Part):
    """Train every weight."""

    name: Literal["full"] = "full"
    """Name of the choice."""
    master_weights: bool = True
    """Keep the weights in fp32 and compute in 16 bits; false keeps them in 16 bits: half the memory, small updates are lost."""


class Freeze(Part):
    """Train some whole layers and leave the others as they are."""

    name: Literal["freeze"] = "freeze"
    """Name of the choice."""
    layers: Layers = "last:2"
    """Layers to train: `last:2`, `first:4`, a range `0-3`, or a list such as `[0,2,5-7]`; indices match exactly."""
    extra_modules: list[str] = []
    """Modules outside the layers to train as well, by exact name: `embed_tokens`, `norm`, `lm_head`, …"""
    master_weights: bool = True
    """Keep the trained weights in fp32 and compute in 16 bits; false keeps them in 16 bits."""

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, value: Layers) -> Layers:
        parse_layers(value)
        return value


class _Adapter(Part):
    """What LoRA and both QLoRA share."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the update B·A."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / rank (alpha / √rank with rsLoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers that get an adapter: all but the output head, or a list of names such as `[q_proj,v_proj]`."""
    layers: Layers | None = None
    """Only these layers, written as for `freeze`; null means all."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732): better at high ranks."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): a little better at low ranks, slower."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapter, such as `[embed_tokens,lm_head]` after adding tokens."""

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, value: Layers | None) -> Layers | None:
        if value is not None:
            parse_layers(value)
        return value


class Lora(_Adapter):
    """Train a low-rank update of the frozen model (arXiv 2106.09685)."""

    name: Literal["lora"] = "lora"
    """Name of the choice."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """How A and B start: PEFT's default, gaussian, or from the weight's own decomposition (PiSSA, OLoRA)."""

    @model_validator(mode="after")
    def _init_fits(self) -> Lora:
        if self.init in ("pissa", "olora") and self.use_rslora:
            raise ValueError(
                f"method.init={self.init} cannot be combined with method.use_rslora=true: PEFT cannot write "
                "the result as a plain adapter; set one of the two back to its default"
            )
        if self.init in ("pissa", "olora") and self.use_dora:
            raise ValueError(
                f"method.init={self.init} cannot be combined with method.use_dora=true; "
                "set one of the two back to its default"
            )
        return self


class QLora4(_Adapter):
    """LoRA over a base quantised to 4 bits (arXiv 2305.14314)."""

    name: Literal["qlora4"] = "qlora4"
    """Name of the choice."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book: nf4 fits normally distributed weights."""
    double_quant: bool = True
    """Quantise the quantisation constants too: 0.37 bit per parameter less."""


class QLora8(_Adapter):
    """LoRA over a base quantised to int8 (LLM.int8(), arXiv 2208.07339)."""

    name: Literal["qlora8"] = "qlora8"
    """Name of the choice."""
    outlier_threshold: float = Field(default=6.0, ge=0)
    """Activations above this magnitude are multiplied in 16 bits."""


Method = Annotated[Full | Freeze | Lora | QLora4 | QLora8, Field(discriminator="name")]
