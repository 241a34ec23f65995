"""Proof that two models agree: logits in arithmetic that adds no rounding of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch.nn import functional
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from runner.train import quantised_experts
from runner.train.merge.rounding import Change
from runner.train.peft_methods import decoder_layers


@dataclass(frozen=True)
class Agreement:
    """How far the logits of two models are apart, over the same tokens."""

    max_difference: float
    typical_difference: float
    """Median over the positions of the largest difference there."""
    top1: float
    """Share of the positions at which both find the same token most likely."""
    positions: int


def logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits of every prompt, each [s, V] in fp32 on the CPU."""
    model.eval()
    found = []
    for ids in prompts:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        found.append(output.logits[0].float().cpu())
    return found


def agreement(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> Agreement:
    """Compare the logits of the same prompts."""
    pairs = list(zip(ours, theirs, strict=True))
    positions = sum(len(a) for a, _ in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    largest = torch.cat([(a - b).abs().amax(-1) for a, b in pairs])
    return Agreement(float(largest.max()), float(largest.median()), same / positions, positions)


def quantised(module: Any) -> bool:
    """A linear layer whose weight bitsandbytes has packed."""
    return isinstance(module, (Linear4bit, Linear8bitLt))


def dequantised(module: Any) -> torch.Tensor:
    """The weight that a packed layer stands for, [out, in]: in the dtype it was packed from (4 bits), or fp32 (int8).

    With 4 bits that dtype is the one training multiplies in; rounding to it is part of the weight it was trained with.
    """
    weight: torch.Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    return weight.detach()


@contextmanager
def exact(model: Any, change: Change = lambda name, weight: weight) -> Iterator[None]:
    """Context in which the model computes in fp32 with its weights as they stand, packed ones unpacked.

    Sixteen-bit arithmetic would hide what the weights say: its own rounding, at every product, is as large as the
    rounding of the weights. A layer's weights are in fp32 only while it is at work, so one layer more is in memory.
    `change` is what becomes of each weight (its name, its value in fp32) for that time.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        for module in model.modules():
            if quantised(module):
                stack.enter_context(_replaced(module, partial(_multiply, module)))
            elif quantised_experts.parameters(module):
                stack.enter_context(quantised_experts.exactly(module))
        for unit in _units(model):
            stack.enter_context(_widened(unit, names, change))
        yield


def _units(model: Any) -> list[Any]:
    """What is widened at once: every decoder layer, and every module outside them that has weights of its own."""
    path, layers = decoder_layers(model)
    outside = [
        module
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{path}.") and any(True for _ in module.parameters(recurse=False))
    ]
    return [*layers, *outside]


def _multiply(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What a packed layer computes, without its shortcuts (int8 also rounds the activations): x is [..., in]."""
    return functional.linear(x, dequantised(module).to(x.dtype), module.bias)


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _floating(value: Any) -> Any:
    """In fp32, where it is numbers of another width."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def _widened(unit: Any, names: dict[int, str], change: Change) -> Iterator[None]:
    kept: list[tuple[Any, torch.Tensor]] = []

    def widen(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for parameter in unit.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):  # packed: bits, not numbers
                kept.append((parameter, parameter.data))
                parameter.data = change(names[id(parameter)], parameter.data.float())
        return tuple(map(_floating, given))  # Mamba gives its head what has the width of the head's weight

    def narrow(*_: Any) -> None:
        while kept:
            parameter, data = kept.pop()
            parameter.data = data

    hooks = [unit.register_forward_pre_hook(widen), unit.register_forward_hook(narrow, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        narrow()
