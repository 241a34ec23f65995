"""Trainer mixins for preferences and marked answers: exact means, over rows or tokens, and given spans masked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset

from runner.train.trainers.guarded_trainer import ROW_IDS, LossGuardMixin
from runner.train.trainers.heldout import RowMeans

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel
    from transformers.trainer_utils import EvalLoopOutput

    from runner.train.trainers.guarded_trainer import Collator, Row
    from runner.train.trainers.recording_trainer import Batch, Count, Loss, NumItems

REWARD_METRICS = {
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logps_chosen",
    "logps/rejected": "logps_rejected",
}


class _PairsMixin(RowMeans, LossGuardMixin):
    """The loss is a mean over the rows of a step: one that is not full counts by its rows, however it is split."""

    mean_rows = 1.0
    """Per micro batch of the step."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The micro batches of a step; counts them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.mean_rows = self._mean_of([len(batch[ROW_IDS]) for batch in batches])
        return batches, num_items

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Loss:
        """The trainer's loss; in training weighted by the share of the rows."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training or self.share == 1:
            return result
        return (result[0] * self.share, result[1]) if isinstance(result, tuple) else result * self.share

    @property
    def share(self) -> float:
        """Rows of the micro batch at hand beside the mean of the step."""
        return len(self.step_rows[1][-1]) / self.mean_rows if self.model.training else 1.0

    def _mean_of(self, counts: list[int]) -> float:
        """The mean over the micro batches of all processes."""
        total, number = self.ranks.all_reduce_sum([sum(counts), len(counts)])
        return total / max(1.0, number)


class GivenSpansCollator:
    """A collator around TRL's: what users and tools say inside an answer is given, and no part of its probability."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, examples: list[Row]) -> Batch:
        """The collator's batch of b rows, with 0 for such tokens in `completion_mask` [2b, s], or [b, s] for KTO."""
        batch = self.collator(examples)
        names = ("chosen", "rejected") if "chosen_ids" in examples[0] else ("completion",)
        answers = {"completion_mask": names, "KL_completion_mask": ("KL_completion",)}
        for key in answers.keys() & batch.keys():
            rows = [(example, name) for name in answers[key] for example in examples]
            for mask, (example, name) in zip(batch[key], rows, strict=True):
                for begin, end in given_spans(example, name):
                    mask[begin:end] = 0
        return batch


def given_spans(row: Row, name: str) -> list[tuple[int, int]]:
    """[begin, end) of an answer's tokens that are given, counted from the prompt's first."""
    edges = [len(row["prompt_ids"]) + edge for edge in row.get(f"{name}_given") or ()]
    return list(zip(edges[::2], edges[1::2], strict=True))


class TokenisedPairsMixin(_PairsMixin):
    """For TRL's trainers that accept rows tokenised by preference_dataset.py."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _wrap_collator(self) -> None:
        self.data_collator = GivenSpansCollator(self.data_collator)
        super()._wrap_collator()

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As TRL, which does it while the trainer is made."""
        self.data_collator = GivenSpansCollator(self.data_collator)
        found: tuple[torch.Tensor, torch.Tensor] = super()._precompute_ref_logps(*args, **kwargs)
        return found

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        given = [f"{name}_given" for name in ("chosen", "rejected", "completion", "KL_completion")]
        self._signature_columns = list(dict.fromkeys([*(self._signature_columns or []), *given]))


class LabelledPairsMixin(_PairsMixin):
    """For TRL's older trainers, which want each sequence with mask and labels.

    Their next-token loss is a mean over the tokens of a micro batch. Here it is one over those of a whole step (or of
    all held-out rows): each micro batch counts by its tokens, so that accumulation changes nothing.
    """

    METRICS = REWARD_METRICS | {"nll_loss": "nll_loss"}
    LEARNED: ClassVar[tuple[str, int]] = ("chosen_labels", -100)
    """Column of a pair by which tokens of the better answer are learned, and its mark for those that are not."""
    max_length: int
    mean_tokens = 1.0
    """Learned per micro batch of the step, or per held-out row."""

    def eval_metric_store(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = self._stored_metrics["eval"]
        return found

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The micro batches of a step; counts them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.mean_tokens = self._mean_of([self._num_learned(batch) for batch in batches])
        return batches, num_items

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the trainer; counts the rows first."""
        column, ignored = self.LEARNED
        rows = dataloader.dataset[column]
        self.mean_tokens = sum(value != ignored for row in rows for value in row[1:]) / len(rows)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def concatenated_forward(self, model: PreTrainedModel, batch: Batch) -> tuple[Any, ...]:
        """TRL's: log probabilities, logits, then the next-token loss."""
        found = list(super().concatenated_forward(model, batch))
        found[4] = found[4] * (self._num_learned(batch) / self.mean_tokens / self.share)
        return tuple(found)

    def _num_learned(self, batch: Batch) -> int:
        """Learned tokens, without the first of a sequence, which has none before it."""
        column, ignored = self.LEARNED
        return int((batch[column][:, 1:] != ignored).sum())

    def tokenize_row(self, feature: Row, model: PreTrainedModel | None = None) -> Row:
        """The columns of a row that is tokenised already."""
        prompt = feature["prompt_ids"]
        row: Row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for name in ("chosen", "rejected"):
            ids = (prompt + feature[f"{name}_ids"])[: self.max_length]
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            for begin, end in given_spans(feature, name):
                labels[begin:end] = [-100] * len(labels[begin:end])
            row[f"{name}_labels"] = labels
        return row

    def sizes(self, inputs: Batch) -> tuple[int, Count]:
        """Both sequences of a pair are padded to the longer one of all."""
        masks = [inputs[f"{name}_attention_mask"] for name in ("chosen", "rejected")]
        width = max(mask.shape[1] for mask in masks)
        return 2 * len(masks[0]) * width, sum(mask.sum() for mask in masks)
