"""Held-out loss: one number per model and data, independent of batch and number of ranks.

transformers and TRL average over batches, of which one may hold more tokens than another; and the rows that fill the
last batch of several processes up are counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from runner.train.trainers.recording_trainer import RecordingTrainerMixin

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel
    from transformers.trainer_utils import EvalLoopOutput

    from runner.train.trainers.recording_trainer import Batch

Row = dict[str, float]


def num_unique_rows(accelerator: Accelerator, size: int) -> int:
    """Rows of this process's batch of `size` that are no duplicates: accelerate fills the last batch up with some."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return size
    return int(min(size, max(0, state.remainder - accelerator.process_index * size)))


class TokenMean(RecordingTrainerMixin):
    """The mean over all labelled tokens; without the balance of experts (`router_aux_loss_coef`), which is no loss of
    words and depends on the batch."""

    aux_loss_enabled: bool
    held = (0.0, 0.0)
    """Summed loss and labelled tokens of the measurement at hand."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the trainer, with the loss as a mean over tokens."""
        self.held = 0.0, 0.0
        output = super().evaluation_loop(*args, **kwargs)
        total, count = self.ranks.all_reduce_sum(self.held)
        output.metrics["eval_loss"] = total / max(1.0, count)
        return output

    def prediction_step(
        self, model: PreTrainedModel, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        """One batch; `inputs["labels"]` is [b, s]."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        labels[num_unique_rows(self.accelerator, len(labels)) :] = -100
        balanced, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs, num_items_in_batch=1)
        finally:
            self.aux_loss_enabled = balanced
        if self.args.average_tokens_across_devices:
            loss = loss / self.accelerator.num_processes  # as it expects a mean over the processes
        self.held = self.held[0] + float(loss), self.held[1] + int((labels[:, 1:] != -100).sum())
        return loss.detach(), None, None


class RowMeans(RecordingTrainerMixin):
    """Means over all rows, measured one by one: TRL's metrics of a batch are then those of a row."""

    held: list[Row]

    def eval_metric_store(self) -> dict[str, list[float]]:
        """The dictionary in which TRL collects metrics of batches."""
        found: dict[str, list[float]] = self._metrics["eval"]
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the trainer, with loss and metrics as means over rows."""
        self.held = []
        output = super().evaluation_loop(*args, **kwargs)
        means = self.means(list(chain.from_iterable(self.ranks.all_gather(self.held))))
        output.metrics["eval_loss"] = means.pop("loss")
        self.eval_metric_store().update({name: [value] for name, value in means.items()})
        return output

    def prediction_step(
        self, model: PreTrainedModel, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None, None]:
        """One row."""
        with _without_gathering(self.accelerator):
            loss = super().prediction_step(model, inputs, True)[0]
        store = self.eval_metric_store()
        row = {"loss": float(loss), **{name: float(values[-1]) for name, values in store.items()}}
        store.clear()
        if num_unique_rows(self.accelerator, 1):
            self.held.append(self.row_metrics(row, inputs))
        return loss, None, None

    def row_metrics(self, row: Row, inputs: Batch) -> Row:
        """The metrics to keep of a row."""
        return row

    def means(self, rows: list[Row]) -> Row:
        """Means over all rows; of a metric that only some rows have, over those."""
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row[name] for row in rows if name in row] for name in names}
        return {name: sum(column) / len(column) for name, column in columns.items()}


@contextmanager
def _without_gathering(accelerator: Accelerator) -> Iterator[None]:
    """Context in which nothing is gathered from other processes."""
    accelerator.gather = accelerator.gather_for_metrics = lambda values, *_: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
