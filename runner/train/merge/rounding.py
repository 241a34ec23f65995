"""Unbiased rounding to 16 bits, and the spread of such roundings.

The weights of a base lie on the 16-bit grid already. Rounded to nearest, an update of less than half a step is lost,
all of it and in every weight alike: the adapter comes out smaller than it was trained. Rounded up or down at random,
with the nearer neighbour as much the likelier, it is kept on average, and what is left is noise that cancels out.
SmolLM2-135M after 3 steps of LoRA, bf16, 281 positions: to nearest the logits are typically 0.49 away from base +
adapter (whose own effect is 3.8), at random 0.12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch

Change = Callable[[str, torch.Tensor], torch.Tensor]


def at_random(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to a neighbour in `dtype`, so that the expectation is the weight itself; exact values stay."""
    near = weight.to(dtype)
    rest = weight - near.float()
    towards = torch.where(rest < 0, -torch.inf, torch.inf).to(dtype)
    other = torch.nextafter(near, towards)
    chance = rest / (other.float() - near.float())  # at most 1/2, and 0 where nothing is left to round
    return torch.where(torch.rand(weight.shape, generator=generator) < chance, other, near)


def once_more(names: Collection[str], dtype: torch.dtype, seed: int) -> Change:
    """A change to weights (name, fp32 value) such as `at_random` makes, for those with the names; others stay.

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
