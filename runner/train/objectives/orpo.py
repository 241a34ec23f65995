"""`objective=orpo`: next-token loss and preference at once."""

from __future__ import annotations

from typing import Any

from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from runner import spec as schema
from runner.train.objectives.pairs import Compared, Labelled


class OrpoTrainer(Labelled, ORPOTrainer):  # type: ignore[misc]  # trl has no types
    """Next-token loss and odds ratio."""

    METRICS = Labelled.METRICS | {"log_odds_ratio": "log_odds_ratio"}
    LEARNED = ("chosen_attention_mask", 0)  # the prompt, too


class Orpo(Compared):
    """Preferences, without a reference."""

    trainer_class = OrpoTrainer
    adapter_first = True

    def settings(self, shared: dict[str, Any]) -> ORPOConfig:
        """TRL's."""
        assert isinstance(self.spec.objective, schema.Orpo)
        return ORPOConfig(**shared, beta=self.spec.objective.beta, remove_unused_columns=False)
