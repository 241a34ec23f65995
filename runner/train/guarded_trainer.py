"""The trainer with loss guards: knows the rows of each batch and checks the loss before backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runner.errors import Rewind, RunnerError
from runner.train import row_ids
from runner.train.evaluation.heldout import TokenMean
from runner.train.loss_guard import LossGuard, MicroBatch, step_losses
from runner.train.recording_trainer import RecordingTrainerMixin
from runner.train.trainer import CountingTrainer


class LossGuardMixin(RecordingTrainerMixin):
    """Mixed in before a TRL trainer: a `LossGuard` over it; the losses stay bit by bit what they are without it.

    The trainer has no types: hence each `type: ignore` at a `super()`.
    """

    train_dataset: Any
    data_collator: Any
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, guard: LossGuard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = guard
        self.train_dataset = row_ids.numbered(self.train_dataset)
        self._watch_rows()
        self.step_rows: tuple[int, list[list[int]]] = 0, []
        """The current step, and the row ids [b] of each of its micro batches so far."""

    def _watch_rows(self) -> None:
        """Have every micro batch say which rows it is made of."""
        self.data_collator = row_ids.RowIds(self.data_collator)

    def _taken_rows(self, inputs: Any) -> list[int]:
        """The row ids of a micro batch, [b], taken out of it: no model takes them."""
        ids: list[int] = inputs.pop(row_ids.KEY).tolist()
        return ids

    def labelled(self, inputs: Any) -> int | None:
        """Tokens that the loss of a micro batch is a mean over; None where it is a mean over rows."""
        return None

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that transformers does not drop as unused."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns = self._signature_columns or []
        self._signature_columns = columns if row_ids.COLUMN in columns else [*columns, row_ids.COLUMN]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One micro batch, and which rows it is made of."""
        step = self.state.global_step + 1
        if step != self.step_rows[0]:
            self.step_rows = step, []
        self.step_rows[1].append(self._taken_rows(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As before; in training a micro batch that is not to be learned from gives the same loss with gradient 0."""
        training = model.training
        learned = self.labelled(inputs) if training else None
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not training:
            return result
        loss, *rest = result if return_outputs else (result,)
        step, ids = self.step_rows
        batch = MicroBatch(step, len(ids), self._mean(loss, learned, num_items_in_batch), ids[-1])
        with self._parting():
            learns = self.guard.learns(batch, step_losses(self.state.log_history), lambda: self._facts(batch.rows))
        if not learns:
            loss = loss.detach() + 0 * loss  # every parameter keeps its place in the graph, as DDP and ZeRO need it
        return (loss, *rest) if return_outputs else loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Marks the steps that were skipped; then looks at the norm, which is known only here."""
        step = self.state.global_step
        of_step = "loss" in logs
        if of_step and step in self.guard.skipped:
            logs["skipped"] = True
        super().log(logs, start_time)  # type: ignore[misc]
        if of_step and not self.args.fp16:
            ids = [row for some in self.step_rows[1] for row in some]
            losses = step_losses(self.state.log_history)
            with self._parting():
                self.guard.check_norm(step, float(logs.get("grad_norm") or 0.0), ids, losses, lambda: self._facts(ids))

    @contextmanager
    def _parting(self) -> Iterator[None]:
        """Where the guard ends this life, the last checkpoint is sealed first, and all go together: torchrun ends
        the others as soon as one has gone."""
        try:
            yield
        except RunnerError as error:
            if self.sealer is not None:
                self.sealer.wait()
            if isinstance(error, Rewind):
                self.guard.step_back()
            self.guard.ranks.barrier()
            raise

    def _mean(self, loss: Any, learned: int | None, num_items_in_batch: Any) -> float:
        """Loss per labelled token (or per row) of this micro batch; `loss` may be its share in the whole step's."""
        value = float(loss.detach())
        if num_items_in_batch is None or learned is None:
            return value
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return value * float(num_items_in_batch) / (max(1, learned) * processes)

    def _facts(self, ids: list[int]) -> dict[str, Any]:
        """For a dump."""
        shown = row_ids.texts(self.train_dataset, ids, self.processing_class)
        return {"learning_rate": self._get_learning_rate(), "rows": shown}  # type: ignore[attr-defined]


class GuardedTrainer(TokenMean, LossGuardMixin, CountingTrainer):
    """Supervised fine-tuning and pretraining under guard."""

    def labelled(self, inputs: Any) -> int | None:
        """Of `inputs["labels"]`, [b, s]."""
        return int((inputs["labels"][:, 1:] != -100).sum())
