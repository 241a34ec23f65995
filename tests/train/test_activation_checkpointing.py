"""Every n-th layer is checkpointed, through all that TRL does to a trainer, and nothing is learned differently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.support import preferences, tiny_llama

SMALL = ("train.precision=fp32", "train.max_steps=3", "eval.num_prompts=0")


def checkpointed(model: Any) -> list[bool]:
    return [layer.gradient_checkpointing for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.metrics() if "loss" in line]


@pytest.mark.parametrize("method", ["full", "lora", "qlora4"])
def test_every_second_layer_is_recomputed_and_the_losses_stay(
    method: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    words = (*tiny_llama.words(tmp_path, num_hidden_layers=5), f"method={method}", *SMALL)
    some, run = train(*words, "train.gradient_checkpointing=2")
    assert checkpointed(some.model) == [True, False, True, False, True]
    assert run.spec.train.gradient_checkpointing == 2  # and so `resume` does the same
    none, other = train(*words, "train.gradient_checkpointing=false")
    assert not any(checkpointed(none.model))
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)


def test_passes_without_gradients_do_not_make_it_every_layer(tmp_path: Path) -> None:
    """DPO's reference under an adapter: TRL switches checkpointing off for it, and on again without the number."""
    finished, _ = preferences.train(
        tmp_path, "objective=dpo", "method=lora", "train.max_steps=2", "train.gradient_checkpointing=2"
    )
    assert checkpointed(finished.model) == [True, False, True]
