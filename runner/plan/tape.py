"""Autograd on sizes alone: what torch would hold at every moment of a step, without torch and without tensors.

An operation makes a `Tensor`, which has a size and nothing in it. CPython's reference counting ends its life
exactly where it would end a real tensor's, so a layer written here like the layer in transformers has the
same peak. What an operation keeps for its backward pass is what its closure captures.

Sizes are bytes. `benchmarks/memory_accuracy.py` compares the result with real models on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from sys import getrefcount
from typing import Any, Literal

Kind = Literal["activations", "casts", "head", "gradients"]
ACTIVATIONS, CASTS, HEAD, GRADIENTS = range(4)
KINDS = ("activations", "weight_casts", "head_and_loss", "gradients")


class Storage:
    """Bytes that are held as long as somebody refers to them."""

    __slots__ = ("kind", "size", "tape")

    def __init__(self, tape: Tape, size: float, kind: int) -> None:
        self.tape, self.size, self.kind = tape, size, kind
        tape.live += size
        tape.by_kind[kind] += size
        if tape.live > tape.peak:
            tape.peak = tape.live
            tape.at_peak = tape.by_kind.copy()

    def __del__(self) -> None:
        self.tape.live -= self.size
        self.tape.by_kind[self.kind] -= self.size


class Node:
    """One step of the backward pass, or a leaf that collects its gradient."""

    __slots__ = ("backward", "grad", "segment", "trained")

    def __init__(self, backward: Backward | None, segment: int, trained: bool = False) -> None:
        self.backward, self.segment, self.trained = backward, segment, trained
        self.grad: Storage | None = None


Backward = Callable[[Storage], "list[tuple[Node, Storage]]"]


class Tensor:
    """`values` numbers of `width` bytes; `node` is None where no gradient flows."""

    __slots__ = ("node", "storage", "values", "width")

    def __init__(self, values: float, width: int, storage: Storage, node: Node | None = None) -> None:
        self.values, self.width, self.storage, self.node = values, width, storage, node


@dataclass(slots=True)
class Segment:
    """A stretch of the tape: bytes relative to its start."""

    name: str
    index: int
    """Which stretch of the forward pass it is, or goes back over."""
    peak: float = 0.0
    """Most that was held above what was held at the start."""
    change: float = 0.0
    """What is held at the end more than at the start."""
    at_peak: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """By kind, what was held at the peak more than at the start."""
    kept: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """By kind, the change."""


class Tape:
    """Records operations, counts bytes, runs backward."""

    def __init__(self) -> None:
        self.live = self.peak = 0.0
        self.by_kind = [0.0, 0.0, 0.0, 0.0]
        self.at_peak = [0.0, 0.0, 0.0, 0.0]
        self.nodes: list[Node] = []
        self.segments: list[Segment] = []
        self.recording = True
        self.has_gradients = False
        self.gradients: list[Storage] = []
        self.cache: dict[Any, tuple[Storage, Node | None]] = {}
        """Autocast's copies of weights: (segment, name) → copy and where its gradient goes."""
        self.current = 0

    def new(self, values: float, width: int, kind: int = ACTIVATIONS) -> Storage:
        """Bytes for `values` numbers of `width` bytes."""
        return Storage(self, values * width, kind)

    def node(self, backward: Backward) -> Node:
        """Put a step of the backward pass on the tape."""
        node = Node(backward, self.current)
        self.nodes.append(node)
        return node

    def leaf(self, trained: bool = True) -> Node:
        """A parameter (or the input of a layer that is computed again): it collects its gradient and keeps it."""
        return Node(None, self.current, trained)

    @contextmanager
    def segment(self, name: str) -> Iterator[None]:
        """Measure a stretch of the forward pass; the nodes made in it form one stretch of the backward pass."""
        self.current = len(self.segments)
        segment = Segment(name, self.current)
        self.segments.append(segment)
        start, kinds = self._open()
        yield
        self._close(segment, start, kinds)

    def _open(self) -> tuple[float, list[float]]:
        self.peak, self.at_peak = self.live, self.by_kind.copy()
        return self.live, self.by_kind.copy()

    def _close(self, segment: Segment, start: float, kinds: list[float]) -> None:
        segment.peak = self.peak - start
        segment.change = self.live - start
        segment.at_peak = tuple(a - b for a, b in zip(self.at_peak, kinds, strict=True))
        segment.kept = tuple(a - b for a, b in zip(self.by_kind, kinds, strict=True))

    def forget(self) -> list[Segment]:
        """The end of autocast: its copies of weights go, but for those that the backward pass needs."""
        found = []
        for index, segment in enumerate(self.segments):
            found.append(Segment(segment.name, index))
            start, kinds = self._open()
            for key in [key for key in self.cache if key[0] == index]:
                del self.cache[key]
            self._close(found[-1], start, kinds)
        return found

    def backward(self, loss: Tensor) -> list[Segment]:
        """Run the tape from its end; one segment per segment of the forward pass, in the order they are met."""
        assert loss.node is not None
        found: list[Segment] = []
        loss.node.grad = loss.storage
        current = self.nodes[-1].segment
        start, kinds = self._open()
        while self.nodes:
            node = self.nodes.pop()
            if node.segment != current:
                found.append(Segment(self.segments[current].name, current))
                self._close(found[-1], start, kinds)
                current = node.segment
                start, kinds = self._open()
            self._step(node)
        found.append(Segment(self.segments[current].name, current))
        self._close(found[-1], start, kinds)
        return found

    def run(self, nodes: list[Node], root: Node, grad: Storage) -> None:
        """Backward through `nodes` alone (a layer that was computed again)."""
        root.grad = grad
        del grad
        while nodes:
            self._step(nodes.pop())

    def _step(self, node: Node) -> None:
        grad, node.grad = node.grad, None
        if grad is None:
            node.backward = None
            return
        assert node.backward is not None
        results = node.backward(grad)
        node.backward = None  # what the step had kept is let go before its results go on
        del grad
        while results:
            target, piece = results.pop()
            self.collect(target, piece)

    def collect(self, target: Node, piece: Storage) -> None:
        """Add a gradient to what `target` has already: in place where torch does (`InputBuffer::accumulate`)."""
        old = target.grad
        if target.trained:
            if old is None and not self.has_gradients:
                self.by_kind[piece.kind] -= piece.size
                self.by_kind[GRADIENTS] += piece.size
                piece.kind = GRADIENTS
                target.grad = piece
                self.gradients.append(piece)
        elif old is None:
            target.grad = piece
        elif getrefcount(old) > 3:  # somebody else needs it: target.grad, `old`, and getrefcount's argument are 3
            shared = getrefcount(piece) > 3
            target.grad = Storage(self, old.size, old.kind) if shared else piece
