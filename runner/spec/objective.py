"""`objective=`: what the model learns from the rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from runner.spec.part import CODE, Auto, Part

REWARDS = ("exact_match", "regex", "length", "json")
"""Reward functions with a name; any other is `FILE.py:FUNCTION`."""


class _Objective(Part):
    code: str | None = Field(default=None, pattern=CODE)
    """A class of your own as `FILE.py:CLASS`, derived from this objective's in `runner.train.objectives`; rows and plan stay this objective's."""
    options: dict[str, bool | int | float | str | None] = {}
    """Settings of `code`, by names of its own."""


class Sft(_Objective):
    """Supervised fine-tuning: next-token loss."""

    name: Literal["sft"] = "sft"
    """Name of the choice."""
    loss_on: Literal["auto", "completion", "assistant", "last", "all"] = "auto"
    """Tokens the loss is taken on: auto means every assistant turn of a conversation, the completion of a prompt, all of plain text; last means the last assistant turn."""


class Pretrain(_Objective):
    """Next-token loss on every token of plain text, continued or from random weights; long documents go on in the next sequence."""

    name: Literal["pretrain"] = "pretrain"
    """Name of the choice."""
    experiment: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name of the shards and the tokenizer; null trains on the rows of `data` as they are."""
    root: str | None = None
    """Folder that holds `datasets/`, `artifacts/` and `hf_cache/`; null means `RUNNER_WORKSPACE`, else where the command is typed."""
    shards: Literal["auto", "reuse", "anew"] = "auto"
    """auto makes them of `data` where there are none, goes on where it was interrupted, and refuses those of other data; reuse takes what is there, whatever it was made of, also of a stream that was interrupted; anew makes them and the tokenizer again."""
    mode: Literal["smoke", "prod", "split"] = "split"
    """smoke takes the first `take` documents (1,000 if that is null), prod all, or what was read until it is interrupted; split also sends a share of them, `val_ratio`, to the validation shards."""
    val_ratio: float = Field(default=0.01, gt=0, lt=1)
    """Share of the documents that become validation shards, with `mode=split`."""
    lines_per_shard: int = Field(default=250_000, ge=1)
    """Documents in one shard, a line each."""
    take: int | None = Field(default=None, ge=1)
    """Documents to read at most."""
    gzip: bool = False
    """Write shards as `.txt.gz`."""
    tokenizer: str | None = None
    """Tokenizer to use for random weights: a `tokenizer.json`, a folder with one, or a Hub id; null trains byte-level BPE of `model.vocab_size` tokens on the shards, once for each experiment."""


class _Referenced(_Objective):
    """What losses share that compare the model with what it was before."""

    precompute_reference: bool = False
    """Ask the reference model for its probabilities once, before training, instead of keeping it in memory."""


class Dpo(_Referenced):
    """Direct preference optimisation (arXiv 2305.18290) and its variants: chosen against rejected answers."""

    name: Literal["dpo"] = "dpo"
    """Name of the choice."""
    loss: Literal["sigmoid", "ipo", "hinge", "cpo", "simpo"] = "sigmoid"
    """sigmoid is DPO's own; ipo (arXiv 2310.12036), hinge (arXiv 2305.10425); cpo (arXiv 2401.08417) and simpo (arXiv 2405.14734) need no reference model."""
    beta: float | Auto = "auto"
    """How much the model is held to its reference (τ in IPO); auto means 0.1, and 2 for simpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the preferences that are assumed to be the wrong way round; with sigmoid the loss is then the robust one (arXiv 2403.00409)."""
    simpo_margin: float = Field(default=1.0, ge=0)
    """γ: by how much the chosen answer has to be better, with `loss=simpo`."""
    chosen_weight: float | Auto = "auto"
    """Weight of the chosen answers' own loss beside the preference, with cpo and simpo; auto means 1 for cpo and 0 for simpo."""

    @field_validator("beta", "chosen_weight")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value < 0:
            raise ValueError("must be a number of at least 0, or auto")
        return value

    @model_validator(mode="after")
    def _fits_the_loss(self) -> Dpo:
        if self.label_smoothing and self.loss in ("ipo", "hinge"):
            raise ValueError(f"objective.label_smoothing has no meaning with objective.loss={self.loss}; leave it out")
        if self.precompute_reference and not self.has_reference:
            raise ValueError(
                f"objective.precompute_reference: objective.loss={self.loss} has no reference; leave it out"
            )
        if self.beta == 0:
            raise ValueError("objective.beta=0 learns nothing; write objective.beta=auto")
        return self

    @property
    def has_reference(self) -> bool:
        """The loss asks a reference model."""
        return self.loss not in ("cpo", "simpo")

    @property
    def strength(self) -> float:
        """`beta`, decided. SimPO's rewards are means per token, so its β is larger (2 to 2.5 in the paper's table 7)."""
        return self.beta if isinstance(self.beta, float) else 2.0 if self.loss == "simpo" else 0.1


class Kto(_Referenced):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): single answers, each marked good or bad."""

    name: Literal["kto"] = "kto"
    """Name of the choice."""
    beta: float = Field(default=0.1, gt=0)
    """How much the model is held to its reference."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers; raise it where they are fewer."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers."""


class Orpo(_Objective):
    """Odds-ratio preference optimisation (arXiv 2403.07691): next-token loss and preference at once, without a reference."""

    name: Literal["orpo"] = "orpo"
    """Name of the choice."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio (λ in the paper)."""


class Reward(_Objective):
    """A reward model: one number for an answer, higher for the chosen one (Bradley-Terry)."""

    name: Literal["reward"] = "reward"
    """Name of the choice."""
    center: float | None = Field(default=None, gt=0)
    """Weight of a term that keeps the mean reward at 0 (arXiv 2312.09244 takes 0.01); null leaves it out."""


class Grpo(_Objective):
    """Group relative policy optimisation (arXiv 2402.03300): the model answers, and reward functions judge."""

    name: Literal["grpo"] = "grpo"
    """Name of the choice."""
    rewards: list[str] = ["exact_match"]
    """Reward functions, summed: exact_match, regex, length, json, or your own as `FILE.py:FUNCTION`."""
    reward_weights: list[float] | None = None
    """One weight for each of `rewards`; null means 1 each."""
    reward_regex: str | None = None
    """Pattern for `regex`: 1 where it is found in an answer, else 0."""
    reward_length: int = Field(default=200, ge=1)
    """Characters for `length`: 1 for an answer of at most so many, falling to 0 at twice as many."""
    num_generations: int = Field(default=8, ge=2)
    """Answers to each prompt, compared with one another."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens; a prompt may fill the rest of `train.max_length`."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the model as it was; 0 needs no reference model."""
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """How tokens are averaged: dapo (arXiv 2503.14476) over the batch, grpo over each answer, dr_grpo (arXiv 2503.20783) by a constant."""
    clip: float = Field(default=0.2, gt=0)
    """ε: how far one update may move a probability."""

    @model_validator(mode="after")
    def _rewards_fit(self) -> Grpo:
        if not self.rewards:
            raise ValueError("objective.rewards is empty; name one, such as objective.rewards=[exact_match]")
        for reward in self.rewards:
            if reward not in REWARDS and not _is_own(reward):
                known = ", ".join(REWARDS)
                raise ValueError(f"objective.rewards={reward} is none of {known}; write FILE.py:FUNCTION for your own")
        if "regex" in self.rewards and not self.reward_regex:
            raise ValueError("objective.rewards=regex needs a pattern; write objective.reward_regex='\"…\"'")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"objective.reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards; "
                "write one for each"
            )
        return self


def _is_own(reward: str) -> bool:
    file, _, function = reward.rpartition(":")
    return file.endswith(".py") and function.isidentifier()


Objective = Annotated[Sft | Pretrain | Dpo | Kto | Orpo | Reward | Grpo, Field(discriminator="name")]
