"""Base of the objectives over preferences and marked answers: mixins of their trainers, and the reference model.

TRL's trainers have no types: hence each `type: ignore` at a `super()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value
from peft import get_peft_model

from runner.data.tokenize_rows import PreferenceSettings
from runner.spec import Full, RunSpec
from runner.train import model_loading
from runner.train.evaluation.heldout import RowMeans
from runner.train.guarded_trainer import LossGuardMixin
from runner.train.model_loading import DTYPES
from runner.train.objectives import preference_dataset
from runner.train.objectives.objective import Objective
from runner.train.row_ids import KEY
from runner.train.token_cache import Tell, Tokenised

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


class Prepared(_Pairs):
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


class Labelled(_Pairs):
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


class Compared(Objective):
    """An objective over rows that are tokenised in columns, with a reference model where its loss asks for one."""

    trainer_class: Any
    columns: tuple[str, ...] = ("prompt_ids", "chosen_ids", "chosen_given", "rejected_ids", "rejected_given")
    """Columns of token ids."""
    adapter_first = False
    """TRL's older trainers (ORPO and CPO in TRL 1.16) would make every other weight of a packed base fp32
    (`prepare_model_for_kbit_training`), so they get a model with its adapter."""

    def tokenise(
        self, rows: Sequence[Any], tokenizer: Any, tell: Tell | None = None, *, held: bool = False
    ) -> Tokenised:
        """As `Objective.tokenise`, in `columns`."""
        return preference_dataset.tokenise(rows, tokenizer, self.spec, self.row_settings(), self.features(rows), tell)

    def row_settings(self) -> PreferenceSettings:
        """Tokens that a row may have, and what is cut."""
        return PreferenceSettings(self.spec.train.max_length, 1, False)

    def features(self, rows: Sequence[Any]) -> Features:
        """Arrow's types of the columns."""
        return Features(dict.fromkeys(self.columns, List(Value("int32"))))

    def trainer(self, source: str, model: Any, adapter: Any, common: dict[str, Any]) -> LossGuardMixin:
        """With a copy of the model as its reference, where that is needed."""
        if self.adapter_first and adapter is not None:
            model, adapter = _adapted(self.spec, model, adapter), None
        if self.spec.objective.passes(self.spec.method.adapts).separate_reference:
            common["ref_model"] = reference(self.spec, source)
        made: LossGuardMixin = self.trainer_class(model=model, peft_config=adapter, **common)
        return made


def reference(spec: RunSpec, source: str) -> Any:
    """The model as it is before training, frozen, in the width of the arithmetic. An adapter needs none: switched off,
    it leaves its base."""
    frozen = spec.model_copy(update={"method": Full(master_weights=False)})
    return model_loading.load_model(frozen, source).requires_grad_(False)


def _adapted(spec: RunSpec, model: Any, config: Any) -> Any:
    """The adapter put on as TRL's newer trainers do: 16 bits wide over a packed base, under ZeRO-3 like the base."""
    sharded = spec.deepspeed.name.startswith("zero3")
    packed = spec.method.packed
    whole = get_peft_model(model, config, autocast_adapter_dtype=not sharded or packed)
    if packed:
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(DTYPES["bf16"])
    return whole
