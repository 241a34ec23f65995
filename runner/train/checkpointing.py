"""Checkpoints during training: when one is due, and its files made durable in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from runner.errors import RunFailedError
from runner.plan.cost import LARGEST_SHARE
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.train.distributed import Ranks
from runner.train.heartbeat import Heartbeat


class CheckpointSealer:
    """Flushes, checks and marks a checkpoint in a thread, then deletes those that it supersedes.

    The step that follows may run meanwhile: the files are written already, and nobody changes them.
    """

    def __init__(self, run: RunDir, ranks: Ranks, keep: int, pulse: Heartbeat | None = None,
                 sealed: Callable[[int], None] = lambda step: None) -> None:  # fmt: skip
        """`sealed` is told of each whole checkpoint, before any is deleted."""
        self.run, self.ranks, self.keep = run, ranks, keep
        self.sealed = sealed
        self.pulse = pulse or Heartbeat(run, ranks.rank)
        self.began = self.seconds = 0.0
        """When the last checkpoint was begun, and for how long it held up the training."""
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def clear(self, step: int) -> None:
        """Before a checkpoint is written: what an earlier attempt left there goes. Until it is written there is no
        sign of life, and whoever watches has to know why."""
        self.began = time.monotonic()
        self.pulse.beat("saving", now=True)
        self.wait()
        if self.ranks.main:
            checkpoints.discard(self.run, [step])
        self.ranks.barrier()

    def seal(self, step: int, best: int | None, noted: Mapping[str, Any]) -> None:
        """After it was written, by every process."""
        self.ranks.barrier()
        self.seconds = time.monotonic() - self.began
        self.pulse.beat("training", now=True)
        if not self.ranks.main:
            return
        self.thread = threading.Thread(target=self._work, args=(step, best, noted), name="seal")
        self.thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is sealed; raises what went wrong with it."""
        if self.thread is not None:
            self.pulse.beat("saving", now=True)
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """The run is done, its model saved: with `train.keep_checkpoints=0` nothing else stays."""
        if not self.keep:
            checkpoints.discard(self.run, checkpoints.steps(self.run))

    def _work(self, step: int, best: int | None, noted: Mapping[str, Any]) -> None:
        try:
            _check_held(checkpoints.folder(self.run, step))
            checkpoints.seal(checkpoints.folder(self.run, step), {"step": step, **noted})
            self.sealed(step)
            checkpoints.discard(self.run, checkpoints.superseded(self.run, max(1, self.keep), best))
        except BaseException as error:
            self.error = error


def _check_held(folder: Path) -> None:
    """RunFailedError for a checkpoint without weights (DeepSpeed's shards are named in `latest`) or trainer state."""
    weights = any(folder.glob("*.safetensors")) or (folder / "latest").is_file()
    if not weights or not (folder / "trainer_state.json").is_file():
        what = f"{folder} holds {'no trainer state' if weights else 'no weights'}, and does not count as a checkpoint"
        raise RunFailedError(what)


class SaveWhenDue(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Asks for a checkpoint when enough time has passed since the last one; transformers asks for those every n steps,
    and for the one after the last step."""

    def __init__(self, sealer: CheckpointSealer, minutes: float | None) -> None:
        self.sealer, self.minutes = sealer, minutes
        self.last = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """By the main process's clock, for all: they write together or wait for one another for ever."""
        if control.should_save or self.minutes is None:
            return
        wait = max(60 * self.minutes, self.sealer.seconds / LARGEST_SHARE)
        ranks = self.sealer.ranks
        control.should_save = ranks.any(ranks.main and time.monotonic() - self.last >= wait)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()
