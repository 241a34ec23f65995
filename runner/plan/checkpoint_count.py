"""Number of checkpoints a run writes and keeps on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runner.spec import TrainSpec

LARGEST_SHARE = 0.05
"""Of the time, for checkpoints by the clock: one that takes a minute to write comes every 20 minutes at most."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """What a run writes to go on from."""

    written: int | None
    """In all, the one after the last step included; None where the run's length is not known."""
    at_once: int
    """On the disk at the same time: the oldest goes after the newest is complete."""
    minutes: float | None
    """Between two of them by the clock; None where only steps count."""


def checkpoints_of(
    train: TrainSpec, *, seconds: float, step_seconds: float | None, num_steps: int | None
) -> Checkpoints:
    """`seconds` is what one takes to write. What is not known counts as a long run."""
    minutes = None
    if train.save_every_minutes is not None:
        minutes = max(train.save_every_minutes, seconds / LARGEST_SHARE / 60)
    most = max(1, train.keep_checkpoints) + 1
    if minutes is None and train.save_every_steps is None:
        return Checkpoints(1, 1, None)
    between = float(train.save_every_steps or math.inf)  # steps
    if minutes is not None and step_seconds is not None:
        between = min(between, max(1, math.ceil(60 * minutes / step_seconds)))
    if num_steps is None or (minutes is not None and step_seconds is None):
        return Checkpoints(None, most, minutes)
    written = math.ceil((num_steps - 1) // between) + 1
    return Checkpoints(written, min(most, written), minutes)
