"""Proof that two models agree: logits in arithmetic that adds no rounding of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch.nn import functional
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from runner.train import quantised_experts
from runner.train.adapter_config import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Agreement:
    """Differences between the logits of two models, over the same tokens."""

    max_difference: float
    typical_difference: float
    """Median over the positions of the largest difference there."""
    top1: float
    """Share of the positions at which both find the same token most likely."""
    positions: int


WeightChange = Callable[[str, torch.Tensor], torch.Tensor]


def rounded_again(names: Collection[str], dtype: torch.dtype, seed: int) -> WeightChange:
    """Change of weights (name, fp32 value) as `fold.round_stochastically` makes, for those with the names.

    Between two neighbours one step apart, a weight at a share p of the step moves by p or by 1 − p. Over all p that is
    the difference of two uniform numbers, times the step.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = torch.finfo(dtype)
    lowest = math.frexp(limits.tiny)[1]  # below it the steps no longer shrink

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weight
        # weight = m · 2^e with 0.5 ≤ |m| < 1, and eps is the step at 1 = 0.5 · 2^1
        exponent = torch.frexp(weight.cpu()).exponent.clamp(min=lowest)
        noise = torch.rand(weight.shape, generator=generator) - torch.rand(weight.shape, generator=generator)
        step = torch.ldexp(torch.full(weight.shape, limits.eps / 2), exponent)
        return weight + (noise * step).to(weight.device) * (weight != 0)

    return change


def logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
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
    """True for a linear layer with a weight packed by bitsandbytes."""
    return isinstance(module, (Linear4bit, Linear8bitLt))


def dequantised(module: Any) -> torch.Tensor:
    """The weight that a packed layer stands for, [out, in]: in the dtype it was packed from (4 bits), or fp32 (int8).

    With 4 bits that dtype is the one training multiplies in; rounding to it is part of the weight it was trained with.
    """
    weight: torch.Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
    return weight.detach()


@contextmanager
def computing_in_fp32(model: PreTrainedModel, change: WeightChange = lambda name, weight: weight) -> Iterator[None]:
    """Context in which the model computes in fp32 with its weights as they stand, packed ones unpacked.

    Sixteen-bit arithmetic would hide what the weights say: its own rounding, at every product, is as large as the
    rounding of the weights. A layer's weights are in fp32 only while it is at work, so one layer more is in memory.
    `change` is what becomes of each weight (its name, its value in fp32) for that time.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with ExitStack() as stack:
        for module in model.modules():
            if quantised(module):
                stack.enter_context(_with_forward(module, partial(_multiply, module)))
            elif quantised_experts.parameters(module):
                stack.enter_context(quantised_experts.computing_in_fp32(module))
        for unit in _modules_to_widen(model):
            stack.enter_context(_widened(unit, names, change))
        yield


def _modules_to_widen(model: PreTrainedModel) -> list[Any]:
    """Modules to widen one at a time: decoder layers, and the modules outside them that have weights of their own."""
    path, layers = decoder_layers(model)
    outside = [
        module
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{path}.") and any(True for _ in module.parameters(recurse=False))
    ]
    return [*layers, *outside]


def _multiply(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Output of a packed layer without its shortcuts (int8 also rounds the activations); x is [..., in]."""
    return functional.linear(x, dequantised(module).to(x.dtype), module.bias)


@contextmanager
def _with_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _to_fp32(value: Any) -> Any:
    """The value in fp32, if it is a floating-point tensor."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def _widened(unit: Any, names: dict[int, str], change: WeightChange) -> Iterator[None]:
    kept: list[tuple[Any, torch.Tensor]] = []

    def widen(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        for parameter in unit.parameters():
            if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):  # packed: bits, not numbers
                kept.append((parameter, parameter.data))
                parameter.data = change(names[id(parameter)], parameter.data.float())
        return tuple(map(_to_fp32, given))  # Mamba gives its head what has the width of the head's weight

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
