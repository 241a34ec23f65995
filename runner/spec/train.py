"""Training, evaluation, trackers and upload of a run."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from runner.spec.part import CODE, Auto, Part


class TrackSpec(Part):
    """Destination of metrics besides the run directory."""

    name: Literal["none", "tensorboard", "wandb", "mlflow", "own"] = "none"
    """Name of the choice."""
    code: str | None = Field(default=None, pattern=CODE)
    """A class of your own as `FILE.py:CLASS`, derived from `runner.train.trackers.Tracker`, with `name: own`."""
    project: str = "llm-finetuning-runner"
    """Project in Weights & Biases; experiment in MLflow."""
    entity: str | None = None
    """Team or user in Weights & Biases."""

    @model_validator(mode="after")
    def _own_has_code(self) -> TrackSpec:
        if self.name == "own" and self.code is None:
            raise ValueError("track.code is missing; write code: FILE.py:CLASS beside name: own, or track=none")
        if self.name != "own" and self.code is not None:
            raise ValueError(
                f"track.code={self.code} is read by a tracker of your own alone; write DIR/track/mine.yaml with the lines "
                "name: own and code: FILE.py:CLASS, and --config-dir DIR track=mine"
            )
        return self


class TrainSpec(Part):
    """Optimisation."""

    batch_size: int = Field(default=16, ge=1)
    """Global batch in sequences, the same on any hardware. With packing, a sequence is `max_length` tokens of packed rows."""
    micro_batch_size: int | Auto = Field(default="auto")
    """Sequences per process in one forward pass; auto derives it from `batch_size` and the hardware."""
    accumulation_steps: int | Auto = Field(default="auto")
    """Micro batches per optimiser step; auto chooses the product nearest to `batch_size`."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens per sequence; longer rows are cut, and the count is reported."""
    packing: bool = True
    """Put several short rows into one sequence (best-fit decreasing), without attention across them."""
    num_epochs: float = Field(default=3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; overrides `num_epochs`."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up; wsd is warm-up, stable, decay (the last 20% of the steps)."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient clipping by global norm; 0 disables it."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw", "adafactor", "sgd", "muon"] = "adamw"
    """Optimiser; adamw is torch's fused kernel, the 8-bit and paged ones are bitsandbytes' and need a GPU. muon is torch's, for the matrices of the layers, with AdamW for all else and AdamW's learning rates; full and freeze alone."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic; auto takes bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    tf32: bool = False
    """With `precision=fp32` on GPUs since Ampere, round the inputs of matrix products to TF32 (10 bits of mantissa): faster, no longer exact. Off by default, as in torch."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention kernel; auto takes varlen, which makes no mask: torch's flash kernel in 16 bits on GPUs since Ampere, else each document by itself; FlashAttention 3 where it is installed here and the GPU is a Hopper."""
    gradient_checkpointing: bool | int | Auto = "auto"
    """Recompute activations in the backward pass: less memory, a third more time; a number n does it in every n-th layer. auto takes the fastest of these that fits on a GPU, and false on a CPU."""
    liger: bool | Auto = "auto"
    """Liger's fused kernels for norms, rotary positions and the MLP; auto means on a GPU where `liger-kernel` is installed and has some for the model."""
    compile: bool | Auto = "auto"
    """Compile each decoder layer with torch.compile, for training steps: minutes at the start, fewer and larger kernels after. auto is false, as it has not been measured on a GPU here (docs/gpus.md)."""
    seed: int = Field(default=42, ge=0, le=2**32 - 1)
    """Seed of data order, adapter initialisation, dropout and all else."""
    save_every_steps: int | None = Field(default=None, ge=1)
    """Write a checkpoint every n steps. One is always written after the last step and on interruption."""
    save_every_minutes: float | None = Field(default=15.0, gt=0)
    """Write a checkpoint when the last one is n minutes old, using at most a twentieth of the time; null means by steps alone."""
    keep_checkpoints: int = Field(default=2, ge=0)
    """Number of checkpoints to keep; with `eval.every_steps` also the one with the lowest held-out loss. 0 deletes the last one when the run is done, which then cannot be extended."""
    hang_minutes: float | None = Field(default=15.0, gt=0)
    """Minutes without progress of any process after which the run is ended (four times that while starting, loading and saving); null disables it."""
    on_loss_spike: Literal["ignore", "skip", "rewind"] = "ignore"
    """Reaction to a loss spike: skip ignores that micro batch; rewind returns to the last checkpoint and skips the data around the spike (PaLM, arXiv 2204.02311 §5.1), at most three times."""
    spike_factor: float = Field(default=3.0, gt=1)
    """A spike is a micro batch whose loss exceeds this multiple of the median of the last 50 steps; the first 20 steps are exempt."""

    @field_validator("gradient_checkpointing")
    @classmethod
    def _every_so_many(cls, value: bool | int | str) -> bool | int | str:
        if isinstance(value, int) and value < 0:
            what = "must be true, false, auto, or n for every n-th layer, a whole number of at least 2"
            raise ValueError(f"{what}; write train.gradient_checkpointing=auto")
        return bool(value) if value in (0, 1) else value

    def num_steps(self, rows: int, world_size: int) -> int:
        """Optimiser steps of a resolved run: `max_steps`, or its epochs of so many rows over the global batch.

        transformers counts an epoch's steps as ceil(micro batches / accumulation steps).
        """
        if self.max_steps:
            return self.max_steps
        assert isinstance(self.micro_batch_size, int) and isinstance(self.accumulation_steps, int)
        micro_batches = -(-rows // (self.micro_batch_size * world_size))
        per_epoch = max(1, -(-micro_batches // self.accumulation_steps))
        return -(-int(self.num_epochs * per_epoch * 1000) // 1000)

    @field_validator("micro_batch_size", "accumulation_steps")
    @classmethod
    def _positive(cls, value: int | str, info: ValidationInfo) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be a whole number of at least 1, or auto; write train.{info.field_name}=auto")
        return value

    @property
    def arithmetic(self) -> str:
        """Number format of matrix products: `precision`, or tf32."""
        return "tf32" if self.tf32 else self.precision

    @property
    def checkpoint_every(self) -> int:
        """`gradient_checkpointing` as a number: 1 for every layer, 0 for none; `auto` must be decided."""
        assert self.gradient_checkpointing != "auto"
        return int(self.gradient_checkpointing)


class EvalSpec(Part):
    """Measurements on held-out data."""

    num_prompts: int = Field(default=40, ge=0)
    """Held-out prompts that are answered before and after training and compared exactly; 0 disables it."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts answered at once."""
    every_steps: int | None = Field(default=None, ge=1)
    """Measure the held-out loss every n steps; null means only before and after training."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after n such measurements without improvement; needs `every_steps`."""


class PushSpec(Part):
    """Upload of the model."""

    to: str | None = None
    """Upload model, card and spec at the end: a Hub id `org/name` (created as private), or `s3://bucket/prefix`."""
    every_steps: int | None = Field(default=None, ge=1)
    """Upload a checkpoint to `checkpoints/` every n steps, a multiple of `train.save_every_steps`, in the background."""
    keep_checkpoints: int = Field(default=1, ge=1)
    """Number of uploaded checkpoints to keep."""

    @field_validator("to")
    @classmethod
    def _is_a_place(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*|s3://[^/]+(/.*)?", value):
            raise ValueError("expected a repository on the Hub, or an s3:// address; write push.to=ORG/NAME")
        return value

    @model_validator(mode="after")
    def _agree(self) -> PushSpec:
        if self.every_steps is not None and self.to is None:
            raise ValueError("push.every_steps uploads to push.to; add push.to=ORG/NAME, or leave it out")
        if self.every_steps is None and self.keep_checkpoints != 1:
            raise ValueError("push.keep_checkpoints counts uploaded checkpoints; add push.every_steps=100, say")
        return self
