"""Constraints between objective, method, batch and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runner.spec.method import Full, Lora, Peft

if TYPE_CHECKING:
    from runner.spec.run import RunSpec


_NAME_DATA = "name your own, such as data=file data.path=my.jsonl"


def disagreements(spec: RunSpec) -> Iterator[str]:
    """One line for every rule that is broken; its remedy after a semicolon."""
    objective, train = spec.objective, spec.train
    name = objective.name
    if train.packing and not objective.packs:
        yield f"train.packing=true: objective={name} takes its rows one by one; write train.packing=false"
    every, saved = spec.push.every_steps, train.save_every_steps
    if every and (saved is None or every % saved):
        yield f"push.every_steps={every}: no checkpoint is written after every {every} steps; add train.save_every_steps={every}"
    yield from _methods(spec)
    if spec.data.source == "commands" and not objective.bundled:
        yield f"data={spec.data.name} holds questions and answers, and objective={name} needs {objective.rows_needed}; {_NAME_DATA}"
    yield from objective.disagreements(spec)


def _methods(spec: RunSpec) -> Iterator[str]:
    objective, method = spec.objective, spec.method
    name = objective.name
    if isinstance(method, Lora) and method.init in ("pissa", "olora") and objective.has_reference:
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


_FUSED = ("sft", "pretrain", "dpo", "kto", "grpo")
"""Objectives whose TRL trainer refuses an adapter on the head: `add_fused_lm_head`, TRL 1.16."""
