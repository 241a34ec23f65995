"""Checkpoints during training: when one is due, sealed in the background, uploaded."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from runner.errors import RunFailedError, RunnerError
from runner.hub.upload import push_checkpoint, target_of
from runner.plan.cost import LARGEST_SHARE
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec.train import PushSpec
from runner.train.distributed import Ranks
from runner.train.heartbeat import Heartbeat

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class CheckpointSealer:
    """Flushes, checks and marks a checkpoint in a thread, then deletes those that it supersedes.

    The step that follows may run meanwhile: the files are written already, and nobody changes them.
    """

    def __init__(self, run: RunDir, ranks: Ranks, keep: int, heartbeat: Heartbeat | None = None,
                 sealed: Callable[[int], None] = lambda step: None, facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """`sealed` is told of each whole checkpoint, before any is deleted; `facts` are written into each."""
        self.run, self.ranks, self.keep = run, ranks, keep
        self.sealed, self.facts = sealed, facts
        self.heartbeat = heartbeat or Heartbeat(run, ranks.rank)
        self.began = self.seconds = 0.0
        """When the last checkpoint was begun, and for how long it held up the training."""
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def clear(self, step: int) -> None:
        """Begin a checkpoint: remove what an earlier attempt left. The phase is announced first: no heartbeat follows
        until it is written."""
        self.began = time.monotonic()
        self.heartbeat.beat("saving", now=True)
        self.wait()
        if self.ranks.main:
            checkpoints.discard(self.run, [step])
        self.ranks.barrier()

    def seal(self, step: int, best: int | None) -> None:
        """Seal the checkpoint that every process has written, in a thread of the main process."""
        self.ranks.barrier()
        self.seconds = time.monotonic() - self.began
        self.heartbeat.beat("training", now=True)
        if not self.ranks.main:
            return
        self.thread = threading.Thread(target=self._work, args=(step, best), name="seal")
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is sealed; raises its error."""
        if self.thread is not None:
            self.heartbeat.beat("saving", now=True)
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def finish(self) -> None:
        """End a run whose model is saved: with `train.keep_checkpoints=0` no checkpoint stays."""
        if not self.keep:
            checkpoints.discard(self.run, checkpoints.steps(self.run))

    def _work(self, step: int, best: int | None) -> None:
        try:
            _check_complete(checkpoints.folder(self.run, step))
            checkpoints.seal(checkpoints.folder(self.run, step), {"step": step, **self.facts})
            self.sealed(step)
            checkpoints.discard(self.run, checkpoints.superseded(self.run, max(1, self.keep), best))
        except BaseException as error:
            self.error = error


def _check_complete(folder: Path) -> None:
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide by the main process's clock for all: every process must write at the same step."""
        if control.should_save or self.minutes is None:
            return
        wait = max(60 * self.minutes, self.sealer.seconds / LARGEST_SHARE)
        ranks = self.sealer.ranks
        control.should_save = ranks.any(ranks.main and time.monotonic() - self.last >= wait)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = time.monotonic()


CLOSING_S = 60.0
"""How long a training that has ended waits for a checkpoint on its way."""


class CheckpointPush:
    """Uploads checkpoints during training, one at a time; of those sealed meanwhile the newest is next.

    A failed upload is reported and ends nothing.
    """

    def __init__(self, run: RunDir, push: PushSpec, note: Callable[[str], None]) -> None:
        self.run, self.push, self.note = run, push, note
        self.lock = threading.Lock()
        self.waiting: tuple[int, Path] | None = None
        self.thread: threading.Thread | None = None
        for left in run.path.glob(".pushing-*"):
            shutil.rmtree(left, ignore_errors=True)

    def enqueue(self, step: int) -> None:
        """Queue a sealed checkpoint. It is hard-linked at once: the run may delete it before its turn."""
        if not self.push.every_steps or step % self.push.every_steps:
            return
        held = self.run.path / f".pushing-{step}"
        try:
            shutil.copytree(checkpoints.folder(self.run, step), held, copy_function=_link)
        except OSError as error:  # shutil.Error is one
            shutil.rmtree(held, ignore_errors=True)
            self.note(f"the checkpoint after step {step} is not uploaded: {error}")
            return
        with self.lock:
            if self.waiting is not None:
                shutil.rmtree(self.waiting[1], ignore_errors=True)
            self.waiting = (step, held)
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="push", daemon=True)
                self.thread.start()

    def close(self) -> None:
        """Wait for the current upload, a minute at most: an interrupted commit changes nothing."""
        thread = self.thread
        if thread is not None:
            thread.join(CLOSING_S)

    def _work(self) -> None:
        while True:
            with self.lock:
                if self.waiting is None:
                    self.thread = None
                    return
                (step, held), self.waiting = self.waiting, None
            try:
                target = target_of(str(self.push.to))
                target.prepare()
                push_checkpoint(self.run, held, step, self.push.keep_checkpoints, target)
                self.note(f"Pushed  the checkpoint after step {step} to {self.push.to}")
            except (RunnerError, OSError) as error:
                self.note(f"the checkpoint after step {step} was not uploaded: {error}; the next one is tried")
            finally:
                shutil.rmtree(held, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
