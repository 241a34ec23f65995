"""LoRA under autocast: no fp32 copy of a layer's input, and the same numbers bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from runner.train import trainable_weights
from tests.conftest import spec_of, train_here
from tests.support import tiny_llama

LAYERS, TOKENS = 2, 24


class Casts(TorchDispatchMode):
    """Counts copies of activations to fp32."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.shape[:2] == (2, TOKENS):
            self.count += (args[0].dtype, found.dtype) == (torch.bfloat16, torch.float32)
        return found


def adapted(**options: Any) -> Any:
    """A Llama in bf16 under fp32 adapters whose B is not 0."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(base, lora).train()


def step(model: Any, *, autocast: bool = True) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients of a step, and how many activations were copied to fp32."""
    torch.manual_seed(1)
    ids = torch.randint(64, (2, TOKENS))
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) >= 2 * 7 * LAYERS and all(grad is not None for grad in grads)
    return [loss.detach(), *grads], casts.count


def test_the_same_numbers_with_one_copy_less_per_adapted_layer() -> None:
    plain, direct = adapted(), adapted()
    trainable_weights.leave_casts_to_autocast(direct)
    (expected, before), (found, after) = step(plain), step(direct)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert before - after >= 7 * LAYERS


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_keep_the_copy_they_compute_with(options: dict[str, Any]) -> None:
    plain, direct = adapted(**options), adapted(**options)
    trainable_weights.leave_casts_to_autocast(direct)
    (expected, before), (found, after) = step(plain), step(direct)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert before == after


def test_without_autocast_the_input_is_cast_as_before() -> None:
    plain, direct = adapted(), adapted()
    trainable_weights.leave_casts_to_autocast(direct)
    expected, found = step(plain, autocast=False)[0], step(direct, autocast=False)[0]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_run_takes_the_steps_it_took_with_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*tiny_llama.words(tmp_path), "method=lora", "train.max_steps=3", "eval.num_prompts=2"]
    lines = []
    for name in ("direct", "copies"):
        if name == "copies":
            monkeypatch.setattr(trainable_weights, "leave_casts_to_autocast", lambda model: None)
        finished, run = train_here(spec_of(*words, f"run.output_dir={tmp_path / name}"))
        own = ["_cast_input_dtype" in vars(module) for module in finished.model.modules() if hasattr(module, "lora_A")]
        assert len(own) == 21 and all(own) == any(own) == (name == "direct")
        lines.append([(line["loss"], line["grad_norm"]) for line in run.metrics()])
    assert lines[0] == lines[1] and len(lines[0]) == 3
