"""Peaks of one training step: the tape of a few layers, extended to all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from runner.plan.autograd.attention import mask
from runner.plan.autograd.head import Inner, embed, head
from runner.plan.autograd.layers import LAYERS, checkpointed
from runner.plan.autograd.ops import Block, LayerKind, Setting
from runner.plan.autograd.tape import KINDS, Segment, Tape
from runner.plan.model_shape import Shape

SHOWN = 2
"""Layers of a run of equal layers that are put on the tape: its first, and one for all others."""


@dataclass(frozen=True, slots=True)
class TrainableLayers:
    """What trains: runs of equal layers from the first to the last, and the modules around them."""

    runs: tuple[tuple[LayerKind, int], ...]
    embedding: bool = False
    norm: bool = False
    head: bool = False


@dataclass(frozen=True, slots=True)
class Peak:
    """A phase's highest moment, in bytes above the states that are always there."""

    total: float
    kinds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Step:
    """Forward and backward pass of one micro batch."""

    forward: Peak
    backward: Peak
    held: Peak
    """What is left when the forward pass is over: kept for the backward pass."""


@lru_cache(maxsize=4096)
def replay_step(shape: Shape, setting: Setting, trains: TrainableLayers, has_gradients: bool = False) -> Step:
    """Replay one micro batch; with `has_gradients` an earlier one has left its gradients, which the caller counts."""
    tape = Tape()
    tape.has_gradients = has_gradients
    k = Block(tape, shape, setting)
    times: list[int] = []
    with tape.segment("embedding"):
        needs_grad = setting.checkpointing and any(kind.adapters for kind, _ in trains.runs)
        hidden, variables = embed(k, LayerKind(trains.embedding), needs_grad)
        cos = hidden.width
        shared = [tape.new(2 * setting.s * shape.rotary_dim, cos)]  # cos and sin
        (shared if setting.checkpointing else variables).extend(mask(k, cos))
    times.append(1)
    layer = LAYERS[shape.family]
    for kind, count in trains.runs:
        shown = min(count, SHOWN)
        for i in range(shown):
            with tape.segment("layer"):
                if setting.checkpointing:
                    hidden = checkpointed(k, layer, hidden, kind, cos)
                else:
                    hidden = layer(k, hidden, kind, cos)
            times.append(count - SHOWN + 1 if i == SHOWN - 1 else 1)
    with tape.segment("head"):
        inner = Inner(hidden, variables)
        del hidden
        loss = head(k, inner, LayerKind(trains.norm), LayerKind(trains.head))
    times.append(1)
    forward, held = stretched(tape.segments, times)
    _, held = stretched(tape.forget(), times, held)
    kept = held
    segments = tape.backward(loss) if loss.node is not None else []
    shared.clear()
    backward, _ = stretched(segments, [times[segment.index] for segment in segments], held)
    return Step(_peak(forward), _peak(backward), _peak(kept))


def stretched(
    segments: list[Segment], times: list[int], start: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By kind: the highest moment, and what is held at the end, when segment i happens `times[i]` times."""
    held, highest, top = list(start), tuple(start), sum(start)
    for segment, count in zip(segments, times, strict=True):
        for done in {0, count - 1}:
            kinds = [a + done * b + c for a, b, c in zip(held, segment.kept, segment.at_peak, strict=True)]
            if sum(kinds) > top:
                top, highest = sum(kinds), tuple(kinds)
        held = [a + count * b for a, b in zip(held, segment.kept, strict=True)]
    return highest, tuple(held)


def _peak(kinds: tuple[float, ...]) -> Peak:
    return Peak(sum(kinds), dict(zip(KINDS, kinds, strict=True)))
