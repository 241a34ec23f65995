"""Peaks of one training step: the tape of a few layers, extended to all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from runner.plan.autograd.attention import mask, own_tables
from runner.plan.autograd.head import Inner, embed, head
from runner.plan.autograd.layers import LAYERS, checkpointed
from runner.plan.autograd.ops import Block, LayerKind, Setting
from runner.plan.autograd.tape import KINDS, Segment, Storage, Tape
from runner.plan.model_shape import Shape

SHOWN = 2
"""Repetitions of a pattern of layers that are put on the tape: its first, and one for all others."""
LONGEST = 8
"""Layers of the longest pattern that is looked for: Gemma 3 has five layers with a window and one without."""


@dataclass(frozen=True, slots=True)
class TrainableLayers:
    """Trained layers as repeated patterns from first to last, and the modules around them."""

    runs: tuple[tuple[tuple[LayerKind, ...], int], ...]
    embedding: bool = False
    norm: bool = False
    head: bool = False


def patterns(shape: Shape, of: Callable[[int], LayerKind]) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
    """The shape's layers, `of` saying what trains in each, as patterns that repeat: the ones that cover most."""
    variants = {kind: i for i, kind in enumerate(shape.kinds)}
    kinds = [replace(of(i), variant=variants[layer]) for i, layer in enumerate(shape.layers)]
    found: list[tuple[tuple[LayerKind, ...], int]] = []
    start = 0
    while start < len(kinds):
        length, times = max(
            ((n, _repeats(kinds, start, n)) for n in range(1, LONGEST + 1)), key=lambda one: (one[0] * one[1], -one[0])
        )
        found.append((tuple(kinds[start : start + length]), times))
        start += length * times
    return tuple(found)


def _repeats(kinds: list[LayerKind], start: int, length: int) -> int:
    """How often the pattern of that length comes from `start` on; 0 for one that is not shorter than what it covers."""
    pattern, times = kinds[start : start + length], 1
    while kinds[start + times * length : start + (times + 1) * length] == pattern:
        times += 1
    return times if times > 1 or length == 1 else 0


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
    groups: list[int] = [1]
    """How often each group of segments happens."""
    group_of: list[int] = [0]
    """The group of each segment."""
    with tape.segment("embedding"):
        needs_grad = setting.checkpointing and any(kind.adapters for pattern, _ in trains.runs for kind in pattern)
        hidden, variables = embed(k, LayerKind(trains.embedding), needs_grad)
        cos = 4 if shape.traits.rotation == "narrowed" else hidden.width
        numbers = {layer.table for layer in shape.kinds} - {None}
        tables = {number: tape.new(2 * setting.s * shape.rotary_dim, cos) for number in numbers}  # cos and sin
        shared: list[Storage] = []
        if not setting.checkpointing:  # a checkpoint holds its layer's; else what is multiplied with them keeps them
            (variables if own_tables(shape) else shared).extend(tables.values())
        (shared if setting.checkpointing else variables).extend(mask(k, hidden.width))
    layer = LAYERS[shape.traits.family]
    for pattern, count in trains.runs:
        shown = min(count, SHOWN)
        for i in range(shown):
            groups.append(count - SHOWN + 1 if i == SHOWN - 1 else 1)
            for kind in pattern:
                group_of.append(len(groups) - 1)
                with tape.segment("layer"):
                    if setting.checkpointing:
                        table = tables.get(shape.kinds[kind.variant].table)
                        hidden = checkpointed(k, layer, hidden, kind, cos, table)
                        del table
                    else:
                        k.enter(kind)
                        hidden = layer(k, hidden, kind, cos)
    groups.append(1)
    group_of.append(len(groups) - 1)
    tables.clear()
    with tape.segment("head"):
        inner = Inner(hidden, variables)
        del hidden
        loss = head(k, inner, LayerKind(trains.norm), LayerKind(trains.head))

    def grouped(segments: list[Segment]) -> list[tuple[list[Segment], int]]:
        each = groupby(segments, key=lambda segment: group_of[segment.index])
        return [(list(some), groups[group]) for group, some in each]

    forward, held = stretched(grouped(tape.segments))
    _, held = stretched(grouped(tape.forget()), held)
    kept = held
    segments = tape.backward(loss) if loss.node is not None else []
    shared.clear()
    backward, _ = stretched(grouped(segments), held)
    return Step(_peak(forward), _peak(backward), _peak(kept))


def stretched(
    groups: list[tuple[list[Segment], int]], start: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By kind: the highest moment, and what is held at the end, when each group of segments happens so many times."""
    held, highest, top = list(start), tuple(start), sum(start)
    for segments, count in groups:
        kept = [sum(values) for values in zip(*(segment.kept for segment in segments), strict=True)]
        for done in {0, count - 1}:
            before = [a + done * b for a, b in zip(held, kept, strict=True)]
            for segment in segments:
                kinds = [a + b for a, b in zip(before, segment.at_peak, strict=True)]
                if sum(kinds) > top:
                    top, highest = sum(kinds), tuple(kinds)
                before = [a + b for a, b in zip(before, segment.kept, strict=True)]
        held = [a + count * b for a, b in zip(held, kept, strict=True)]
    return highest, tuple(held)


def _peak(kinds: tuple[float, ...]) -> Peak:
    return Peak(sum(kinds), dict(zip(KINDS, kinds, strict=True)))
