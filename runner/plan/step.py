"""Peaks of one training step: the tape of a few layers, stretched to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from runner.plan import layers
from runner.plan.blocks import Block, LayerKind, Setting
from runner.plan.shape import Shape
from runner.plan.tape import KINDS, Segment, Tape

SHOWN = 3
"""Layers of a run of equal layers that are put on the tape: its first, its last, and one for all between."""


@dataclass(frozen=True, slots=True)
class Trains:
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


@lru_cache(maxsize=4096)
def step(shape: Shape, setting: Setting, trains: Trains, has_gradients: bool = False) -> Step:
    """Replay one micro batch; with `has_gradients` an earlier one has left its gradients, which the caller counts."""
    tape = Tape()
    tape.has_gradients = has_gradients
    k = Block(tape, shape, setting)
    times: list[int] = []
    with tape.segment("embedding"):
        hidden = layers.embed(k, LayerKind(trains.embedding))
        if setting.checkpointing and hidden.node is None and any(kind.adapters for kind, _ in trains.runs):
            hidden.node = tape.leaf(trained=False)  # enable_input_require_grads
        cos = hidden.width
        positions = tape.new(2 * setting.s * shape.rotary_dim, cos)
    times.append(1)
    layer = layers.LAYERS[shape.family]
    for kind, count in trains.runs:
        shown = min(count, SHOWN)
        for i in range(shown):
            with tape.segment("layer"):
                if setting.checkpointing:
                    hidden = layers.checkpointed(k, layer, hidden, kind, cos)
                else:
                    hidden = layer(k, hidden, kind, cos)
            times.append(count - SHOWN + 1 if shown == SHOWN and i == 1 else 1)
    with tape.segment("head"):
        hidden = layers.final_norm(k, hidden, LayerKind(trains.norm))
        loss = layers.head(k, hidden, LayerKind(trains.head))
        del hidden
    times.append(1)
    forward, held = stretched(tape.segments, times)
    _, held = stretched(tape.forget(), times, held)
    segments = tape.backward(loss) if loss.node is not None else []
    del positions
    backward, _ = stretched(segments, [times[segment.index] for segment in segments], held)
    return Step(_peak(forward), _peak(backward))


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
