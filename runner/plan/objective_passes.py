"""What an objective adds to a step: second sequence, reference model, forward-only passes, generation. Pure.

Sources: the trainers of TRL 1.16. `dpo_trainer.py`: chosen and rejected in one batch (`DataCollatorForPreference`), the
reference's pass while the activations of the model's own are held (`_compute_loss`). `kto_trainer.py`: each of the two
also reads the exchanged answers (`_compute_kl_logps`), without gradients. `orpo_trainer.py`, `cpo_trainer.py`
(experimental): one batch of both, all logits. `reward_trainer.py`: both, and a head of one number. `grpo_trainer.py`:
answers to a whole optimiser step's prompts are generated at once, and the reference reads them before training does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from runner.plan.model_shape import Shape, shape_of
from runner.spec import Dpo, Grpo, Kto, Method, Objective, Orpo, Reward, RunSpec
from runner.spec.cross_checks import has_reference


@dataclass(frozen=True, slots=True)
class Passes:
    """One micro batch, as a multiple of a supervised one."""

    sequences: int = 1
    """Sequences that one row of the batch stands for."""
    quiet: int = 0
    """Forward passes over as many sequences, without gradients."""
    over_held: bool = False
    """The last of them runs while what the model's own pass keeps is held."""
    separate_reference: bool = False
    """The reference is a model of its own: with adapters it is the model without them."""
    head: Literal["own", "fused", "logits", "number"] = "own"
    """own: as in supervised learning; fused: TRL's tiles on any device; logits: all of them; number: a reward."""
    new_tokens: int = 0
    """Longest answer that is generated."""
    reads_before: bool = False
    """The reference reads all rows once, before training."""


def passes_of(objective: Objective, method: Method) -> Passes:
    """What a step of `objective` is made of."""
    early = getattr(objective, "precompute_reference", False)
    own = has_reference(objective) and not method.adapts and not early
    if isinstance(objective, Dpo) and objective.has_reference:
        return Passes(2, 0 if early else 1, not early, own, "fused", reads_before=early)
    if isinstance(objective, (Dpo, Orpo)):
        return Passes(2, head="logits")
    if isinstance(objective, Kto):  # the exchanged answers once by the model, once by the reference; and the own ones
        return Passes(1, 1 if early else 3, not early, own, "fused", reads_before=early)
    if isinstance(objective, Reward):
        return Passes(2, head="number")
    if isinstance(objective, Grpo):
        return Passes(1, int(has_reference(objective)), False, own, "fused", objective.max_new_tokens)
    return Passes()


def shape_for(spec: RunSpec) -> Shape:
    """The shape of the model that trains; RequestError where it is not known."""
    shape = shape_of(spec.model)
    return scored(shape) if isinstance(spec.objective, Reward) else shape


@lru_cache(maxsize=256)
def scored(shape: Shape) -> Shape:
    """With a head of one number instead of one for each word (`GenericForSequenceClassification`, transformers)."""
    return replace(shape, tie_embeddings=False, head_bias=False, head_outputs=1)
