"""Uploads checkpoints during training; a failure is recorded and ends nothing."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from runner.errors import RunnerError
from runner.hub.upload import push_checkpoint, target_of
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec.train import PushSpec

CLOSING_S = 60.0
"""How long a training that has ended waits for a checkpoint on its way."""


class CheckpointPush:
    """One upload at a time; of the checkpoints that come meanwhile the newest is next."""

    def __init__(self, run: RunDir, push: PushSpec, note: Callable[[str], None]) -> None:
        self.run, self.push, self.note = run, push, note
        self.lock = threading.Lock()
        self.waiting: tuple[int, Path] | None = None
        self.thread: threading.Thread | None = None
        for left in run.path.glob(".pushing-*"):
            shutil.rmtree(left, ignore_errors=True)

    def offer(self, step: int) -> None:
        """A checkpoint is whole. It is linked at once, for the run may delete it before its turn comes."""
        if not self.push.every_steps or step % self.push.every_steps:
            return
        held = self.run.path / f".pushing-{step}"
        try:
            shutil.copytree(checkpoints.folder(self.run, step), held, copy_function=_link)
        except OSError as error:  # shutil.Error is one
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
        """Wait for what is on its way, a minute at most: a commit that is cut off changes nothing."""
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
