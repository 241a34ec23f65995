"""Records that every trainer keeps: token counts, and complete checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from runner.train.checkpointing import CheckpointSealer
from runner.train.distributed import Ranks
from runner.train.memory_stats import Peaks


def _names(checkpoint: Path) -> set[str]:
    """Names of a whole model's weights in a checkpoint; none where it holds an adapter, or is DeepSpeed's."""
    names: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


class CutShort(Exception):
    """A signal came in the middle of a measurement; raised by all processes at the same batch."""


class RecordingTrainerMixin:
    """Mixed in before a TRL trainer, which has no types: hence each `type: ignore` at a `super()`."""

    METRICS: ClassVar[Mapping[str, str]] = {}
    """TRL's name of a metric → ours, in `metrics.jsonl`, `evals.jsonl` and `summary.json`."""

    args: Any
    accelerator: Any
    control: Any
    model: Any
    processing_class: Any
    state: Any
    is_deepspeed_enabled: bool
    lr_scheduler: Any
    optimizer: Any
    is_in_train: bool

    positions = 0
    """Positions computed in the current step, padding included."""
    tokens = 0
    """Positions of the current step that hold a token."""
    learning_rate_ratio = 1.0
    """Learning rate of LoRA's B as a multiple of A's."""
    ranks = Ranks()
    noted: Mapping[str, Any] = {}
    """What a checkpoint says of itself: processes and ZeRO stage."""
    sealer: CheckpointSealer | None = None
    """Seals the checkpoints; None where none are kept (a bare trainer in a test)."""
    peaks: Peaks | None = None
    """Set once training has begun: a measurement between two steps is no part of its peak."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One micro batch, counted."""
        positions, tokens = self.sizes(inputs)
        self.positions += positions
        self.tokens += tokens
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def sizes(self, inputs: Any) -> tuple[int, int]:
        """Positions of a micro batch, and how many of them hold a token; `inputs["attention_mask"]` is [b, s]."""
        return inputs["attention_mask"].numel(), int(inputs["attention_mask"].sum())

    def measured(self, logs: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
        """The objective's own metrics among what TRL logs, under our names."""
        found = {ours: logs.get(prefix + name) for name, ours in self.METRICS.items()}
        return {name: float(value) for name, value in found.items() if value is not None}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: to count them the trainer walks through all modules at every step, and nobody reads `total_flos`."""
        return 0

    def take_counts(self) -> tuple[int, int]:
        """Positions and tokens of all processes since the last call."""
        positions, tokens = self.ranks.total([self.positions, self.tokens])
        self.positions = self.tokens = 0
        return int(positions), int(tokens)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, for a run that was ended after its last step: transformers would take one step more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """A signal cuts a measurement short: the checkpoint is written at once, and `measure_again` makes up for it."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except CutShort:
            self.control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]  # what was logged is not again

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if self.peaks is None:
            return super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        self.peaks.end("train")
        try:
            return super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.peaks.end("eval")

    def measure_again(self) -> None:
        """The held-out loss after the step that a run goes on after, with all that hangs on it."""
        found = self._evaluate(None, None)
        self._determine_best_metric(found, None)  # type: ignore[attr-defined]

    def replay_evaluation(self, logged: Mapping[str, float]) -> None:
        """Log a measurement of the held-out loss that another run has made, as `evaluate` does its own."""
        found = dict(logged)
        self.log(found)  # type: ignore[attr-defined]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)  # type: ignore[attr-defined]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """LoRA+: every B in a group of its own with a larger learning rate, as `peft.optimizers.loraplus` has it."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self.learning_rate_ratio == 1:
            return optimizer
        second = {id(p) for name, p in self.model.named_parameters() if ".lora_B." in name}
        for group in list(optimizer.param_groups):
            faster = [p for p in group["params"] if id(p) in second]
            if faster:
                group["params"] = [p for p in group["params"] if id(p) not in second]
                rate = group["lr"] * self.learning_rate_ratio
                optimizer.param_groups.append({**group, "params": faster, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def follow_schedule(self) -> None:
        """The next step's learning rate from the schedule in force: in the checkpoint of a run that is made longer lies
        that of the shorter one, which may have come to 0. All our schedules are torch's LambdaLR."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [base * share(scheduler.last_epoch) for base, share in pairs]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Every process writes its part; then the whole is sealed beside the training."""
        if self.sealer is None:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        step = self.state.global_step
        self.sealer.clear(step)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.sealer.seal(step, self.state.best_global_step, self.noted)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """peft 0.21 makes an adapter fp32 as it loads it, and TRL trains one over a packed base in bf16: it goes on in
        the precision it had, or a resumed run takes other steps than one that nobody stopped.

        A model is saved under the names it was published with, and transformers 5.23 resumes by the names it computes
        with, silently leaving out what it does not find: all experts of a mixture. Such a checkpoint is opened as a
        model is, in fp32, which holds 16 bits exactly.
        """
        if _names(Path(resume_from_checkpoint)) - self.model.state_dict().keys():
            saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
            self.model.load_state_dict(saved.state_dict())
            return
        before = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for name, parameter in self.model.named_parameters():  # new ones, in part
            if parameter.requires_grad:
                parameter.data = parameter.data.to(before[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Not into DeepSpeed's checkpoints: they hold the weights already, and ZeRO-3 would gather them all."""
        if not (_internal_call and self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
