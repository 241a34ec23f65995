"""`objective=kto`: single answers, each marked good or bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, Value
from trl import KTOConfig, KTOTrainer

from runner import spec as schema
from runner.train.objectives.preference import PreferenceObjective
from runner.train.trainers.heldout import Row
from runner.train.trainers.preference_trainer import REWARD_METRICS, TokenisedPairsMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runner.data.examples import Learnable
    from runner.train.trainers.recording_trainer import Batch
    from runner.train.trainers.trainer_settings import SharedSettings


class KtoTrainer(TokenisedPairsMixin, KTOTrainer):  # type: ignore[misc]  # trl has no types
    """KTO; the KL divergence is estimated from answers exchanged within a micro batch, and over all held-out
    rows where they are measured."""

    METRICS = REWARD_METRICS | {"kl": "kl"}
    exchanged: tuple[torch.Tensor, ...] = ()
    """Log probabilities of the exchanged answers in the last held-out row: the model's, then the reference's."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Every row gets the answer of the row before it, in groups of the micro batch as in TRL; held out, of all."""
        _, settings, name = args
        size = len(dataset) if name == "eval" else settings.per_device_train_batch_size
        order: list[int] = []
        for start in range(0, len(dataset), size):
            group = range(start, min(start + size, len(dataset)))
            order += [group[-1], *group[:-1]]
        for column in ("completion_ids", "completion_given"):
            values = list(dataset[column])
            dataset = dataset.add_column(f"KL_{column}", [values[index] for index in order])
        return dataset

    def _compute_kl_logps(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        found: torch.Tensor = super()._compute_kl_logps(model, batch)
        if not self.model.training:
            self.exchanged = (*self.exchanged, found)
        return found

    def row_metrics(self, row: Row, inputs: Batch) -> Row:
        """The metrics, with the divergence as it is: TRL clamps it at 0."""
        ours, theirs, *_ = (*self.exchanged, inputs.get("ref_KL_logps"))
        self.exchanged = ()
        return row | {"kl": float(ours) - float(theirs)}

    def means(self, rows: list[Row]) -> Row:
        """TRL's loss (arXiv 2402.01306, equation 7) with one divergence for all rows."""
        found = super().means(rows)
        found["kl"] = max(0.0, found["kl"])
        losses = []
        for row in rows:
            if "rewards/chosen" in row:
                gain, weight = row["rewards/chosen"] - self.beta * found["kl"], self.desirable_weight
            else:
                gain, weight = self.beta * found["kl"] - row["rewards/rejected"], self.undesirable_weight
            losses.append(weight * (1 - 1 / (1 + math.exp(-gain))))
        found["loss"] = sum(losses) / len(losses)
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


class Kto(PreferenceObjective[schema.Kto]):
    """Kahneman-Tversky optimisation (arXiv 2402.01306): answers marked good or bad."""

    trainer_class = KtoTrainer
    columns = ("prompt_ids", "completion_ids", "completion_given")

    def features(self, rows: Sequence[Learnable]) -> Features:
        """The columns, and the mark."""
        return Features({**super().features(rows), "label": Value("bool")})

    def settings(self, shared: SharedSettings) -> KTOConfig:
        """TRL's settings of KTO."""
        objective = self.objective_spec
        return KTOConfig(
            **shared,
            beta=objective.beta,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
            precompute_ref_log_probs=objective.precompute_reference,
        )
