"""Peaks of one training step: the tape of a few layers, extended to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
LONGEST = 12
"""Layers of the longest pattern that is looked for: Gemma 3 has five layers with a window and one without, and every
fourth of its layers may be checkpointed."""


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
    return _repeating([replace(of(i), variant=variants[layer]) for i, layer in enumerate(shape.layers)])


def _repeating(kinds: list[LayerKind]) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
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


def checkpointed_runs(
    runs: tuple[tuple[tuple[LayerKind, ...], int], ...], every: int
) -> tuple[tuple[tuple[LayerKind, ...], int], ...]:
    """The layers with every `every`-th of them marked, as transformers counts them: the first is always one."""
    if every < 2:
        return tuple((tuple(replace(kind, again=every == 1) for kind in pattern), count) for pattern, count in runs)
    kinds = [kind for pattern, count in runs for kind in pattern * count]
    return _repeating([replace(kind, again=i % every == 0) for i, kind in enumerate(kinds)])


def _runs_of(pattern: tuple[LayerKind, ...], first: bool) -> Iterator[tuple[LayerKind, int]]:
    """Layers of a pattern that are alike and follow each other, of which one is put on the tape, with their number.

    The `first` of all layers is alone: what it is given comes from the embedding.
    """
    if first:
        yield pattern[0], 1
        pattern = pattern[1:]
    for kind, alike in groupby(pattern):
        yield kind, len(list(alike))


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
    times: list[int] = [1]
    """How often each segment happens in its group."""
    runs = checkpointed_runs(trains.runs, setting.checkpointing)
    plain = {shape.kinds[kind.variant].table for pattern, _ in runs for kind in pattern if not kind.again}
    with tape.segment("embedding"):
        needs_grad = bool(setting.checkpointing) and any(kind.adapters for pattern, _ in runs for kind in pattern)
        hidden, variables = embed(k, LayerKind(trains.embedding), needs_grad)
        cos = 4 if shape.traits.rotation in ("narrowed", "complex") else hidden.width
        width = shape.rotary_dim / 2 if shape.traits.rotation in ("split", "complex") else shape.rotary_dim
        numbers = {layer.table for layer in shape.kinds} - {None}
        tables = {number: tape.new(2 * setting.s * width, cos) for number in numbers}  # cos and sin
        shared: list[Storage] = []
        # a checkpoint holds its layer's; else what is multiplied with them keeps them
        (variables if own_tables(shape) else shared).extend(tables[number] for number in tables if number in plain)
        (shared if setting.checkpointing else variables).extend(mask(k, hidden.width))
    layer = LAYERS[shape.traits.family]
    for pattern, count in runs:
        shown = min(count, SHOWN)
        for i in range(shown):
            groups.append(count - SHOWN + 1 if i == SHOWN - 1 else 1)
            for kind, alike in _runs_of(pattern, first=len(group_of) == 1):
                group_of.append(len(groups) - 1)
                times.append(alike)
                with tape.segment("layer"):
                    if kind.again:
                        table = tables.get(shape.kinds[kind.variant].table)
                        hidden = checkpointed(k, layer, hidden, kind, cos, table)
                        del table
                    else:
                        k.enter(kind)
                        hidden = layer(k, hidden, kind, cos)
    groups.append(1)
    group_of.append(len(groups) - 1)
    times.append(1)
    tables.clear()
    with tape.segment("head"):
        inner = Inner(hidden, variables)
        del hidden
        loss = head(k, inner, LayerKind(trains.norm), LayerKind(trains.head))

    def grouped(segments: list[Segment]) -> list[Group]:
        each = groupby(segments, key=lambda segment: group_of[segment.index])
        return [([(segment, times[segment.index]) for segment in some], groups[group]) for group, some in each]

    forward, held = stretched(grouped(tape.segments))
    _, held = stretched(grouped(tape.forget()), held)
    kept = held
    segments = tape.backward(loss) if loss.node is not None else []
    shared.clear()
    backward, _ = stretched(grouped(segments), held)
    return Step(_peak(forward), _peak(backward), _peak(kept))


Group = tuple[list[tuple[Segment, int]], int]
"""Segments that follow each other, each with how often it happens there, and how often they do together."""


def stretched(
    groups: list[Group], start: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By kind: the highest moment, and what is held at the end, when all happens as often as it does."""
    held, highest, top = list(start), tuple(start), sum(start)
    for segments, count in groups:
        kept = [sum(values) for values in zip(*([n * k for k in one.kept] for one, n in segments), strict=True)]
        for done in {0, count - 1}:
            before = [a + done * b for a, b in zip(held, kept, strict=True)]
            for segment, times in segments:
                for earlier in {0, times - 1}:
                    kinds = [a + earlier * k + b for a, k, b in zip(before, segment.kept, segment.at_peak, strict=True)]
                    if sum(kinds) > top:
                        top, highest = sum(kinds), tuple(kinds)
                before = [a + times * b for a, b in zip(before, segment.kept, strict=True)]
        held = [a + count * b for a, b in zip(held, kept, strict=True)]
    return highest, tuple(held)


def _peak(kinds: tuple[float, ...]) -> Peak:
    return Peak(sum(kinds), dict(zip(KINDS, kinds, strict=True)))
