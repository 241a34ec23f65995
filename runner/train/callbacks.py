"""What happens beside the steps: metrics.jsonl, progress, stopping on a signal, checkpoint markers."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from runner.report.progress import Progress
from runner.rundir import RunDir, write_atomically
from runner.train.peaks import GIB, gpu_in_use
from runner.train.trainer import CountingTrainer


class MetricsWriter(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """One line of `metrics.jsonl` per optimiser step, one of `evals.jsonl` per evaluation."""

    def __init__(self, run: RunDir, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.trainer: CountingTrainer | None = None
        self.started = 0.0
        self.seconds = 0.0
        self.tokens = self.positions = 0
        self.total_seconds = 0.0
        self.losses: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self._append("evals.jsonl", {"step": state.global_step, "loss": logs["eval_loss"], "time": time.time()})
            if self.trainer is not None and self.trainer.is_in_train:
                self.progress.note(f"  step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs or self.trainer is None:
            return
        positions, tokens = self.trainer.take_counts()
        self.positions, self.tokens = self.positions + positions, self.tokens + tokens
        self.total_seconds += self.seconds
        self.losses.append(float(logs["loss"]))
        line = {
            "step": state.global_step,
            "epoch": round(float(state.epoch or 0.0), 4),
            "loss": float(logs["loss"]),
            "grad_norm": float(logs.get("grad_norm", float("nan"))),
            "learning_rate": float(logs["learning_rate"]),
            "tokens_per_second": positions / self.seconds,
            "effective_tokens_per_second": tokens / self.seconds,
            "step_seconds": self.seconds,
            "memory_gib": memory_gib(),
            "time": time.time(),
        }
        self._append("metrics.jsonl", line)
        self.progress.step(state.global_step, state.max_steps, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.run.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.training = False

    def install(self) -> None:
        """Take over both signals."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.received is not None:
            os._exit(130)
        self.received = number
        if not self.training:  # nothing to save yet, or everything saved
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training = False


class MarkComplete(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """A checkpoint counts only with its marker, written after everything else."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_atomically(folder / "COMPLETE", f"{state.global_step}\n")


def memory_gib() -> float:
    """Memory held now: allocated on the GPU, resident on a CPU."""
    if gpu_in_use():
        return float(torch.cuda.memory_allocated() / GIB)
    return float(psutil.Process().memory_info().rss / GIB)
