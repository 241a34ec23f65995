"""TRL's trainers for preferences and marked answers, guarded and kept like the one for supervised fine-tuning."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from runner.spec import Dpo, Kto, Orpo, Reward, RunSpec
from runner.train.guarded import Guarding

REWARDS = {
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
}


class _Prepared(Guarding):
    """The rows are tokenised already (pairs.py)."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class DpoTrainer(_Prepared, DPOTrainer):  # type: ignore[misc]  # trl has no types
    """Sigmoid, IPO and hinge."""

    METRICS = REWARDS


class KtoTrainer(_Prepared, KTOTrainer):  # type: ignore[misc]  # trl has no types
    """Marked answers; the KL divergence is estimated from answers exchanged within a micro batch."""

    METRICS = REWARDS | {"kl": "kl"}

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Every row gets the answer of the row before it, in groups of the micro batch, as TRL does."""
        size = args[1].per_device_train_batch_size
        answers = dataset["completion_ids"]
        exchanged: list[Any] = []
        for start in range(0, len(answers), size):
            group = answers[start : start + size]
            exchanged += [group[-1], *group[:-1]]
        return dataset.add_column("KL_completion_ids", exchanged)


class RewardsTrainer(_Prepared, RewardTrainer):  # type: ignore[misc]  # trl has no types
    """A reward model."""

    METRICS = {"accuracy": "reward_accuracy", "margin": "reward_margin", "mean_reward": "reward"}  # noqa: RUF012  # as in Guarding, read only


class _Labelled(Guarding):
    """TRL's older trainers, which want each sequence with mask and labels."""

    METRICS = REWARDS | {"nll_loss": "nll_loss"}
    max_length: int

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """The columns of a row that is tokenised already."""
        prompt = feature["prompt_ids"]
        row: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            ids = (prompt + feature[f"{name}_ids"])[: self.max_length]
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
            row[f"{name}_labels"] = [-100] * len(prompt) + ids[len(prompt) :]
        return row

    def sizes(self, inputs: Any) -> tuple[int, int]:
        """Both sequences of a pair are padded to the longer one of all."""
        masks = [inputs[f"{name}_attention_mask"] for name in ("chosen", "rejected")]
        width = max(mask.shape[1] for mask in masks)
        return 2 * len(masks[0]) * width, int(sum(mask.sum() for mask in masks))


class OrpoTrainer(_Labelled, ORPOTrainer):  # type: ignore[misc]  # trl has no types
    """Next-token loss and odds ratio."""

    METRICS = _Labelled.METRICS | {"log_odds_ratio": "log_odds_ratio"}


class CpoTrainer(_Labelled, CPOTrainer):  # type: ignore[misc]  # trl has no types
    """CPO and SimPO."""


def config_of(spec: RunSpec, shared: dict[str, Any]) -> Any:
    """Our settings in the words of the objective's TRL trainer; `shared` are those that all have."""
    objective = spec.objective
    if isinstance(objective, Dpo) and objective.has_reference:
        robust = objective.loss == "sigmoid" and objective.label_smoothing > 0
        return DPOConfig(
            **shared,
            beta=objective.strength,
            loss_type=["robust" if robust else objective.loss],
            label_smoothing=objective.label_smoothing,
            precompute_ref_log_probs=objective.precompute_reference,
        )
    if isinstance(objective, Dpo):
        weight = objective.chosen_weight
        return CPOConfig(
            **shared,
            beta=objective.strength,
            loss_type="simpo" if objective.loss == "simpo" else "sigmoid",
            label_smoothing=objective.label_smoothing,
            simpo_gamma=objective.simpo_margin,
            cpo_alpha=weight if isinstance(weight, float) else 0.0 if objective.loss == "simpo" else 1.0,
            remove_unused_columns=False,
        )
    if isinstance(objective, Kto):
        return KTOConfig(
            **shared,
            beta=objective.beta,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
            precompute_ref_log_probs=objective.precompute_reference,
        )
    if isinstance(objective, Orpo):
        return ORPOConfig(**shared, beta=objective.beta, remove_unused_columns=False)
    assert isinstance(objective, Reward)
    return RewardConfig(**shared, center_rewards_coefficient=objective.center)


def trainer_of(spec: RunSpec) -> type[Guarding]:
    """The objective's trainer."""
    objective = spec.objective
    if isinstance(objective, Dpo):
        return DpoTrainer if objective.has_reference else CpoTrainer
    return {"kto": KtoTrainer, "orpo": OrpoTrainer, "reward": RewardsTrainer}[objective.name]
