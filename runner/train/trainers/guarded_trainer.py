"""Trainer mixin that checks the loss before backward, and knows which rows each micro batch is made of.

The training set gets a column `__row__`. The collator takes it off again and puts `row_ids` beside what it makes of
the rows; the trainer takes that out before the model sees the batch. So it is true of any sampler, any number of
processes and packed rows: the data itself says where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from datasets import Dataset

from runner.errors import Rewind, RunnerError
from runner.train.checkpoint_saving import CheckpointSealer
from runner.train.trainers.loss_guard import LossGuard, MicroBatch, step_losses
from runner.train.trainers.recording_trainer import Batch, Loss, NumItems, RecordingTrainerMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ROW_COLUMN = "__row__"  # not `row`: a data set may have a column of that name for its reward function
ROW_IDS = "row_ids"
LONGEST_TEXT = 300
"""Characters shown of one document."""

Row = dict[str, Any]
"""A row of the tokenised data set: columns by name."""
Collator = Callable[[list[Row]], Batch]


def numbered_rows(rows: Dataset) -> Dataset:
    """The same rows with their index as a column: 8 bytes a row, the rest is not copied."""
    return rows.add_column(ROW_COLUMN, list(range(len(rows))))


class RowText(TypedDict):
    """A row of the tokenised data set as text."""

    row: int
    num_tokens: int
    texts: list[str]
    """Beginnings of its documents (one if not packed), or of prompt and answers."""


class DumpFacts(TypedDict):
    """Facts in `nan/step-<k>-rank<r>.json` beside the loss."""

    learning_rate: float
    rows: list[RowText]


class RowIdCollator:
    """A collator around another one, which does not see the column; rows without it (held-out ones) pass unchanged."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, examples: list[Row]) -> Batch:
        """The collator's batch of b rows, with b `row_ids`: one per row also where it joins all into one."""
        ids = [example[ROW_COLUMN] for example in examples if ROW_COLUMN in example]
        batch = self.collator([{k: v for k, v in example.items() if k != ROW_COLUMN} for example in examples])
        if ids:
            batch[ROW_IDS] = ids  # no tensor, which would go to the GPU and have to be fetched back
        return batch


def row_texts(rows: Dataset, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[RowText]:
    """The rows as text, for a dump."""
    found: list[RowText] = []
    for index in ids:
        row = rows[index]
        if "input_ids" not in row:  # a preference: its prompt and answers; a prompt to be answered: itself
            parts = {name: value for name, value in row.items() if name.endswith("_ids")}
            shown = [f"{name}: {tokenizer.decode(ids[:LONGEST_TEXT])[:LONGEST_TEXT]}" for name, ids in parts.items()]
            shown = shown or [str(row.get("prompt"))[:LONGEST_TEXT]]
            found.append({"row": index, "num_tokens": sum(map(len, parts.values())), "texts": shown})
            continue
        tokens, begin, shown = row["input_ids"], 0, []
        for length in row.get("seq_lengths") or [len(tokens)]:
            # A token is a character or more, but for the rare ones of several bytes.
            shown.append(tokenizer.decode(tokens[begin : begin + min(length, LONGEST_TEXT)])[:LONGEST_TEXT])
            begin += length
        found.append({"row": index, "num_tokens": len(tokens), "texts": shown})
    return found


class LossGuardMixin(RecordingTrainerMixin):
    """Mixed in before a TRL trainer: a `LossGuard` over it; the losses stay bit by bit what they are without it."""

    train_dataset: Any
    data_collator: Any
    _signature_columns: list[str] | None

    def __init__(self, *args: Any, guard: LossGuard, sealer: CheckpointSealer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard, self.ranks, self.sealer = guard, guard.ranks, sealer
        self.train_dataset = numbered_rows(self.train_dataset)
        self._wrap_collator()
        self.step_rows: tuple[int, list[list[int]]] = 0, []
        """The current step, and the row ids [b] of each of its micro batches so far."""
        self.unjudged: list[torch.Tensor] = []
        """Losses [] of the current step's micro batches so far, where they are judged together."""

    def _wrap_collator(self) -> None:
        """Wrap the collator, so that every micro batch carries its row ids."""
        self.data_collator = RowIdCollator(self.data_collator)

    def _pop_row_ids(self, inputs: Batch) -> list[int]:
        """Remove the row ids from a micro batch and return them, [b]."""
        ids: list[int] = inputs.pop(ROW_IDS)
        return ids

    def num_labels(self, inputs: Batch) -> torch.Tensor | None:
        """Labelled tokens of a micro batch; None where the loss is a mean over rows."""
        return None

    def _set_signature_columns_if_needed(self) -> None:
        """Add the row id to the columns that transformers keeps."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = columns if ROW_COLUMN in columns else [*columns, ROW_COLUMN]

    def training_step(self, model: PreTrainedModel, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro batch, and which rows it is made of."""
        step = self.state.global_step + 1
        if step != self.step_rows[0]:
            self.step_rows, self.unjudged = (step, []), []
        self.step_rows[1].append(self._pop_row_ids(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Loss:
        """The trainer's loss; of a micro batch that the guard skips with gradient 0.

        Where nothing is to be skipped, the losses of a step are judged together before its last backward pass, so that
        the host waits for the GPU once in a step.
        """
        training = model.training
        learned = self.num_labels(inputs) if training else None
        result: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not training:
            return result
        loss, *rest = result if isinstance(result, tuple) else (result,)
        mean = self._mean(loss, learned, num_items_in_batch)
        if not self.guard.skips:
            self._check_losses(mean)
            return result
        step, ids = self.step_rows
        batch = MicroBatch(step, len(ids), float(mean), ids[-1])
        with self._ending_together():
            learns = self.guard.learns(batch, step_losses(self.state.log_history), self._facts)
        if not learns:
            loss = loss.detach() + 0 * loss  # every parameter keeps its place in the graph, as DDP and ZeRO need it
        return (loss, rest[0]) if return_outputs else loss

    def _check_losses(self, mean: torch.Tensor) -> None:
        """Have the guard check the losses of a step; `mean` is that of the micro batch at hand."""
        self.unjudged.append(mean)
        step, ids = self.step_rows
        if len(ids) < self.current_gradient_accumulation_steps:
            return
        losses, self.unjudged = torch.stack(self.unjudged).tolist(), []
        first = len(ids) - len(losses)
        batches = [MicroBatch(step, n + 1, loss, ids[n]) for n, loss in enumerate(losses, first)]
        with self._ending_together():
            self.guard.check_losses(batches, step_losses(self.state.log_history), self._facts)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Mark skipped steps, and check the gradient norm, which is known only here."""
        step = self.state.global_step
        of_step = "loss" in logs
        if of_step and step in self.guard.skipped:
            logs["skipped"] = True
        super().log(logs, start_time)
        if of_step and not self.args.fp16:
            ids = [row for some in self.step_rows[1] for row in some]
            losses = step_losses(self.state.log_history)
            with self._ending_together():
                self.guard.check_norm(step, float(logs.get("grad_norm") or 0.0), ids, losses, self._facts)

    @contextmanager
    def _ending_together(self) -> Iterator[None]:
        """Context in which an error of the guard ends all processes together, with the last checkpoint sealed: torchrun
        ends the others as soon as one has exited."""
        try:
            yield
        except RunnerError as error:
            if self.sealer is not None:
                self.sealer.wait()
            if isinstance(error, Rewind):
                self.guard.step_back()
            self.guard.ranks.barrier()
            raise

    def _mean(self, loss: torch.Tensor, learned: torch.Tensor | None, num_items_in_batch: NumItems) -> torch.Tensor:
        """Loss [] per labelled token (or per row) of this micro batch; `loss` may be its share in the whole step's."""
        value = loss.detach().float()
        if num_items_in_batch is None or learned is None:
            return value
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return value * num_items_in_batch / (learned.clamp(min=1) * processes)

    def _facts(self, ids: list[int]) -> DumpFacts:
        """Learning rate and row texts, for a dump."""
        shown = row_texts(self.train_dataset, ids, self.processing_class)
        return {"learning_rate": self._get_learning_rate(), "rows": shown}
