"""Ctrl-C and SIGTERM in the worker: the step is finished, a checkpoint saved, the training stopped."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from runner.train.distributed import Ranks
from runner.train.trainers.recording_trainer import EvaluationInterrupted

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

SAME_SECONDS = 1.0
"""Two signals so close together are one. Who means it twice is helped by the launcher (launcher/supervisor.py)."""


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second one ends the process at once, but for one
    right after the first: what stops a whole service (systemd, Slurm) tells the launcher, who passes it on, and the
    worker.

    A measurement between two steps is cut short. Before the first step and after the last one nothing has to be
    finished: what there is to save is saved. Where there are several processes, a signal to one of them stops all,
    after the same step.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.received: int | None = None
        self.since = 0.0
        self.training = False
        self.stopping = False

    def install(self) -> None:
        """Handle SIGINT and SIGTERM."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self.since > SAME_SECONDS:
                os._exit(130)
            return
        self.received, self.since = number, now
        if not self.training:
            raise KeyboardInterrupt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agreed():
            control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.training and self.agreed():
            control.should_save = control.should_training_stop = True
            raise EvaluationInterrupted

    def agreed(self) -> bool:
        """True if any process has received a signal; all processes call it at the same point."""
        self.stopping = self.stopping or self.ranks.any(self.received is not None)
        return self.stopping

    def finish_training(self) -> bool:
        """Call when the last checkpoint is sealed; True if a signal stopped it. A later one ends the process."""
        stop = self.agreed()
        self.training = False
        if self.received is not None and not stop:  # just now
            raise KeyboardInterrupt
        return stop
