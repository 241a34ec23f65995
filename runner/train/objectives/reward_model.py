"""`objective=reward`: one number for an answer, higher for the chosen one."""

from __future__ import annotations

from typing import Any

from trl import RewardConfig, RewardTrainer

from runner import spec as schema
from runner.data.tokenize_rows import PreferenceSettings
from runner.train.objectives.pairs import Compared, Prepared


class RewardsTrainer(Prepared, RewardTrainer):  # type: ignore[misc]  # trl has no types
    """A reward model."""

    METRICS = {"accuracy": "reward_accuracy", "margin": "reward_margin", "mean_reward": "reward"}  # noqa: RUF012  # as in LossGuardMixin, read only


class Reward(Compared):
    """Preferences; the number is read at an answer's end, so none may be cut."""

    trainer_class = RewardsTrainer
    columns = ("chosen_ids", "rejected_ids")

    def row_settings(self) -> PreferenceSettings:
        """No row is cut."""
        return PreferenceSettings(self.spec.train.max_length, 1, True)

    def settings(self, shared: dict[str, Any]) -> RewardConfig:
        """TRL's."""
        assert isinstance(self.spec.objective, schema.Reward)
        return RewardConfig(**shared, center_rewards_coefficient=self.spec.objective.center)
