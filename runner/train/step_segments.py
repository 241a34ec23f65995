"""Live bytes and operations of a step that runs on fake tensors, by stretch: the embedding, each layer, the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch.utils.flop_counter import flop_registry

from runner.train.fake_tensors import FlashAttention, LiveBytes

ACTIVATIONS, CASTS, HEAD, GRADIENTS = range(4)


class Segments(LiveBytes):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Live bytes and operations by stretch of a step: the embedding, each layer, the head; forward, then backward."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head, self.phase = head, "forward"
        self.records: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
        self.by_kind = [0, 0, 0, 0]
        self.making = ACTIVATIONS
        self.dropped: dict[int, list[int]] = {}
        self.done: list[dict[str, Any]] = []
        self.at = -1
        self.flops = self.flash = 0
        self.start, self.top, self.at_top = [0, 0, 0, 0], 0, [0, 0, 0, 0]

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and count its products."""
        is_cast = func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter)
        self.making = CASTS if is_cast else HEAD if self.at == self.head else ACTIVATIONS
        result = super().run(func, args, kwargs)
        self.flops += _flops(func, args, kwargs, result)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Add the tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        if storage in self.records:
            return
        record = [storage.nbytes(), self.making, self.at]
        self.records[storage] = record
        self.by_kind[record[1]] += record[0]
        finalize(storage, self._died, record)
        if sum(self.by_kind) > self.top:
            self.top, self.at_top = sum(self.by_kind), self.by_kind.copy()

    def _died(self, record: list[int]) -> None:
        size, kind, born = record
        self.by_kind[kind] -= size
        self.dropped.setdefault(born, [0, 0, 0, 0])[kind] += size

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """A gradient has come to its weight, and stays."""
        record = self.records.get(tensor.untyped_storage())
        if record is not None and record[1] != GRADIENTS:
            self.by_kind[record[1]] -= record[0]
            self.by_kind[GRADIENTS] += record[0]
            record[1] = GRADIENTS

    def enter(self, at: int) -> None:  # type: ignore[override]  # a stretch in place of a phase
        """Stretch `at` begins."""
        self.close()
        self.at, self.flops, self.flash = at, 0, FlashAttention.flops
        self.start = self.at_top = self.by_kind.copy()
        self.top = sum(self.start)

    def close(self) -> None:
        """The stretch ends."""
        if self.at >= 0:
            at_peak = [a - b for a, b in zip(self.at_top, self.start, strict=True)]
            kept = [a - b for a, b in zip(self.by_kind, self.start, strict=True)]
            self.done.append(
                {
                    "index": self.at,
                    "at_peak": at_peak,
                    "kept": kept,
                    "flops": self.flops + FlashAttention.flops - self.flash,
                }
            )
        self.at = -1

    def taken(self) -> list[dict[str, Any]]:
        """The stretches since the last call."""
        self.close()
        done, self.done = self.done, []
        return done


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Operations of a product, as torch's FlopCounterMode counts them; that of experts it does not know."""
    if func is torch.ops.aten._grouped_mm.default:
        a, b = args[0].shape, args[1].shape
        return int(2 * a[-2] * a[-1] * b[-1])  # rows of `a` in groups, or its columns
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _first(value: Any) -> torch.Tensor:
    """The hidden states among a layer's arguments or results."""
    return value if isinstance(value, torch.Tensor) else next(v for v in value if isinstance(v, torch.Tensor))


@contextmanager
def watched(shown: Any, counter: Segments) -> Iterator[None]:
    """Stretches begin where layers do: in the forward pass by hooks of modules, in the backward pass of their results.

    A layer that is made again calls no hook (`GradientCheckpointingLayer`), or one that the phase silences.
    """
    last = len(shown)

    def begins(at: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if counter.phase == "forward":
                counter.enter(at)
                hidden = _first(args or tuple(kwargs.values()))
                if at == 1 and hidden.requires_grad:
                    hidden.register_hook(lambda grad: counter.enter(0))  # type: ignore[no-untyped-call]  # likewise

        return hook

    def ends(at: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, result: Any) -> None:
            if counter.phase == "forward":
                hidden = _first(result)
                if hidden.requires_grad:
                    hidden.register_hook(lambda grad: counter.enter(at))  # type: ignore[no-untyped-call]  # likewise
                if at == last:
                    counter.enter(last + 1)

        return hook

    handles = []
    for at, layer in enumerate(shown, 1):
        handles.append(layer.register_forward_pre_hook(begins(at), with_kwargs=True))
        handles.append(layer.register_forward_hook(ends(at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
