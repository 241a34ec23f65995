"""Architectures that are planned also train: whole, with adapters of the planned size, over 4 bits, and packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.hub.model_config import local_facts
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.spec import ModelSpec
from tests.support import tiny_llama

WIDE = {"head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": WIDE,
    "gemma3_text": {**WIDE, "num_hidden_layers": 6},
    "ministral3": WIDE,
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4},
    "granite": {},
    "glm4": WIDE,
    "smollm3": {"num_hidden_layers": 4},
    "cohere2": {"num_hidden_layers": 4},
}
METHODS = {
    "full": (),
    "lora": ("method.rank=4", "train.gradient_checkpointing=true"),
    "qlora4": ("method.rank=4", "train.packing=true"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_it_trains_as_many_parameters_as_were_planned(
    architecture: str, method: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    asked = tiny_llama.words(tmp_path, architecture=architecture, **FAMILIES[architecture])
    finished, run = train(*asked, f"method={method}", "train.max_steps=2", *METHODS[method])
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **(local_facts(str(tmp_path / "base")) or {})}))
    trained = sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    assert trained == training_of(shape, run.spec.method, "bf16", deepspeed=False).trainable
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    assert losses and all(math.isfinite(loss) for loss in losses)
