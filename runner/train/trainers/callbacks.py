"""Callbacks of the trainer: `metrics.jsonl`, progress, early stopping."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from runner.report.progress import Progress
from runner.rundir.directory import RunDir
from runner.train.memory_stats import GIB, gpu_in_use
from runner.train.trackers import Tracker
from runner.train.trainers.recording_trainer import RecordingTrainerMixin

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class MetricsWriter(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """One line of `metrics.jsonl` per optimiser step, one of `evals.jsonl` per evaluation."""

    def __init__(
        self, trainer: RecordingTrainerMixin, run: RunDir, progress: Progress, main: bool = True, start: int = 0,
        tracker: Tracker | None = None,
    ) -> None:  # fmt: skip
        self.trainer, self.run, self.progress, self.main = trainer, run, progress, main
        self.start, self.tracker = start, tracker
        self.started = 0.0
        self.seconds = 0.0
        lines = [line for line in run.metrics() if line["step"] <= start]  # of the run's earlier part
        self.tokens = round(sum(line["effective_tokens_per_second"] * line["step_seconds"] for line in lines))
        self.positions = round(sum(line["tokens_per_second"] * line["step_seconds"] for line in lines))
        self.total_seconds = sum(line["step_seconds"] for line in lines)
        self.losses: list[float] = [line["loss"] for line in lines]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds = clock() - self.started

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        logs = logs or {}
        if "eval_loss" in logs:
            own = self.trainer.own_metrics(logs, "eval_")
            line = {"step": state.global_step, "loss": logs["eval_loss"], **own, "time": time.time()}
            known = [(kept["step"], kept["loss"]) for kept in self.run.evals()]
            if (line["step"], line["loss"]) not in known:  # measured again by a run that was ended after its last step
                self._append("evals.jsonl", line)
            if self.trainer.is_in_train and state.global_step > self.start:
                self.progress.note(f"  step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
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
            **self.trainer.own_metrics(logs),
            "tokens_per_second": positions / self.seconds,
            "effective_tokens_per_second": tokens / self.seconds,
            "step_seconds": self.seconds,
            "memory_gib": memory_gib(),
            "time": time.time(),
        }
        if logs.get("skipped"):
            line["skipped"] = True
        self._append("metrics.jsonl", line)
        self.progress.step(state.global_step, state.max_steps, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if not self.main:
            return
        with (self.run.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.tracker is not None:
            self.tracker.log(name, line)


class AtTrainBegin(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Calls a function when the trainer has prepared model and optimiser, and has made no step yet."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self.begin = begin

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin()


class StopEarly(EarlyStoppingCallback):  # type: ignore[misc]  # transformers has no types
    """Stop after `patience` measurements without a new best, with a checkpoint of the last step.

    transformers forgets the count when a run is resumed, or (`restore_callback_states_from_checkpoint`) changes the
    order of the callbacks.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        if kept:
            self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
        self._stop(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().on_evaluate(args, state, control, metrics, **kwargs)
        self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_save = control.should_training_stop = True


def clock() -> float:
    """Seconds of the clock, once all work launched on the GPU is done.

    The host waits for the GPU after `on_step_end` only, in `_maybe_log_save_evaluate`: without this a step would be as
    short as its launch.
    """
    if gpu_in_use():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_gib() -> float:
    """Memory held now: allocated on the GPU, resident on a CPU."""
    if gpu_in_use():
        return float(torch.cuda.memory_allocated() / GIB)
    return float(psutil.Process().memory_info().rss / GIB)
