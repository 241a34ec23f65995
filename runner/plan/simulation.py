"""A model whose layers no arithmetic knows: its step is simulated for a few layers, and extended to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol

from runner.plan.autograd.ops import LayerKind, Setting
from runner.plan.autograd.step_peak import Peak, Step, TrainableLayers, checkpointed_runs, replay_step, stretched
from runner.plan.autograd.tape import KINDS, Segment
from runner.plan.model_shape import Shape
from runner.plan.trainable import Precision, Training
from runner.spec import Method

SHOWN = 3
"""Repetitions of a pattern of layers that are simulated: its first, its last, and one for all between them."""
ANSWER = "answer: "
"""Before each answer of the process that simulates: what libraries print while they are imported stands there, too."""


class Stretch(NamedTuple):
    """A stretch of a pass: where it is (0 the embedding, then the layers that ran, then the head), bytes by kind
    relative to its start, and operations."""

    place: int
    at_peak: tuple[float, ...]
    kept: tuple[float, ...]
    flops: float


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one simulation showed."""

    forward: tuple[Stretch, ...]
    forget: tuple[Stretch, ...]
    """The end of autocast: its copies of weights go."""
    backward: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Where the figures of a simulated model come from, for the plan."""

    model_type: str
    versions: dict[str, str]
    steps: int
    """Steps that were simulated, now or before."""
    seconds: float
    """Seconds that they took."""
    cached: bool
    """All of them were simulated before."""
    attention: str | None
    """Attention with a mask or scores, where the model's code takes no kernel without; else null."""


class Simulation(Protocol):
    """A model that can be simulated."""

    def applied(self, made: Training, method: Method, precision: Precision, *, deepspeed: bool) -> Training:
        """The training with the values that the model really trains, its shape bound to the method."""
        ...

    def record(
        self, setting: Setting, layers: Sequence[int], again: Sequence[bool], *, held: bool, quiet: bool
    ) -> Recorded:
        """A step of those layers, some of which are computed `again` in the backward pass; `held`: gradients of an
        earlier micro batch are there; `quiet`: a forward pass of which nothing is kept. RequestError where it cannot
        be simulated."""
        ...

    def facts(self) -> Facts:
        """For the plan."""
        ...


def step_of(shape: Shape, setting: Setting, trains: TrainableLayers, has_gradients: bool = False) -> Step:
    """One micro batch, as `replay_step`: by arithmetic, or simulated where that does not know the layers."""
    if shape.simulation is None:
        return replay_step(shape, setting, trains, has_gradients)
    return _simulated(shape, setting, trains, has_gradients)[0]


def simulated_flops(shape: Shape, setting: Setting, trains: TrainableLayers) -> tuple[float, float]:
    """Operations of a micro batch: of its forward pass, and of all of it."""
    return _simulated(shape, setting, trains, False)[1]


@lru_cache(maxsize=4096)
def _simulated(
    shape: Shape, setting: Setting, trains: TrainableLayers, has_gradients: bool
) -> tuple[Step, tuple[float, float]]:
    assert shape.simulation is not None
    quiet = not any(kind.weights or kind.adapters for pattern, _ in trains.runs for kind in pattern)
    runs = checkpointed_runs(trains.runs, setting.checkpointing)
    shown = list(_shown(runs))
    layers, again = [layer for layer, _, _ in shown], [kind.again for _, kind, _ in shown]
    seen = shape.simulation.record(setting, layers, again, held=has_gradients, quiet=quiet)
    counts = [1, *(count for _, _, count in shown), 1]
    groups = _groups(runs)

    def grouped(stretches: Sequence[Stretch]) -> list[tuple[list[tuple[Segment, int]], int]]:
        each = groupby(stretches, key=lambda one: groups[one.place])
        return [([(_segment(one), 1) for one in some], counts[some[0].place]) for some in (list(g) for _, g in each)]

    forward, held = stretched(grouped(seen.forward))
    _, held = stretched(grouped(seen.forget), held)
    backward, _ = stretched(grouped(seen.backward), held)
    once = sum(one.flops * counts[one.place] for one in seen.forward)
    back = sum(one.flops * counts[one.place] for one in seen.backward)
    return Step(_peak(forward), _peak(backward), _peak(held)), (once, once + back)


def _segment(one: Stretch) -> Segment:
    return Segment("", one.place, at_peak=one.at_peak, kept=one.kept)


Runs = tuple[tuple[tuple[LayerKind, ...], int], ...]


def _repetitions(runs: Runs) -> Iterator[tuple[int, tuple[LayerKind, ...], int]]:
    """The first layer of every repetition that is simulated, its pattern, and for how many it stands."""
    start = 0
    for pattern, count in runs:
        shown = min(count, SHOWN)
        for i in range(shown):
            number = count - 1 if i == SHOWN - 1 else i
            yield start + number * len(pattern), pattern, count - SHOWN + 1 if i == 1 and shown == SHOWN else 1
        start += count * len(pattern)


def _shown(runs: Runs) -> Iterator[tuple[int, LayerKind, int]]:
    """Every layer that is simulated, what trains in it, and for how many it stands."""
    for first, pattern, count in _repetitions(runs):
        for offset, kind in enumerate(pattern):
            yield first + offset, kind, count


def _groups(runs: Runs) -> list[int]:
    """The repetition that a stretch is in: the embedding and the head are their own."""
    found = [0]
    for number, (_, pattern, _) in enumerate(_repetitions(runs), 1):
        found += [number] * len(pattern)
    return [*found, found[-1] + 1]


def _peak(kinds: tuple[float, ...]) -> Peak:
    return Peak(sum(kinds), dict(zip(KINDS, kinds, strict=True)))
