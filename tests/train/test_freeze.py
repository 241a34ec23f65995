"""`freeze` trains exactly the layers it names, on every shape of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runner.errors import RequestError
from runner.spec import Freeze
from runner.train.adapter_config import decoder_layers, linear_names
from runner.train.trainable_weights import describe_trainable, mark_trainable
from tests.conftest import spec_of


def small(architecture: str, layers: int = 12, **extra: Any) -> Any:
    """A model of the real architecture, small enough for a test."""
    config = AutoConfig.for_model(
        architecture, vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, **extra,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def freeze(model: Any, **method: Any) -> set[str]:
    """Names of the parameters that train."""
    spec = spec_of("hw=cpu", "method=full").model_copy(update={"method": Freeze(**method)})
    mark_trainable(spec, model)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def layers_of(names: set[str]) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


@pytest.fixture(scope="module")
def mixtral() -> Any:
    """Twelve layers of eleven experts: `1` is a substring of 10 and 11, and experts have numbers too."""
    return small("mixtral", num_local_experts=11, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last:2", {10, 11}),
        ("first:1", {0}),
        ("1", {1}),
        ([1], {1}),
        ("0-2", {0, 1, 2}),
        ([0, "10-11"], {0, 10, 11}),
    ],
)
def test_exact_layers_in_a_mixture(mixtral: Any, layers: Any, expected: set[int]) -> None:
    names = freeze(mixtral, layers=layers)
    assert all(".layers." in name for name in names)
    assert layers_of(names) == expected
    for index in expected:  # the whole layer: attention, router, every expert, both norms
        own = {n for n, _ in mixtral.named_parameters() if f".layers.{index}." in n}
        assert own <= names


def test_norm_means_the_last_norm_only(mixtral: Any) -> None:
    names = freeze(mixtral, layers="last:1", extra_modules=["norm", "embed_tokens", "lm_head"])
    outside = {name for name in names if ".layers." not in name}
    assert outside == {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("architecture", "extra", "norm"),
    [
        ("llama", {}, "norm"),
        ("phi", {}, "final_layernorm"),
        ("qwen3", {"head_dim": 8}, "norm"),
        ("mistral", {}, "norm"),
    ],
)
def test_other_architectures(architecture: str, extra: dict[str, Any], norm: str) -> None:
    model = small(architecture, layers=4, **extra)
    names = freeze(model, layers="last:1", extra_modules=[norm])
    assert layers_of({n for n in names if ".layers." in n}) == {3}
    assert any(name.startswith(f"model.{norm}.") for name in names)


def test_what_trains_is_fp32_and_what_is_frozen_is_not() -> None:
    model = small("llama", layers=3).to(torch.bfloat16)
    freeze(model, layers="last:1")
    kinds = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    trainable, total, lines = describe_trainable(model)
    assert 0 < trainable < total and lines == [f"layers.2: {trainable:,}"]


def test_a_layer_or_module_that_does_not_exist_is_refused() -> None:
    model = small("llama", layers=3)
    with pytest.raises(RequestError, match="3 layers"):
        freeze(model, layers="last:4")
    with pytest.raises(RequestError, match="no wte") as caught:
        freeze(model, layers="last:1", extra_modules=["wte"])
    assert "embed_tokens" in str(caught.value.problems[0].remedy)


def test_layers_and_linear_names_of_a_mixture(mixtral: Any) -> None:
    path, layers = decoder_layers(mixtral)
    assert path == "model.layers" and len(layers) == 12
    assert "lm_head" not in linear_names(mixtral) and "q_proj" in linear_names(mixtral)
