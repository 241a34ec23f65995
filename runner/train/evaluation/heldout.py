"""Held-out loss: one number per model and data, independent of batch and number of ranks.

transformers and TRL average over batches, of which one may hold more tokens than another; and the rows that fill the
last batch of several processes up are counted twice. Their trainers have no types: hence each `type: ignore`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from runner.train.recording_trainer import RecordingTrainerMixin

Row = dict[str, float]


def num_own(accelerator: Any, size: int) -> int:
    """Rows among the `size` of this process's batch that no other one has: repeated ones fill the last batch up."""
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

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As before, but for the loss."""
        self.held = 0.0, 0.0
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        total, count = self.ranks.total(self.held)
        output.metrics["eval_loss"] = total / max(1.0, count)
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        """One batch; `inputs["labels"]` is [b, s]."""
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        labels = inputs["labels"]
        labels[num_own(self.accelerator, len(labels)) :] = -100
        balanced, self.aux_loss_enabled = self.aux_loss_enabled, False
        try:
            with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                loss = self.compute_loss(model, inputs, num_items_in_batch=1)  # type: ignore[attr-defined]
        finally:
            self.aux_loss_enabled = balanced
        if self.args.average_tokens_across_devices:
            loss = loss / self.accelerator.num_processes  # as it expects a mean over the processes
        self.held = self.held[0] + float(loss), self.held[1] + int((labels[:, 1:] != -100).sum())
        return loss.detach(), None, None


class RowMeans(RecordingTrainerMixin):
    """Means over all rows, which are measured one by one: what TRL says of a batch is then what it says of the row."""

    held: list[Row]

    def held_metrics(self) -> dict[str, list[float]]:
        """Where TRL collects what it measures of batches."""
        found: dict[str, list[float]] = self._metrics["eval"]  # type: ignore[attr-defined]
        return found

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As before, but for loss and metrics."""
        self.held = []
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        means = self.means(list(chain.from_iterable(self.ranks.gather(self.held))))
        output.metrics["eval_loss"] = means.pop("loss")
        self.held_metrics().update({name: [value] for name, value in means.items()})
        return output

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        """One row."""
        with _alone(self.accelerator):
            loss = super().prediction_step(model, inputs, True)[0]  # type: ignore[misc]
        store = self.held_metrics()
        row = {"loss": float(loss), **{name: float(values[-1]) for name, values in store.items()}}
        store.clear()
        if num_own(self.accelerator, 1):
            self.held.append(self.described(row, inputs))
        return loss, None, None

    def described(self, row: Row, inputs: Any) -> Row:
        """What is kept of a row."""
        return row

    def means(self, rows: list[Row]) -> Row:
        """Of all rows; a metric that only some have is a mean over those."""
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row[name] for row in rows if name in row] for name in names}
        return {name: sum(column) / len(column) for name, column in columns.items()}


@contextmanager
def _alone(accelerator: Any) -> Iterator[None]:
    """Context in which nothing is gathered from other processes."""
    accelerator.gather = accelerator.gather_for_metrics = lambda values, *_: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
