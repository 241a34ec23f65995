"""`objective=sft`: next-token loss on what is to be learned of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.data.examples import Example
from runner.train import token_dataset, trainer
from runner.train.guarded_trainer import GuardedTrainer
from runner.train.objectives.objective import Objective
from runner.train.token_cache import Tell, Tokenised


class NextToken(Objective):
    """Objectives that learn the next token, with TRL's SFTTrainer."""

    trainer_class: Any = GuardedTrainer

    def settings(self, shared: dict[str, Any]) -> Any:
        """TRL's, and whether rows are packed."""
        return trainer.settings(self.spec, shared)

    def trainer(self, source: str, model: Any, adapter: Any, common: dict[str, Any]) -> GuardedTrainer:
        """Under guard."""
        made: GuardedTrainer = self.trainer_class(model=model, peft_config=adapter, **common)
        return made


class Sft(NextToken):
    """Conversations, prompts with completions, and plain text."""

    def asked(self, held: Sequence[Any]) -> list[Example]:
        """Those with an answer."""
        return [row for row in held if isinstance(row, Example) and row.completion]

    def tokenise(
        self, rows: Sequence[Any], tokenizer: Any, tell: Tell | None = None, *, held: bool = False
    ) -> Tokenised:
        """`input_ids` [s] and `labels` [s]."""
        return token_dataset.tokenise(rows, tokenizer, self.spec, tell)
