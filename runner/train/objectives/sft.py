"""`objective=sft`: next-token loss on what is to be learned of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from runner import spec as schema
from runner.data.examples import Example
from runner.spec import RunSpec
from runner.train.objectives.objective import Objective, Own
from runner.train.tokens import token_dataset
from runner.train.tokens.token_cache import OnProgress, Tokenised
from runner.train.trainers.guarded_trainer import LossGuardMixin
from runner.train.trainers.heldout import TokenMean
from runner.train.trainers.recording_trainer import RecordingTrainerMixin

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runner.data.examples import Learnable
    from runner.train.objectives.objective import TrainerParts
    from runner.train.trainers.recording_trainer import Batch, Count, Loss, NumItems
    from runner.train.trainers.trainer_settings import SharedSettings


class UnguardedSftTrainer(RecordingTrainerMixin, SFTTrainer):  # type: ignore[misc]  # trl has no types
    """SFTTrainer that counts tokens, seals checkpoints, computes the head at labelled positions only on a CPU, and
    reads no number from a GPU in the middle of a step."""

    def sizes(self, inputs: Batch) -> tuple[int, Count]:
        """`inputs["input_ids"]` is [b, s]."""
        mask = inputs.get("attention_mask")
        if mask is None:  # packed: padding begins a document of its own at every position
            pad = self.processing_class.pad_token_id
            mask = (inputs["position_ids"] != 0) | (inputs["input_ids"] != pad)
        return inputs["input_ids"].numel(), mask.sum()

    def compute_loss(
        self, model: PreTrainedModel, inputs: Batch, return_outputs: bool = False, num_items_in_batch: NumItems = None
    ) -> Loss:
        """Mean cross-entropy over the labelled tokens; `inputs["labels"]` is [b, s].

        TRL's fused head saves memory with Triton; without it, it scores every position in fp32 and once more
        in backward: 1.3 of the 1.9 s of a step of 512 tokens on one CPU thread. So on a CPU the head
        sees only the positions that have a label in some row.

        TRL's entropy and token accuracy, which nothing reads, are not counted: for them and for its count of tokens it
        waits for the GPU five times in a micro batch. A mixture's loss is left to TRL, which balances its experts.
        """
        if self.aux_loss_enabled:
            found: Loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return found
        total, outputs = (self._labelled_loss if self.args.use_cpu else self._fused_loss)(model, inputs)
        count = (inputs["labels"][:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # counted over all ranks, whose gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def _fused_loss(self, model: PreTrainedModel, inputs: Batch) -> tuple[torch.Tensor, Any]:
        """Summed cross-entropy by TRL's fused head; 0 for a position without a label."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum(), outputs

    def _labelled_loss(self, model: PreTrainedModel, inputs: Batch) -> tuple[torch.Tensor, Any]:
        """Summed cross-entropy from logits of the columns that have a label."""
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(0).nonzero().flatten()
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**rest, use_cache=False, logits_to_keep=columns)
        logits, labels = outputs.logits, labels[:, columns].flatten()
        if logits.shape[1] != len(columns):  # xLSTM takes `logits_to_keep` and does not look at it
            logits = logits[:, columns]
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum"), outputs


def _pad_to(spec: RunSpec) -> int | str:
    """On a CPU, and for compiled layers, every packed batch gets the same shape: oneDNN builds a kernel per shape and
    keeps each one's scratch memory. The main job peaked at 3.1 GiB without this (252 steps) and 2.2 GiB with it
    (336 steps)."""
    fixed = spec.hw.accelerator == "cpu" or spec.train.compile is True
    return spec.train.max_length if fixed and spec.train.packing else "auto"


def sft_config(spec: RunSpec, shared: SharedSettings) -> SFTConfig:
    """`shared_settings` and what supervised fine-tuning adds."""
    batch = 1 if spec.train.packing else int(spec.train.micro_batch_size)  # packed rows are full
    return SFTConfig(
        **(shared | {"per_device_eval_batch_size": batch}),
        packing=spec.train.packing,
        pad_to_multiple_of=_pad_to(spec),
        dataset_kwargs={"skip_prepare_dataset": True},
    )


class SftTrainer(TokenMean, LossGuardMixin, UnguardedSftTrainer):
    """The trainer of `objective=sft` and `pretrain`, with the loss guard."""

    def num_labels(self, inputs: Batch) -> torch.Tensor | None:
        """Labelled tokens of `inputs["labels"]`, [b, s]."""
        count: torch.Tensor = (inputs["labels"][:, 1:] != -100).sum()
        return count


class NextToken(Objective[Own]):
    """Objectives that learn the next token, with TRL's SFTTrainer."""

    per_token_loss = True
    trainer_class: type[SftTrainer] = SftTrainer

    def settings(self, shared: SharedSettings) -> SFTConfig:
        """TRL's settings, with packing."""
        return sft_config(self.spec, shared)

    def trainer(
        self, source: str, model: PreTrainedModel, adapter: PeftConfig | None, common: TrainerParts
    ) -> SftTrainer:
        """The trainer, with the loss guard."""
        return self.trainer_class(model=model, peft_config=adapter, **common)


class Sft(NextToken[schema.Sft]):
    """Conversations, prompts with completions, and plain text."""

    def prompts(self, held: Sequence[Learnable]) -> list[Example]:
        """Rows with an answer."""
        return [row for row in held if isinstance(row, Example) and row.completion]

    def tokenise(
        self, rows: Sequence[Learnable], tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress | None = None,
        *, held: bool = False,
    ) -> Tokenised:  # fmt: skip
        """`input_ids` [s] and `labels` [s]."""
        return token_dataset.tokenise(cast("Sequence[Example]", rows), tokenizer, self.spec, on_progress)
