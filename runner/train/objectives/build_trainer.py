"""The model that trains, and the trainer of a run's objective around it."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback

from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import deepspeed_config, model_loading, moe_compat, peft_methods, trainer
from runner.train.guarded_trainer import LossGuardMixin
from runner.train.objectives.objective import Examples, Objective
from runner.train.token_cache import Tell, Tokenised


def tokenise(
    objective: Objective, examples: Examples, tokenizer: Any, tell: Tell | None = None
) -> tuple[Tokenised, Tokenised | None]:
    """Rows as the trainer takes them, training and held out; `tell` hears of the training rows that are done."""
    train = objective.tokenise(examples.train, tokenizer, tell)
    return train, objective.tokenise(examples.held, tokenizer, held=True) if examples.held else None


def load_model(spec: RunSpec, source: str, tokenizer: Any, loaded: Any = None) -> Any:
    """The model that trains: with a head for words, or for one number; new weights get the tokenizer's special ids.

    `loaded` is the model as model_loading makes it, where it is in memory already (preload.py).
    """
    if not spec.model.from_scratch:
        model_loading.check_vocabulary(spec, source, tokenizer)
    model = model_loading.load_model(spec, source) if loaded is None else loaded
    if spec.model.from_scratch:
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def settings(
    objective: Objective, run: RunDir, steps: int, report_to: list[str], deepspeed: dict[str, Any] | None = None
) -> Any:
    """TRL's settings for the objective."""
    return objective.settings(trainer.shared_settings(objective.spec, run, steps, report_to, deepspeed))


def build(
    objective: Objective,
    source: str,
    model: Any,
    tokenizer: Any,
    rows: tuple[Tokenised, Tokenised | None],
    **common: Any,
) -> LossGuardMixin:
    """The trainer, ready to train; `common` are its settings, guard and callbacks."""
    spec = objective.spec
    train, held = rows
    common |= {"train_dataset": train.rows, "eval_dataset": held.rows if held else None, "processing_class": tokenizer}
    config = peft_methods.adapter_config(spec, model)
    with moe_compat.prepared(model), peft_methods.refusals_of_peft(spec):
        made: Any = objective.trainer(source, model, config, common)
    made.remove_callback(PrinterCallback)
    made.learning_rate_ratio = getattr(spec.method, "learning_rate_ratio", 1.0)
    made.aux_loss_enabled = getattr(made, "aux_loss_enabled", False) and moe_compat.has_experts(model)
    peft_methods.widen(spec, made.model)
    if spec.deepspeed.name.startswith("zero3"):
        deepspeed_config.settle(made.model)
    trained: LossGuardMixin = made
    return trained
