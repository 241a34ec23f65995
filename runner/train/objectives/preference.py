"""TRL's trainers for preferences and marked answers, with guards and records.

They have no types: hence each `type: ignore` at a `super()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from runner.spec import Dpo, Kto, Orpo, Reward, RunSpec
from runner.train.evaluation.heldout import Row, RowMeans
from runner.train.guarded_trainer import LossGuardMixin
from runner.train.row_ids import KEY

REWARDS = {
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
}


class _Pairs(RowMeans, LossGuardMixin):
    """The loss is a mean over the rows of a step: one that is not full counts by its rows, however it is split."""

    mean_rows = 1.0
    """Per micro batch of the step."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro batches of a step, counted."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.mean_rows = self._mean_of([len(batch[KEY]) for batch in batches])
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As before; in training by the share of the rows."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training or self.share == 1:
            return result
        return (result[0] * self.share, *result[1:]) if return_outputs else result * self.share

    @property
    def share(self) -> float:
        """Rows of the micro batch at hand beside the mean of the step."""
        return len(self.step_rows[1][-1]) / self.mean_rows if self.model.training else 1.0

    def _mean_of(self, counts: list[int]) -> float:
        """Over the micro batches of all processes."""
        total, number = self.ranks.total([sum(counts), len(counts)])
        return total / max(1.0, number)


class Given:
    """A collator around TRL's: what users and tools say inside an answer is given, and no part of its probability."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The collator's batch of b rows, with 0 for such tokens in `completion_mask` [2b, s], or [b, s] for KTO."""
        batch = self.collator(examples)
        names = ("chosen", "rejected") if "chosen_ids" in examples[0] else ("completion",)
        answers = {"completion_mask": names, "KL_completion_mask": ("KL_completion",)}
        for key in answers.keys() & batch.keys():
            rows = [(example, name) for name in answers[key] for example in examples]
            for mask, (example, name) in zip(batch[key], rows, strict=True):
                for begin, end in spans_of(example, name):
                    mask[begin:end] = 0
        return batch


def spans_of(row: dict[str, Any], name: str) -> list[tuple[int, int]]:
    """[begin, end) of an answer's tokens that are given, counted from the prompt's first."""
    edges = [len(row["prompt_ids"]) + edge for edge in row.get(f"{name}_given") or ()]
    return list(zip(edges[::2], edges[1::2], strict=True))


class _Prepared(_Pairs):
    """The rows are tokenised already (preference_dataset.py)."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _watch_rows(self) -> None:
        self.data_collator = Given(self.data_collator)
        super()._watch_rows()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL, which does it while the trainer is made."""
        self.data_collator = Given(self.data_collator)
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        given = [f"{name}_given" for name in ("chosen", "rejected", "completion", "KL_completion")]
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *given]))


class DpoTrainer(_Prepared, DPOTrainer):  # type: ignore[misc]  # trl has no types
    """Sigmoid, IPO and hinge."""

    METRICS = REWARDS


class KtoTrainer(_Prepared, KTOTrainer):  # type: ignore[misc]  # trl has no types
    """Marked answers; the KL divergence is estimated from answers exchanged within a micro batch, and over all held-out
    rows where they are measured."""

    METRICS = REWARDS | {"kl": "kl"}
    exchanged: tuple[Any, ...] = ()
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

    def _compute_kl_logps(self, model: Any, batch: Any) -> Any:
        found = super()._compute_kl_logps(model, batch)
        if not self.model.training:
            self.exchanged = (*self.exchanged, found)
        return found

    def described(self, row: Row, inputs: Any) -> Row:
        """With the divergence as it is, which TRL clamps at 0."""
        ours, theirs, *_ = (*self.exchanged, inputs.get("ref_KL_logps"))
        self.exchanged = ()
        return row | {"kl": float(ours) - float(theirs)}

    def means(self, rows: list[Row]) -> Row:
        """TRL's loss (arXiv 2402.01306, equation 7) with one divergence for all rows."""
        found = super().means(rows)
        found["kl"] = max(0.0, found["kl"])
        losses = []
        for row in rows:
            wanted = "rewards/chosen" in row
            gain = (
                row["rewards/chosen"] - self.beta * found["kl"]
                if wanted
                else self.beta * found["kl"] - row["rewards/rejected"]
            )
            weight = self.desirable_weight if wanted else self.undesirable_weight
            losses.append(weight * (1 - 1 / (1 + math.exp(-gain))))
        found["loss"] = sum(losses) / len(losses)
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


class RewardsTrainer(_Prepared, RewardTrainer):  # type: ignore[misc]  # trl has no types
    """A reward model."""

    METRICS = {"accuracy": "reward_accuracy", "margin": "reward_margin", "mean_reward": "reward"}  # noqa: RUF012  # as in LossGuardMixin, read only


class _Labelled(_Pairs):
    """TRL's older trainers, which want each sequence with mask and labels.

    Their next-token loss is a mean over the tokens of a micro batch. Here it is one over those of a whole step (or of
    all held-out rows): each micro batch counts by its tokens, so that accumulation changes nothing.
    """

    METRICS = REWARDS | {"nll_loss": "nll_loss"}
    LEARNED = ("chosen_labels", -100)
    """Column of a pair by which tokens of the better answer are learned, and its mark for those that are not."""
    max_length: int
    mean_tokens = 1.0
    """Learned per micro batch of the step, or per held-out row."""

    def held_metrics(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = self._stored_metrics["eval"]  # type: ignore[attr-defined]
        return found

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro batches of a step, counted."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.mean_tokens = self._mean_of([self._num_learned(batch) for batch in batches])
        return batches, num_items

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """As before; the rows are counted first."""
        column, ignored = self.LEARNED
        rows = dataloader.dataset[column]
        self.mean_tokens = sum(value != ignored for row in rows for value in row[1:]) / len(rows)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def concatenated_forward(self, model: Any, batch: Any) -> tuple[Any, ...]:
        """TRL's: log probabilities, logits, then the next-token loss."""
        found = list(super().concatenated_forward(model, batch))  # type: ignore[misc]
        found[4] = found[4] * (self._num_learned(batch) / self.mean_tokens / self.share)
        return tuple(found)

    def _num_learned(self, batch: Any) -> int:
        """The first token of a sequence has none before it."""
        column, ignored = self.LEARNED
        return int((batch[column][:, 1:] != ignored).sum())

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """The columns of a row that is tokenised already."""
        prompt = feature["prompt_ids"]
        row: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            ids = (prompt + feature[f"{name}_ids"])[: self.max_length]
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            for begin, end in spans_of(feature, name):
                labels[begin:end] = [-100] * len(labels[begin:end])
            row[f"{name}_labels"] = labels
        return row

    def sizes(self, inputs: Any) -> tuple[int, int]:
        """Both sequences of a pair are padded to the longer one of all."""
        masks = [inputs[f"{name}_attention_mask"] for name in ("chosen", "rejected")]
        width = max(mask.shape[1] for mask in masks)
        return 2 * len(masks[0]) * width, int(sum(mask.sum() for mask in masks))


class OrpoTrainer(_Labelled, ORPOTrainer):  # type: ignore[misc]  # trl has no types
    """Next-token loss and odds ratio."""

    METRICS = _Labelled.METRICS | {"log_odds_ratio": "log_odds_ratio"}
    LEARNED = ("chosen_attention_mask", 0)  # the prompt, too


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


def trainer_of(spec: RunSpec) -> type[LossGuardMixin]:
    """The objective's trainer."""
    objective = spec.objective
    if isinstance(objective, Dpo):
        return DpoTrainer if objective.has_reference else CpoTrainer
    return {"kto": KtoTrainer, "orpo": OrpoTrainer, "reward": RewardsTrainer}[objective.name]
