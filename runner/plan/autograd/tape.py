"""Autograd on sizes alone: what torch would hold at every moment of a step, without torch and without tensors.

An operation makes a `Tensor`, which has a size and nothing in it. CPython's reference counting ends its life
exactly where it would end a real tensor's, so a layer written here like the layer in transformers has the
same peak. What an operation keeps for its backward pass it hands to `keep`: closures capture numbers only.

Sizes are bytes. `benchmarks/memory_accuracy.py` compares the result with real models on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from sys import getrefcount
from typing import Any, Literal

Kind = Literal["activations", "casts", "head", "gradients"]
ACTIVATIONS, CASTS, HEAD, GRADIENTS = range(4)
KINDS = ("activations", "weight_casts", "head_and_loss", "gradients")


class Storage:
    """Bytes that are held as long as somebody refers to them."""

    __slots__ = ("kind", "size", "tape", "viewed", "width")

    def __init__(self, tape: Tape, size: float, width: int, kind: int) -> None:
        self.tape, self.size, self.width, self.kind, self.viewed = tape, size, width, kind, False
        """`viewed`: a gradient that is a view, whose base has the storage, too: nothing is added to it in place."""
        tape.live = live = tape.live + size
        if kind:  # most are activations, and those are what the others leave of `live`
            tape.by_kind[kind] += size
        if live > tape.peak:
            tape.peak = live
            tape.rising = True

    def __del__(self) -> None:
        tape = self.tape
        if tape.rising:  # the peak is over: what was it made of?
            tape.at_peak = tape.kinds()
            tape.rising = False
        tape.live -= self.size
        if self.kind:
            tape.by_kind[self.kind] -= self.size


class Bundle(Storage):
    """Several gradients on their way to one step."""

    __slots__ = ("grads",)

    def __init__(self, tape: Tape, grads: list[Storage | None]) -> None:
        super().__init__(tape, 0.0, 0, ACTIVATIONS)
        self.grads = grads


class EnoughMade(Exception):
    """Everything that a checkpointed stretch had kept has been made again (`_StopRecomputationError` of torch)."""


class Frame:
    """A checkpointed stretch of the forward pass: what it would have kept is made again when it is first needed.

    torch.utils.checkpoint without re-entry: `again` runs the stretch once more and stops at the last thing kept.
    """

    __slots__ = ("again", "count", "held", "made")

    def __init__(self, again: Callable[[], object]) -> None:
        self.again, self.count = again, 0
        self.made: list[Stored | None] | None = None
        self.held: list[Storage] = []


class Promise:
    """In place of something kept: where the frame will have it."""

    __slots__ = ("frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame, self.index = frame, index


Stored = tuple["Storage | None", ...]


Kept = Stored | Promise | None


class Node:
    """One step of the backward pass, or a leaf that collects its gradient."""

    __slots__ = ("backward", "grad", "kept", "ports", "segment", "trained", "width")

    def __init__(
        self, width: int, backward: Backward | None, segment: int, kept: Kept = None, trained: bool = False
    ) -> None:
        self.width, self.backward, self.segment, self.kept, self.trained = width, backward, segment, kept, trained
        """`width`: bytes of a number of the result, to which the engine casts a gradient that is wider."""
        self.grad: Storage | None = None
        self.ports: list[Node] | None = None
        """Of an operation with several results: where their gradients wait."""


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
        """What is live of each kind but activations: `kinds` has those as well."""
        self.at_peak = [0.0, 0.0, 0.0, 0.0]
        self.rising = False
        self.nodes: list[Node] = []
        self.segments: list[Segment] = []
        self.frame: Frame | None = None
        self.held: list[Storage] = []
        """What lives as long as the loss."""
        self.has_gradients = False
        self.gradients: list[Storage] = []
        self.cache: dict[Any, tuple[Storage, Node | None]] = {}
        """Autocast's copies of weights: (segment, name) → copy and where its gradient goes."""
        self.current = 0

    def kinds(self) -> list[float]:
        """Return the live sizes by kind."""
        found = self.by_kind.copy()
        found[ACTIVATIONS] = self.live - sum(found)
        return found

    def new(self, values: float, width: int, kind: int = ACTIVATIONS) -> Storage:
        """Bytes for `values` numbers of `width` bytes."""
        return Storage(self, values * width, width, kind)

    def keep(self, *storages: Storage | None) -> Kept:
        """Keep something for the backward pass, where torch packs it: inputs before an operation, its result after.

        None stands for what is there anyway (a weight, a number): it counts, because a checkpoint counts it.
        """
        frame = self.frame
        if frame is None:
            return storages
        if frame.made is None:
            frame.count += 1
            return Promise(frame, frame.count - 1)
        frame.made.append(storages)
        if len(frame.made) == frame.count:
            raise EnoughMade
        return None

    def promises(self) -> bool:
        """The first pass of a checkpoint: what is kept now is made again later."""
        return self.frame is not None and self.frame.made is None

    def hold(self, storage: Storage) -> None:
        """Keep something in an attribute of a `torch.autograd.Function`: until the loss goes, checkpointed or not."""
        again = self.frame is not None and self.frame.made is not None
        (self.frame.held if again and self.frame else self.held).append(storage)

    def node(self, width: int, backward: Backward, kept: Kept = None) -> Node:
        """Put a step of the backward pass on the tape; `width` is its result's."""
        if self.frame is not None and self.frame.made is not None:
            return AGAIN
        node = Node(width, backward, self.current, kept)
        self.nodes.append(node)
        return node

    def fork(self, width: int, backward: Backward, results: int) -> list[Node]:
        """A step with several results; its gradient is a `Bundle`."""
        node = self.node(width, backward)
        if node is AGAIN:
            return [AGAIN] * results
        node.ports = [self.leaf(width, trained=False) for _ in range(results)]
        return node.ports

    def leaf(self, width: int, trained: bool = True) -> Node:
        """A parameter (or an input that is made to require a gradient): it collects its gradient and keeps it."""
        return Node(width, None, self.current, None, trained)

    def checkpoint(self, again: Callable[[], Tensor]) -> Tensor:
        """Run a stretch of the forward pass of which only what `again` holds is kept."""
        self.frame = Frame(again)
        out = again()
        self.frame = None
        return out

    def _made(self, promise: Promise) -> Stored | None:
        """What was promised; the first to ask has the whole stretch made again."""
        frame = promise.frame
        if frame.made is None:
            frame.made = []
            cache, self.cache, self.frame = self.cache, {}, frame
            with suppress(EnoughMade):
                frame.again()
            self.cache, self.frame = cache, None
            frame.held.clear()
        found, frame.made[promise.index] = frame.made[promise.index], None
        return found

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
        kinds = self.kinds()
        self.peak, self.at_peak, self.rising = self.live, kinds, False
        return self.live, kinds

    def _close(self, segment: Segment, start: float, kinds: list[float]) -> None:
        now = self.kinds()
        if self.rising:
            self.at_peak, self.rising = now, False
        segment.peak = self.peak - start
        segment.change = self.live - start
        segment.at_peak = tuple(a - b for a, b in zip(self.at_peak, kinds, strict=True))
        segment.kept = tuple(a - b for a, b in zip(now, kinds, strict=True))

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

    def _step(self, node: Node) -> None:
        grad, node.grad = node.grad, None
        if node.ports is not None:
            grad = self._ported(node.ports)
        kept, node.kept = node.kept, None
        if grad is None:
            node.backward = None
            return
        assert node.backward is not None
        if type(kept) is Promise:
            kept = self._made(kept)
            results = node.backward(grad)
            kept = None  # nobody but the step held what was made again
        else:
            results = node.backward(grad)
        for target, piece in results:
            if piece.width != target.width:
                self._validate(results)
                break
        node.backward = kept = None  # what the step had kept is let go before its results go on
        del grad
        while results:
            target, piece = results.pop()
            self.collect(target, piece)

    def _validate(self, results: list[tuple[Node, Storage]]) -> None:
        """The engine casts every gradient to the type of what it is the gradient of (`validate_outputs`)."""
        for i, (target, piece) in enumerate(results):
            if piece.width != target.width:
                results[i] = (target, Storage(self, piece.size / piece.width * target.width, target.width, piece.kind))

    def _ported(self, ports: list[Node]) -> Storage | None:
        """The gradients of several results; those that nobody used are zeros."""
        grads = [port.grad for port in ports]
        for port in ports:
            port.grad = None
        if all(grad is None for grad in grads):
            return None
        return Bundle(self, grads)

    def collect(self, target: Node, piece: Storage) -> None:
        """Add a gradient to what `target` has already: in place where torch does (`InputBuffer::accumulate`)."""
        old = target.grad
        if target.trained:
            if old is None and not self.has_gradients:
                if piece.kind:
                    self.by_kind[piece.kind] -= piece.size
                self.by_kind[GRADIENTS] += piece.size
                piece.kind = GRADIENTS
                target.grad = piece
                self.gradients.append(piece)
        elif old is None:
            target.grad = piece
        elif old.viewed or getrefcount(old) > 3:  # somebody else has it: 3 are target.grad, `old` and the argument
            target.grad = Storage(self, old.size, old.width, old.kind)


AGAIN = Node(0, None, 0)
"""The node of everything that is made again: the backward pass runs over the nodes of the first time."""
