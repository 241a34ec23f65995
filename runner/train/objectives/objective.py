"""Base class of the objectives: rows, columns, settings, trainer and reward of each in one place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypedDict, TypeVar, cast

from transformers import PrinterCallback

from runner.data.examples import Example, fingerprint
from runner.data.load import read_dataset
from runner.rundir.directory import RunDir
from runner.spec import DataSpec, RunSpec
from runner.train import adapter_config, deepspeed_config, trainable_weights
from runner.train.activation_checkpointing import checkpoint_every
from runner.train.distributed import Ranks
from runner.train.tokens.token_cache import OnProgress, Tokenised
from runner.train.trainers import trainer_settings
from runner.train.trainers.guarded_trainer import LossGuardMixin

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from runner.data.examples import Learnable
    from runner.train.checkpoint_saving import CheckpointSealer
    from runner.train.objectives.reward_functions import Reward
    from runner.train.trainers.loss_guard import LossGuard
    from runner.train.trainers.trainer_settings import SharedSettings

Own = TypeVar("Own")
"""The objective's part of the spec."""
Rewards = Callable[[list[str]], dict[str, float]]
"""Mean reward of answers to the held-out prompts, in all and by reward function."""


@dataclass(frozen=True)
class Examples:
    """Rows of a run, before tokenisation."""

    train: Any
    """A sequence, or a stream that knows its length."""
    held: Any | None
    fingerprint: str
    """SHA-256 over all of them."""
    prompts: list[Example]
    """Held-out rows with a prompt and one right answer, which the model answers before and after training."""
    note: str | None = None
    """What was left out, for people."""
    num_skipped: int = 0
    """Rows that were."""


class TrainerParts(TypedDict, total=False):
    """Arguments of a trainer beside its model and adapter."""

    args: TrainingArguments
    guard: LossGuard
    sealer: CheckpointSealer | None
    train_dataset: Dataset
    eval_dataset: Dataset | None
    processing_class: PreTrainedTokenizerBase
    ref_model: PreTrainedModel
    """For losses that compare with a reference."""
    reward_funcs: list[Reward]
    """For GRPO."""


class Objective(ABC, Generic[Own]):
    """Base class: how the worker trains for one objective.

    A class of your own, named by `objective.code`, is a subclass of the shipped one whose rows it takes (`Sft`, `Dpo`,
    …) and overrides what differs; `self.spec.objective.options` are its settings. What an objective adds to a step in
    the plan is in its class in `runner/spec/objective.py`.
    """

    per_token_loss: ClassVar[bool] = False
    """The held-out loss is a mean over tokens of text, so that it has a perplexity and can be measured of any text."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec

    @property
    def objective_spec(self) -> Own:
        """`spec.objective`, of the class that this objective is for."""
        return cast(Own, self.spec.objective)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def prepare(self, say: Callable[[str], None], beat: Callable[[], None], ranks: Ranks) -> None:
        """Do what has to be done before rows can be read; it may complete `self.spec`. Every process calls it."""

    def read(self) -> Examples:
        """The rows of a run, checked; RequestError with all that is wrong with them."""
        found = read_dataset(self.spec.data, self.spec.train.seed, self.spec.objective.learns_from)
        skipped = len({problem.source for problem in found.skipped})
        digest = fingerprint(chain(found.train, found.held))
        return Examples(found.train, found.held, digest, self.prompts(found.held), found.note, skipped)

    def prompts(self, held: Sequence[Learnable]) -> list[Example]:
        """Held-out rows whose prompts the model answers before and after training."""
        return []

    def judge(self, examples: Examples) -> Rewards | None:
        """Reward functions over answers to the held-out prompts; None without any."""
        return None

    def reading(self, path: Path) -> RunSpec:
        """The spec with all rows of a file in place of the run's own."""
        update: dict[str, Any] = {"source": "file", "path": str(path), "sources": [], "eval_path": None,
                  "eval_fraction": 0.0, "max_examples": None}  # fmt: skip
        data = DataSpec.model_validate(self.spec.data.model_dump() | update)
        return self.spec.model_copy(update={"data": data})

    @abstractmethod
    def tokenise(
        self, rows: Sequence[Learnable], tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress | None = None,
        *, held: bool = False,
    ) -> Tokenised:  # fmt: skip
        """Rows as the trainer takes them, from the cache or written to it; `on_progress` is called as they are done."""

    def tokenise_all(
        self, examples: Examples, tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress | None = None
    ) -> tuple[Tokenised, Tokenised | None]:
        """Training and held-out rows as the trainer takes them."""
        train = self.tokenise(examples.train, tokenizer, on_progress)
        return train, self.tokenise(examples.held, tokenizer, held=True) if examples.held else None

    # --- trainer ------------------------------------------------------------------------------------------------------

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps of the whole run over so many rows."""
        return self.spec.train.num_steps(num_rows, self.spec.hw.world_size)

    @abstractmethod
    def settings(self, shared: SharedSettings) -> TrainingArguments:
        """TRL's settings; `shared` are those that all objectives have."""

    def trainer_settings(
        self, run: RunDir, steps: int, report_to: list[str], deepspeed: dict[str, Any] | None = None
    ) -> TrainingArguments:
        """TRL's settings of the run's trainer; `deepspeed` is its resolved JSON."""
        return self.settings(trainer_settings.shared_settings(self.spec, run, steps, report_to, deepspeed))

    @abstractmethod
    def trainer(
        self, source: str, model: PreTrainedModel, adapter: PeftConfig | None, common: TrainerParts
    ) -> LossGuardMixin:
        """The trainer of `model` with PEFT's configuration `adapter` put on it; `common` are its other arguments."""

    def build_trainer(
        self, source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
        rows: tuple[Tokenised, Tokenised | None], *, args: TrainingArguments, guard: LossGuard,
        sealer: CheckpointSealer | None = None,
    ) -> LossGuardMixin:  # fmt: skip
        """The trainer, ready to train."""
        spec, (train, held) = self.spec, rows
        common: TrainerParts = {
            "args": args,
            "guard": guard,
            "sealer": sealer,
            "train_dataset": train.rows,
            "eval_dataset": held.rows if held else None,
            "processing_class": tokenizer,
        }
        checkpoint_every(model, spec.train.checkpoint_every)
        config = adapter_config.adapter_config(spec, model)
        with adapter_config.moe_compatible(model), adapter_config.explained_refusals(spec):
            made: Any = self.trainer(source, model, config, common)
        made.remove_callback(PrinterCallback)
        made.learning_rate_ratio = getattr(spec.method, "learning_rate_ratio", 1.0)
        made.muon = spec.train.optimizer == "muon"
        made.aux_loss_enabled = getattr(made, "aux_loss_enabled", False) and adapter_config.has_experts(model)
        trainable_weights.set_training_dtype(spec, made.model)
        trainable_weights.leave_casts_to_autocast(made.model)
        if spec.deepspeed.name.startswith("zero3"):
            deepspeed_config.prepare_for_zero3(made.model)
        trained: LossGuardMixin = made
        return trained
