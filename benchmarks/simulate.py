"""The memory of one training step of the worker's model, on fake tensors (`runner/train/fake_tensors.py`).

The real transformers model, PEFT adapter, TRL head and torch optimiser, as the tests and `memory_accuracy` compare
them with the plan's arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from runner.hub.model_config import config_of
from runner.spec import Full, ModelSpec, RunSpec
from runner.train import adapter_config, trainable_weights
from runner.train.activation_checkpointing import checkpoint_every
from runner.train.fake_tensors import FLASH, LiveBytes, gpu_like, to_fakes
from runner.train.model_loading import DTYPES

__all__ = ["FLASH", "LiveBytes", "Simulated", "build", "gpu_like", "simulate", "take_steps", "to_fakes"]


@dataclass
class Simulated:
    """Most bytes alive in each phase of a step that is not the first."""

    peaks: dict[str, int] = field(default_factory=dict)
    start: int = 0
    """Bytes alive when the step began: weights (if they were made under the counter) and the optimiser's states."""

    @property
    def peak(self) -> int:
        """Over all phases."""
        return max(self.peaks.values())


def transformers_config(model: ModelSpec, num_layers: int | None = None) -> Any:
    """The configuration that transformers would load, from the facts of the catalogue."""
    facts = config_of(model) | {"pad_token_id": None}  # the class's may be none of this vocabulary
    if num_layers:
        facts["num_hidden_layers"] = num_layers
    if model.architecture == "phi":
        facts |= {"resid_pdrop": 0.1, "partial_rotary_factor": 0.4}  # microsoft/phi-2's config.json
    assert model.architecture
    return AutoConfig.for_model(model.architecture, **facts)


def build(spec: RunSpec, num_layers: int | None = None) -> Any:
    """The model as the worker has it before the first step, on the meta device."""
    config = transformers_config(spec.model, num_layers)
    dtype = DTYPES[spec.train.precision]
    if isinstance(spec.method, Full) and spec.method.master_weights:
        dtype = torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        checkpoint_every(model, spec.train.checkpoint_every)
        model.config._attn_implementation = FLASH
        trainable_weights.mark_trainable(spec, model)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer
        adapter = adapter_config.adapter_config(spec, model)
        if adapter is not None:
            model = get_peft_model(model, adapter)
            trainable_weights.leave_casts_to_autocast(model)
    if spec.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        if adapter is not None:
            model.enable_input_require_grads()
    model.train()
    return model


def simulate(spec: RunSpec, num_layers: int | None = None, steps: int = 2) -> Simulated:
    """Peaks of the last of `steps` optimiser steps (the optimiser's states are made in the first)."""
    counter = LiveBytes()
    model = build(spec, num_layers)
    with gpu_like(), FakeTensorMode(), counter:
        to_fakes(model)
        return take_steps(spec, model, counter, steps)


def take_steps(spec: RunSpec, model: Any, counter: LiveBytes, steps: int = 2) -> Simulated:
    """Peaks of the last of `steps` steps of any model, fake or real, under `counter`."""
    b, s = int(spec.train.micro_batch_size), spec.train.max_length
    mixed = spec.train.precision != "fp32"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = {name: torch.zeros(b, s, dtype=torch.int64) for name in ("input_ids", "labels")}
    start = 0
    for _ in range(steps):
        counter.peaks.clear()
        start = counter.live
        for _ in range(int(spec.train.accumulation_steps)):
            counter.enter("forward")
            with torch.autocast("cpu", DTYPES[spec.train.precision], enabled=mixed):
                loss = model(**batch, use_cache=False, fused_lm_head=True).loss
            counter.enter("backward")
            loss.backward()
            del loss
        counter.enter("step")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Simulated(dict(counter.peaks), start)
