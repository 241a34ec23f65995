"""Base of the objectives: the rows, the cost of a step, and the rules for other keys.

Sources of `passes`: the trainers of TRL 1.16. `dpo_trainer.py`: chosen and rejected in one batch
(`DataCollatorForPreference`), the reference's pass while the activations of the model's own are held (`_compute_loss`).
`kto_trainer.py`: each of the two also reads the exchanged answers (`_compute_kl_logps`), without gradients.
`orpo_trainer.py`, `cpo_trainer.py` (experimental): one batch of both, all logits. `reward_trainer.py`: both, and a head of
one number. `grpo_trainer.py`: answers to a whole optimiser step's prompts are generated at once, and the reference reads
them before training does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from runner.spec.part import CODE, Part

if TYPE_CHECKING:
    from runner.spec.run import RunSpec

Kind = Literal["sft", "preference", "unpaired", "prompts"]
"""What an objective learns from: answers or text, pairs of answers, marked answers, prompts."""
Unused = Iterator[tuple[str, str]]
"""Keys that have no effect, each with the reason."""


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


class ObjectiveBase(Part):
    learns_from: ClassVar[Kind] = "sft"
    rows_needed: ClassVar[str | None] = None
    """What its rows are made of, where questions with answers are not enough."""
    bundled: ClassVar[bool] = True
    """It learns from the questions and answers that come with the project."""
    packs: ClassVar[bool] = False
    """Short rows may share a sequence."""
    asks_prompts: ClassVar[bool] = False
    """It answers held-out prompts before and after training."""
    least_micro_batch: ClassVar[int] = 1
    scores: ClassVar[bool] = False
    """The model gives an answer a number, with a head of its own, and writes none."""
    on_long: ClassVar[str] = "cuts long rows"
    """What it does with rows longer than `train.max_length`, where `data.on_long` does not say."""

    metric: ClassVar[str] = "eval.after.loss"
    """Key of `summary.json` that its runs are compared by, unless `run.metric` names another."""
    metric_mode: ClassVar[Literal["min", "max"]] = "min"

    code: str | None = Field(default=None, pattern=CODE)
    """A class of your own as `FILE.py:CLASS`, derived from this objective's class in `runner.train.objectives`; row format and plan stay the same."""
    options: dict[str, bool | int | float | str | None] = {}
    """Settings of `code`, by its own names."""
    extra_forward_passes: int = Field(default=0, ge=0)
    """Forward passes without gradients that `code` adds to a step, each over as many sequences as it trains on; used by the plan."""

    @property
    def has_reference(self) -> bool:
        """The loss compares the model with what it was before training."""
        return False

    @property
    def sharded(self) -> bool:
        """True if it trains on shards of the documents."""
        return False

    @property
    def reads_rows(self) -> bool:
        """True if it reads the rows of `data`."""
        return True

    def passes(self, adapts: bool) -> Passes:
        """Return the passes of a step, with a method that `adapts` or one that trains the model's own weights."""
        own = self._passes(adapts)
        return replace(own, quiet=own.quiet + self.extra_forward_passes)

    def _passes(self, adapts: bool) -> Passes:
        return Passes()

    def files(self) -> Iterator[tuple[str, str]]:
        """Keys that name files or folders of the objective's own, and their values."""
        yield from ()

    def code_files(self) -> Iterator[tuple[str, str]]:
        """Keys that name Python files of the user, `FILE.py:NAME`, and their values."""
        if self.code is not None:
            yield "objective.code", self.code

    def unused(self, spec: RunSpec) -> Unused:
        """Keys of any part that have no effect with this objective as it is set."""
        if self.code is None:
            yield "objective.options", "objective.code names no class that reads them"
            yield "objective.extra_forward_passes", "objective.code names no class that makes them"

    def disagreements(self, spec: RunSpec) -> Iterator[str]:
        """One line for every rule between this objective and other parts that is broken; its remedy after a semicolon."""
        if spec.model.from_scratch:
            yield f"objective={self.name}: a model from random weights has to learn language first; write objective=pretrain"  # type: ignore[attr-defined]  # every subclass has one
