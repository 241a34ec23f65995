"""`objective=`: what the model learns from the rows.

All that is outside of training asks the objective itself: a new one is a class here and a module in
`runner/train/objectives/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from runner.spec.objective_base import Kind, ObjectiveBase, Passes, Unused
from runner.spec.part import Auto, is_own

if TYPE_CHECKING:
    from runner.spec.run import RunSpec

REWARDS = ("exact_match", "regex", "length", "json")
"""Reward functions with a name; any other is `FILE.py:FUNCTION`."""


class Sft(ObjectiveBase):
    """Supervised fine-tuning: next-token loss."""

    packs: ClassVar[bool] = True
    asks_prompts: ClassVar[bool] = True

    name: Literal["sft"] = "sft"
    """Name of the choice."""
    loss_on: Literal["auto", "completion", "assistant", "last", "all"] = "auto"
    """Tokens the loss is taken on: auto means every assistant turn of a conversation, the completion of a prompt, all of plain text; last means the last assistant turn."""


class Pretrain(ObjectiveBase):
    """Next-token loss on every token of plain text, continued or from random weights; long documents go on in the next sequence."""

    rows_needed: ClassVar[str | None] = "plain text"
    bundled: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    on_long: ClassVar[str] = "continues in the next sequence"

    name: Literal["pretrain"] = "pretrain"
    """Name of the choice."""
    experiment: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name of the shards and the tokenizer; null trains on the rows of `data` as they are."""
    root: str | None = None
    """Folder that holds `datasets/`, `artifacts/` and `hf_cache/`; null means `RUNNER_WORKSPACE`, else the working directory."""
    shards: Literal["auto", "reuse", "anew"] = "auto"
    """auto creates missing shards from `data`, continues interrupted ones, and refuses shards of other data; reuse takes existing shards of any origin, also incomplete ones; anew rebuilds shards and tokenizer."""
    mode: Literal["smoke", "prod", "split"] = "split"
    """smoke takes the first `take` documents (1,000 if null); prod takes all, or those read before an interruption; split also writes a share, `val_ratio`, to validation shards."""
    val_ratio: float = Field(default=0.01, gt=0, lt=1)
    """Share of the documents in validation shards, with `mode=split`."""
    lines_per_shard: int = Field(default=250_000, ge=1)
    """Documents in one shard, a line each."""
    take: int | None = Field(default=None, ge=1)
    """Maximum number of documents."""
    gzip: bool = False
    """Write shards as `.txt.gz`."""
    tokenizer: str | None = None
    """Tokenizer to use for random weights: a `tokenizer.json`, a folder with one, or a Hub id; null trains byte-level BPE of `model.vocab_size` tokens on the shards, once for each experiment."""

    @property
    def sharded(self) -> bool:
        """True if it trains on shards of the documents."""
        return self.experiment is not None

    @property
    def reads_rows(self) -> bool:
        """True if it reads the rows of `data`."""
        return not (self.sharded and self.shards == "reuse")  # else the shards are read, whatever they were made of

    def files(self) -> Iterator[tuple[str, str]]:
        """The tokenizer."""
        if self.tokenizer is not None:
            yield "objective.tokenizer", self.tokenizer

    def unused(self, spec: RunSpec) -> Unused:
        """Keys of any part that have no effect with this objective as it is set."""
        yield from super().unused(spec)
        yield "data.system_prompt", "objective=pretrain learns plain text"
        yield "data.num_proc", "plain text is tokenised by one process, with threads"
        if not self.sharded:
            for key in ("root", "shards", "mode", "val_ratio", "lines_per_shard", "take", "gzip"):
                yield f"objective.{key}", "without objective.experiment no shards are made"
        elif self.mode != "split":
            yield "objective.val_ratio", f"objective.mode={self.mode}"

    def disagreements(self, spec: RunSpec) -> Iterator[str]:
        """Only random weights learn with another tokenizer, and they need one."""
        if spec.model.from_scratch and not (self.tokenizer or self.experiment):
            yield (
                "objective.experiment is null: random weights need a tokenizer, which is kept by experiment; write "
                "objective.experiment=NAME, or objective.tokenizer=FILE for one that is there"
            )
        if self.tokenizer and not spec.model.from_scratch:
            yield "objective.tokenizer: a pretrained model keeps its own; leave it out, or take a model=scratch_…"


_PAIRS = "preferences: prompt, chosen, rejected"


class _Referenced(ObjectiveBase):
    """What losses share that compare the model with what it was before."""

    precompute_reference: bool = False
    """Compute the reference model's probabilities once before training instead of keeping the model in memory."""


class Dpo(_Referenced):
    """Direct preference optimisation (arXiv 2305.18290) and its variants: chosen against rejected answers."""

    learns_from: ClassVar[Kind] = "preference"
    rows_needed: ClassVar[str | None] = _PAIRS
    bundled: ClassVar[bool] = False

    name: Literal["dpo"] = "dpo"
    """Name of the choice."""
    loss: Literal["sigmoid", "ipo", "hinge", "cpo", "simpo"] = "sigmoid"
    """sigmoid is DPO's own; ipo (arXiv 2310.12036), hinge (arXiv 2305.10425); cpo (arXiv 2401.08417) and simpo (arXiv 2405.14734) need no reference model."""
    beta: float | Auto = "auto"
    """Strength of the constraint to the reference (τ in IPO); auto means 0.1, and 2 for simpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of swapped preferences; with sigmoid, the robust loss (arXiv 2403.00409)."""
    simpo_margin: float = Field(default=1.0, ge=0)
    """γ: required margin of the chosen answer, with `loss=simpo`."""
    chosen_weight: float | Auto = "auto"
    """Weight of the chosen answers' own loss beside the preference, with cpo and simpo; auto means 1 for cpo and 0 for simpo."""

    @field_validator("beta", "chosen_weight")
    @classmethod
    def _not_negative(cls, value: float | str, info: ValidationInfo) -> float | str:
        if isinstance(value, float) and value < 0:
            raise ValueError(f"must be a number of at least 0, or auto; write objective.{info.field_name}=auto")
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

    def _passes(self, adapts: bool) -> Passes:
        if not self.has_reference:
            return Passes(2, head="logits")
        early = self.precompute_reference
        return Passes(2, 0 if early else 1, not early, not adapts and not early, "fused", reads_before=early)

    def unused(self, spec: RunSpec) -> Unused:
        """Keys of any part that have no effect with this objective as it is set."""
        yield from super().unused(spec)
        if self.loss != "simpo":
            yield "objective.simpo_margin", f"objective.loss={self.loss}"
        if self.loss not in ("cpo", "simpo"):
            yield "objective.chosen_weight", f"objective.loss={self.loss}"


class Kto(_Referenced):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): single answers, each marked good or bad."""

    learns_from: ClassVar[Kind] = "unpaired"
    rows_needed: ClassVar[str | None] = "marked answers: prompt, completion, label"
    bundled: ClassVar[bool] = False
    least_micro_batch: ClassVar[int] = 2  # it exchanges answers within one

    name: Literal["kto"] = "kto"
    """Name of the choice."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the constraint to the reference."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers; raise it if they are fewer."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers."""

    @property
    def has_reference(self) -> bool:
        """The loss compares the model with what it was before training."""
        return True

    def _passes(self, adapts: bool) -> Passes:
        early = self.precompute_reference
        # The exchanged answers once by the model, once by the reference; and the own ones.
        return Passes(1, 1 if early else 3, not early, not adapts and not early, "fused", reads_before=early)

    def disagreements(self, spec: RunSpec) -> Iterator[str]:
        """A micro batch has answers to exchange."""
        yield from super().disagreements(spec)
        if spec.train.micro_batch_size == 1:
            yield (
                "train.micro_batch_size=1: objective=kto estimates the KL divergence by exchanging the answers of a micro "
                "batch; write train.micro_batch_size=2 or more"
            )


class Orpo(ObjectiveBase):
    """Odds-ratio preference optimisation (arXiv 2403.07691): next-token loss and preference at once, without a reference."""

    learns_from: ClassVar[Kind] = "preference"
    rows_needed: ClassVar[str | None] = _PAIRS
    bundled: ClassVar[bool] = False

    name: Literal["orpo"] = "orpo"
    """Name of the choice."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio (λ in the paper)."""

    def _passes(self, adapts: bool) -> Passes:
        return Passes(2, head="logits")


class Reward(ObjectiveBase):
    """A reward model: one number for an answer, higher for the chosen one (Bradley-Terry)."""

    learns_from: ClassVar[Kind] = "preference"
    rows_needed: ClassVar[str | None] = _PAIRS
    bundled: ClassVar[bool] = False
    scores: ClassVar[bool] = True
    on_long: ClassVar[str] = "leaves long rows out"

    name: Literal["reward"] = "reward"
    """Name of the choice."""
    center: float | None = Field(default=None, gt=0)
    """Weight of a term that keeps the mean reward at 0 (arXiv 2312.09244 takes 0.01); null leaves it out."""

    def _passes(self, adapts: bool) -> Passes:
        return Passes(2, head="number")


class Grpo(ObjectiveBase):
    """Group relative policy optimisation (arXiv 2402.03300): reward functions rate answers of the model."""

    learns_from: ClassVar[Kind] = "prompts"
    rows_needed: ClassVar[str | None] = "prompts, with an answer where a reward compares with it"
    asks_prompts: ClassVar[bool] = True
    metric: ClassVar[str] = "eval.after.reward"
    metric_mode: ClassVar[Literal["min", "max"]] = "max"

    name: Literal["grpo"] = "grpo"
    """Name of the choice."""
    rewards: list[str] = ["exact_match"]
    """Reward functions, summed: exact_match, regex, length, json, or your own as `FILE.py:FUNCTION`."""
    reward_weights: list[float] | None = None
    """One weight for each of `rewards`; null means 1 each."""
    reward_regex: str | None = None
    """Pattern for `regex`: reward 1 if it is found in the answer, else 0."""
    reward_length: int = Field(default=200, ge=1)
    """Characters for `length`: reward 1 up to this length, falling to 0 at twice this length."""
    num_generations: int = Field(default=8, ge=2)
    """Answers per prompt, compared with each other."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens; the prompt may use the rest of `train.max_length`."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the initial model; 0 needs no reference model."""
    loss: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = "dapo"
    """Average over tokens: dapo (arXiv 2503.14476) over the batch, grpo over each answer, dr_grpo (arXiv 2503.20783) by a constant."""
    clip: float = Field(default=0.2, gt=0)
    """ε: largest relative change of a probability in one update."""

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

    @property
    def has_reference(self) -> bool:
        """The loss compares the model with what it was before training."""
        return self.beta > 0

    def _passes(self, adapts: bool) -> Passes:
        reference = self.has_reference
        return Passes(1, int(reference), False, reference and not adapts, "fused", self.max_new_tokens)

    def code_files(self) -> Iterator[tuple[str, str]]:
        """The objective's class, and reward functions."""
        yield from super().code_files()
        yield from ((f"objective.rewards.{number}", name) for number, name in enumerate(self.rewards) if is_own(name))

    def unused(self, spec: RunSpec) -> Unused:
        """Keys of any part that have no effect with this objective as it is set."""
        yield from super().unused(spec)
        for key, reward in (("reward_regex", "regex"), ("reward_length", "length")):
            if reward not in self.rewards:
                yield f"objective.{key}", f"objective.rewards has no {reward}"

    def disagreements(self, spec: RunSpec) -> Iterator[str]:
        """Whole groups of answers in a batch, room for a prompt, and no rule that reads the loss."""
        yield from super().disagreements(spec)
        train, group = spec.train, self.num_generations
        if train.batch_size % group:
            nearest = max(group, train.batch_size // group * group)
            yield (
                f"train.batch_size={train.batch_size} has no whole groups of objective.num_generations={group} answers; "
                f"write train.batch_size={nearest}"
            )
        if self.max_new_tokens >= train.max_length:
            yield (
                f"objective.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in "
                f"train.max_length={train.max_length}; raise train.max_length"
            )
        if train.on_loss_spike != "ignore":
            yield (
                f"train.on_loss_spike={train.on_loss_spike}: the loss of objective=grpo moves around 0 and says nothing "
                "of progress; write train.on_loss_spike=ignore"
            )
        if spec.eval.every_steps:
            yield (
                "eval.every_steps: objective=grpo measures its reward in every step, and has no held-out loss; leave "
                "eval.every_steps out"
            )


def _is_own(reward: str) -> bool:
    file, _, function = reward.rpartition(":")
    return file.endswith(".py") and function.isidentifier()


Objective = Annotated[Sft | Pretrain | Dpo | Kto | Orpo | Reward | Grpo, Field(discriminator="name")]
