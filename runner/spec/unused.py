"""Keys that say something other than their default and change nothing in this combination, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runner.spec.objective import Dpo, Grpo, Pretrain
from runner.spec.run import RunSpec


def unused(spec: RunSpec) -> Iterator[str]:
    """One sentence for each such key."""
    for key, why in _candidates(spec):
        group, _, leaf = key.partition(".")
        part: Any = getattr(spec, group)
        if getattr(part, leaf) != type(part).model_fields[leaf].get_default(call_default_factory=True):
            yield f"{key} has no effect: {why}"


def _candidates(spec: RunSpec) -> Iterator[tuple[str, str]]:
    train, objective, hw = spec.train, spec.objective, spec.hw
    if spec.track.name != "wandb":
        yield from ((f"track.{key}", f"track={spec.track.name}") for key in ("project", "entity"))
    if train.on_loss_spike == "ignore":
        yield "train.spike_factor", "train.on_loss_spike=ignore"
    if objective.name not in ("sft", "grpo"):
        for key in ("num_prompts",) * bool(spec.eval.num_prompts) + ("max_new_tokens",):
            yield f"eval.{key}", f"objective={objective.name} asks no prompts"
    elif not spec.eval.num_prompts:
        yield "eval.max_new_tokens", "eval.num_prompts=0"
    if hw.num_nodes == 1:
        yield from ((f"hw.{key}", "hw.num_nodes=1") for key in ("rendezvous", "node_address"))
    if spec.model.package or spec.model.from_scratch or Path(spec.model.id).is_dir():
        yield "model.revision", "the model is not loaded from the Hub"
    yield from _of_objective(objective)


def _of_objective(objective: Any) -> Iterator[tuple[str, str]]:
    if isinstance(objective, Pretrain) and objective.experiment is None:
        for key in ("root", "shards", "mode", "val_ratio", "lines_per_shard", "take", "gzip"):
            yield f"objective.{key}", "without objective.experiment no shards are made"
    if isinstance(objective, Dpo) and objective.loss != "simpo":
        yield "objective.simpo_margin", f"objective.loss={objective.loss}"
    if isinstance(objective, Dpo) and objective.loss not in ("cpo", "simpo"):
        yield "objective.chosen_weight", f"objective.loss={objective.loss}"
    if isinstance(objective, Grpo):
        for key, reward in (("reward_regex", "regex"), ("reward_length", "length")):
            if reward not in objective.rewards:
                yield f"objective.{key}", f"objective.rewards has no {reward}"
