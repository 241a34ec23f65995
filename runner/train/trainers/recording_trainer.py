"""Trainer mixin that counts tokens, seals checkpoints, and resumes from them exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import safe_open

from runner.train.checkpoint_saving import CheckpointSealer
from runner.train.distributed import Ranks
from runner.train.memory_stats import Peaks
from runner.train.trainers.muon import muon_of

Batch = dict[str, Any]
"""Tensors of a micro batch, [b, s] each, and its row ids as a list; of GRPO a list of rows."""
Count = int | torch.Tensor
"""A number that may be on the GPU still: to read it would make the host wait for all work before it."""
NumItems = torch.Tensor | int | None
"""Tokens of a whole step, over which its loss is a mean."""
Loss = torch.Tensor | tuple[torch.Tensor, Any]
"""The loss, with the model's output where that is asked for."""

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, Trainer, TrainerControl
else:
    Trainer = object


def _names(checkpoint: Path) -> set[str]:
    """Names of the weights in a checkpoint of a whole model; empty for an adapter or DeepSpeed's shards."""
    names: set[str] = set()
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


class EvaluationInterrupted(Exception):
    """A signal interrupted a measurement; raised by all processes at the same batch."""


class RecordingTrainerMixin(Trainer):  # type: ignore[misc]  # transformers has no types
    """Mixed in before a TRL trainer: counts tokens, and seals and loads checkpoints."""

    METRICS: ClassVar[Mapping[str, str]] = {}
    """TRL's name of a metric → ours, in `metrics.jsonl`, `evals.jsonl` and `summary.json`."""

    control: TrainerControl

    positions = 0
    """Positions computed in the current step, padding included."""
    tokens: Count = 0
    """Positions of the current step that hold a token; read once, when the step is over."""
    learning_rate_ratio = 1.0
    """Learning rate of LoRA's B as a multiple of A's."""
    muon = False
    """Matrices of the layers are updated by Muon."""
    ranks = Ranks()
    sealer: CheckpointSealer | None = None
    """Seals the checkpoints; None where none are kept (a bare trainer in a test)."""
    peaks: Peaks | None = None
    """Set once training has begun: a measurement between two steps is no part of its peak."""

    def training_step(self, model: PreTrainedModel, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro batch, counted."""
        positions, tokens = self.sizes(inputs)
        self.positions += positions
        self.tokens += tokens
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def sizes(self, inputs: Batch) -> tuple[int, Count]:
        """Positions of a micro batch, and how many of them hold a token; `inputs["attention_mask"]` is [b, s]."""
        return inputs["attention_mask"].numel(), inputs["attention_mask"].sum()

    def own_metrics(self, logs: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
        """The objective's metrics among those that TRL logs, under our names."""
        found = {ours: logs.get(prefix + name) for name, ours in self.METRICS.items()}
        return {name: float(value) for name, value in found.items() if value is not None}

    def floating_point_ops(self, inputs: Batch) -> int:
        """0: counting walks through all modules at every step, and nothing reads `total_flos`."""
        return 0

    def take_counts(self) -> tuple[int, int]:
        """Positions and tokens of all processes since the last call."""
        positions, tokens = self.ranks.all_reduce_sum([self.positions, int(self.tokens)])
        self.positions = self.tokens = 0
        return int(positions), int(tokens)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skip the epoch of a run that ended after its last step: transformers would take one more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """A signal interrupts a measurement: the checkpoint is written at once, `repeat_evaluation` makes up for it."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationInterrupted:
            self.control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.peaks is not None:
            self.peaks.end("train")
        try:
            found: dict[str, float] = super()._evaluate(*args, **kwargs)
        finally:
            if self.peaks is not None:
                self.peaks.end("eval")
        return found

    def repeat_evaluation(self) -> None:
        """Measure the held-out loss after the step that the run resumes from, and update the best metric."""
        found = self._evaluate(None, None)
        self._determine_best_metric(found, None)

    def replay_evaluation(self, logged: Mapping[str, float]) -> None:
        """Log a measurement of the held-out loss that another run has made, as `evaluate` does its own."""
        found = dict(logged)
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Muon where it was asked for. LoRA+: every B in a group of its own with a larger learning rate, as
        `peft.optimizers.loraplus` has it."""
        if self.muon and not getattr(self, "optimizer", None):
            self.optimizer: Any = muon_of(self.model, self.args, self.get_decay_parameter_names(self.model))
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
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
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        rates = [base * share(scheduler.last_epoch) for base, share in pairs]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _save_checkpoint(self, model: PreTrainedModel, trial: None) -> None:
        """Write this process's part of a checkpoint, then have the sealer complete it in the background."""
        if self.sealer is None:
            super()._save_checkpoint(model, trial)
            return
        step = self.state.global_step
        self.sealer.clear(step)
        super()._save_checkpoint(model, trial)
        self.sealer.seal(step, self.state.best_global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
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
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():  # new ones, in part
            if parameter.requires_grad:
                parameter.data = parameter.data.to(before[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save no model into DeepSpeed's checkpoints, which hold the weights: ZeRO-3 would gather them all."""
        if not (_internal_call and self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
