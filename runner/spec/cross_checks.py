"""Constraints between objective, method, batch and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runner.spec.method import Full, Lora, Peft
from runner.spec.objective import Dpo, Grpo, Kto, Objective, Pretrain, Sft

if TYPE_CHECKING:
    from runner.spec.run import RunSpec


ROWS_NEEDED = {
    "pretrain": "plain text",
    "dpo": "preferences: prompt, chosen, rejected",
    "orpo": "preferences: prompt, chosen, rejected",
    "reward": "preferences: prompt, chosen, rejected",
    "kto": "marked answers: prompt, completion, label",
    "grpo": "prompts, with an answer where a reward compares with it",
}
"""What an objective's rows are made of."""
_NAME_DATA = "name your own, such as data=file data.path=my.jsonl"


def has_reference(objective: Objective) -> bool:
    """The loss compares the model with what it was before training."""
    if isinstance(objective, Dpo):
        return objective.has_reference
    return isinstance(objective, Kto) or (isinstance(objective, Grpo) and objective.beta > 0)


def packs(objective: Objective) -> bool:
    """Short rows may share a sequence."""
    return isinstance(objective, (Sft, Pretrain))


def disagreements(spec: RunSpec) -> Iterator[str]:
    """One line for every rule that is broken; its remedy after a semicolon."""
    objective, train = spec.objective, spec.train
    name = objective.name
    if train.packing and not packs(objective):
        yield f"train.packing=true: objective={name} takes its rows one by one; write train.packing=false"
    every, saved = spec.push.every_steps, train.save_every_steps
    if every and (saved is None or every % saved):
        yield f"push.every_steps={every}: no checkpoint is written after every {every} steps; add train.save_every_steps={every}"
    yield from _methods(spec)
    if spec.data.source == "commands" and name in ROWS_NEEDED and name != "grpo":
        yield f"data={spec.data.name} holds questions and answers, and objective={name} needs {ROWS_NEEDED[name]}; {_NAME_DATA}"
    if isinstance(objective, Kto) and train.micro_batch_size == 1:
        yield (
            "train.micro_batch_size=1: objective=kto estimates the KL divergence by exchanging the answers of a micro "
            "batch; write train.micro_batch_size=2 or more"
        )
    if isinstance(objective, Grpo):
        yield from _grpo(spec, objective)


def _methods(spec: RunSpec) -> Iterator[str]:
    objective, method = spec.objective, spec.method
    name = objective.name
    if isinstance(method, Lora) and method.init in ("pissa", "olora") and has_reference(objective):
        yield (
            f"method.init={method.init} moves a part of the model into the adapter, and objective={name} needs the model "
            "without the adapter as its reference; write method.init=default"
        )
    if "lm_head" in getattr(method, "target_modules", ()) and name in _FUSED:
        yield (
            f"method.target_modules: objective={name} reads the head's own weight, so an adapter on lm_head would never "
            "train; leave lm_head out"
        )
    if isinstance(method, Peft) and spec.data.add_tokens and "embed_tokens" not in method.modules_to_save:
        head = "" if spec.model.tie_embeddings else ",lm_head"
        yield (
            f"data.add_tokens makes new embeddings, and method={method.name} trains none; "
            f"write method.modules_to_save=[embed_tokens{head}]"
        )
    if spec.model.from_scratch and not isinstance(method, Full):
        yield f"method={method.name}: a model from random weights trains whole; write method=full"
    if isinstance(objective, Pretrain):
        yield from _tokenizer(spec, objective)
    elif spec.model.from_scratch:
        yield f"objective={name}: a model from random weights has to learn language first; write objective=pretrain"


def _tokenizer(spec: RunSpec, objective: Pretrain) -> Iterator[str]:
    if spec.model.from_scratch and not (objective.tokenizer or objective.experiment):
        yield (
            "objective.experiment is null: random weights need a tokenizer, which is kept by experiment; write "
            "objective.experiment=NAME, or objective.tokenizer=FILE for one that is there"
        )
    if objective.tokenizer and not spec.model.from_scratch:
        yield "objective.tokenizer: a pretrained model keeps its own; leave it out, or take a model=scratch_…"


_FUSED = ("sft", "pretrain", "dpo", "kto", "grpo")
"""Objectives whose TRL trainer refuses an adapter on the head: `add_fused_lm_head`, TRL 1.16."""


def _grpo(spec: RunSpec, objective: Grpo) -> Iterator[str]:
    train, group = spec.train, objective.num_generations
    if train.batch_size % group:
        nearest = max(group, train.batch_size // group * group)
        yield (
            f"train.batch_size={train.batch_size} has no whole groups of objective.num_generations={group} answers; "
            f"write train.batch_size={nearest}"
        )
    if objective.max_new_tokens >= train.max_length:
        yield (
            f"objective.max_new_tokens={objective.max_new_tokens} leaves no room for a prompt in "
            f"train.max_length={train.max_length}; raise train.max_length"
        )
    if train.on_loss_spike != "ignore":
        yield (
            f"train.on_loss_spike={train.on_loss_spike}: the loss of objective=grpo moves around 0 and says nothing of "
            "progress; write train.on_loss_spike=ignore"
        )
    if spec.eval.every_steps:
        yield (
            "eval.every_steps: objective=grpo measures its reward in every step, and has no held-out loss; leave "
            "eval.every_steps out"
        )
