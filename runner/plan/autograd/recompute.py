"""What a checkpointed stretch of the forward pass keeps instead of its tensors (`torch.utils.checkpoint`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.plan.autograd.tape import Storage


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
