"""Rows, model, settings and trainer of a run's objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from peft import get_peft_model
from transformers import PrinterCallback

from runner.data import load
from runner.data.examples import Example, PromptExample, Turn, kind_of
from runner.data.pretraining.workspace import workspace_of
from runner.plan.objective_passes import passes_of
from runner.rundir.directory import RunDir
from runner.spec import Dpo, Full, Grpo, Orpo, Pretrain, RunSpec, Sft
from runner.train import deepspeed_config, model_loading, moe_checks, peft_methods, token_dataset, trainer
from runner.train.guarded_trainer import GuardedTrainer, LossGuardMixin
from runner.train.model_loading import DTYPES
from runner.train.objectives import grpo, preference, preference_dataset, pretraining, rewards
from runner.train.objectives.pretraining import Shards
from runner.train.token_cache import Tell, Tokenised


@dataclass(frozen=True)
class Examples:
    """Rows as they were read."""

    train: Sequence[Any] | Shards
    held: Sequence[Any] | Shards | None
    fingerprint: str
    """SHA-256 over all of them."""
    asked: list[Example]
    """Held-out rows with a prompt and one right answer, which the model is asked."""
    note: str | None = None
    """What was left out, for people."""
    num_skipped: int = 0
    """Rows that were."""


def read(spec: RunSpec) -> Examples:
    """The rows of a run, checked; RequestError with all that is wrong with them."""
    place = workspace_of(spec.objective) if isinstance(spec.objective, Pretrain) else None
    if place is not None:
        train, val = pretraining.Shards(place.train), pretraining.Shards(place.val)
        return Examples(train, val if len(val) else None, f"{train.fingerprint}{val.fingerprint}", [])
    found = load.read_dataset(spec.data, spec.train.seed, kind_of(spec.objective.name))
    asked: list[Example] = []
    if isinstance(spec.objective, Sft):
        asked = [row for row in found.held if isinstance(row, Example) and row.completion]
    elif isinstance(spec.objective, Grpo):
        asked = [
            Example(row.prompt, _answer(row), tools=row.tools) for row in found.held if isinstance(row, PromptExample)
        ]
    return Examples(
        found.train,
        found.held,
        load.fingerprint(chain(found.train, found.held)),
        asked,
        found.note,
        len({p.source for p in found.skipped}),
    )


def _answer(row: PromptExample) -> list[Turn]:
    first = row.answer[0] if isinstance(row.answer, list) and row.answer else row.answer
    return [] if first is None else [{"role": "assistant", "content": str(first)}]


def judge(spec: RunSpec, examples: Examples) -> Callable[[list[str]], dict[str, float]] | None:
    """What the reward functions say of answers to the held-out prompts; None for other objectives."""
    objective = spec.objective
    if not isinstance(objective, Grpo):
        return None
    functions, weights = rewards.functions(objective), objective.reward_weights or [1.0] * len(objective.rewards)
    asked = [row for row in examples.held or () if isinstance(row, PromptExample)][: spec.eval.num_prompts]

    def of(answers: list[str]) -> dict[str, float]:
        table = load.columns(asked)
        said = [[{"role": "assistant", "content": answer}] for answer in answers]
        found = {}
        for function in functions:
            values = function(prompts=table["prompt"], completions=said, completion_ids=None, **_rest(table))
            found[f"reward_{function.__name__}"] = sum(values) / len(values)
        return {"reward": sum(w * v for w, v in zip(weights, found.values(), strict=True)), **found}

    return of


def _rest(table: dict[str, Any]) -> dict[str, Any]:
    return {name: column for name, column in table.items() if name != "prompt"}


def tokenise(
    examples: Examples, tokenizer: Any, spec: RunSpec, tell: Tell | None = None
) -> tuple[Tokenised, Tokenised | None]:
    """Rows as the trainer takes them, training and held out; `tell` hears of the training rows that are done."""
    make: Callable[..., Tokenised] = (
        token_dataset.tokenise if isinstance(spec.objective, Sft) else preference_dataset.tokenise
    )
    measured = make
    if isinstance(spec.objective, Pretrain):
        make, measured = pretraining.tokenise, partial(pretraining.tokenise, held=True)
    train = make(examples.train, tokenizer, spec, tell)
    return train, measured(examples.held, tokenizer, spec) if examples.held else None


def num_steps(spec: RunSpec, num_rows: int) -> int:
    """Optimiser steps of the whole run over so many rows."""
    if isinstance(spec.objective, Grpo):
        return grpo.num_steps(spec, num_rows)
    return trainer.num_steps(spec, num_rows)


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
    spec: RunSpec, run: RunDir, steps: int, report_to: list[str], deepspeed: dict[str, Any] | None = None
) -> Any:
    """TRL's settings for the objective."""
    if isinstance(spec.objective, (Sft, Pretrain)):
        return trainer.settings(spec, run, steps, report_to, deepspeed)
    shared = trainer.shared_settings(spec, run, steps, report_to, deepspeed)
    return grpo.config_of(spec, shared) if isinstance(spec.objective, Grpo) else preference.config_of(spec, shared)


def build(
    spec: RunSpec, source: str, model: Any, tokenizer: Any, rows: tuple[Tokenised, Tokenised | None], **common: Any
) -> LossGuardMixin:
    """The trainer, ready to train; `common` are its settings, guard and callbacks."""
    train, held = rows
    common |= {"train_dataset": train.rows, "eval_dataset": held.rows if held else None, "processing_class": tokenizer}
    config = peft_methods.adapter_config(spec, model)
    with moe_checks.prepared(model):
        made: Any = _made(spec, source, model, config, common)
    made.remove_callback(PrinterCallback)
    made.learning_rate_ratio = getattr(spec.method, "learning_rate_ratio", 1.0)
    made.aux_loss_enabled = getattr(made, "aux_loss_enabled", False) and moe_checks.has_experts(model)
    peft_methods.widen(spec, made.model)
    if spec.deepspeed.name.startswith("zero3"):
        deepspeed_config.settle(made.model)
    trained: LossGuardMixin = made
    return trained


def _made(spec: RunSpec, source: str, model: Any, config: Any, common: dict[str, Any]) -> LossGuardMixin:
    """The objective's trainer, with the adapter on the model."""
    if isinstance(spec.objective, (Sft, Pretrain)):
        return GuardedTrainer(model=model, peft_config=config, **common)
    if isinstance(spec.objective, Grpo):
        common["reward_funcs"] = rewards.functions(spec.objective)
        common["eval_dataset"] = None  # the reward of greedy answers is what is measured (before_after.py)
        made = grpo.GrpoTrainer(model=model, peft_config=config, **common)
        grpo.narrow(made, DTYPES[str(spec.train.precision)])
        return made
    kind: Any = preference.trainer_of(spec)
    if _is_older(spec) and config is not None:
        model, config = _adapted(spec, model, config), None
    if passes_of(spec.objective, spec.method).copy:
        common["ref_model"] = reference(spec, source)
    trained: LossGuardMixin = kind(model=model, peft_config=config, **common)
    return trained


def reference(spec: RunSpec, source: str) -> Any:
    """The model as it is before training, frozen, in the width of the arithmetic. An adapter needs none: switched off,
    it leaves its base."""
    frozen = spec.model_copy(update={"method": Full(master_weights=False)})
    return model_loading.load_model(frozen, source).requires_grad_(False)


def _is_older(spec: RunSpec) -> bool:
    """ORPO and CPO in TRL 1.16: their trainers would make every other weight of a packed base fp32
    (`prepare_model_for_kbit_training`), so they get a model with its adapter."""
    return isinstance(spec.objective, Orpo) or (isinstance(spec.objective, Dpo) and not spec.objective.has_reference)


def _adapted(spec: RunSpec, model: Any, config: Any) -> Any:
    """The adapter put on as TRL's newer trainers do: 16 bits wide over a packed base, under ZeRO-3 like the base."""
    sharded = spec.deepspeed.name.startswith("zero3")
    packed = spec.method.packed
    whole = get_peft_model(model, config, autocast_adapter_dtype=not sharded or packed)
    if packed:
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(DTYPES["bf16"])
    return whole
