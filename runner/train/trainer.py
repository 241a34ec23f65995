"""TRL's SFTTrainer with our settings, which the other objectives' trainers share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from runner.machine import kernels
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train.recording_trainer import RecordingTrainerMixin

SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
    "wsd": "warmup_stable_decay",
}
OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
NEVER = 2**31 - 1
WSD_DECAY_SHARE = 0.2  # of all steps; 10–20% decays as well as a full cosine (arXiv 2405.18392)


class CountingTrainer(RecordingTrainerMixin, SFTTrainer):  # type: ignore[misc]  # trl has no types
    """SFTTrainer that counts, keeps whole checkpoints, and spares a CPU the head's work where nothing is learned."""

    def sizes(self, inputs: Any) -> tuple[int, int]:
        """`inputs["input_ids"]` is [b, s]."""
        mask = inputs.get("attention_mask")
        if mask is None:  # packed: padding begins a document of its own at every position
            pad = self.processing_class.pad_token_id
            mask = (inputs["position_ids"] != 0) | (inputs["input_ids"] != pad)
        return inputs["input_ids"].numel(), int(mask.sum())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the labelled tokens; `inputs["labels"]` is [b, s].

        TRL's fused head saves memory with Triton; without it, it scores every position in fp32 and once more
        in backward: 1.3 of the 1.9 s of a step of 512 tokens on one CPU thread. So on a CPU the head
        sees only the positions that have a label in some row. TRL's entropy and token accuracy are not counted then.
        """
        if not self.args.use_cpu or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(0).nonzero().flatten()
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        outputs = model(**rest, use_cache=False, logits_to_keep=columns)
        logits, labels = outputs.logits, labels[:, columns].flatten()
        if logits.shape[1] != len(columns):  # xLSTM takes `logits_to_keep` and does not look at it
            logits = logits[:, columns]
        total = functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # counted over all ranks, whose gradients are averaged
        return (loss, outputs) if return_outputs else loss


def autocast(spec: RunSpec) -> AbstractContextManager[Any]:
    """The arithmetic that training uses, for evaluation outside the trainer."""
    if spec.train.precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if spec.train.precision == "bf16" else torch.float16
    return torch.autocast("cuda" if spec.hw.accelerator == "cuda" else "cpu", dtype)


def num_steps(spec: RunSpec, num_rows: int) -> int:
    """Optimiser steps of the whole run: `max_steps`, or the epochs' rows over the global batch.

    transformers counts an epoch's steps as ceil(micro batches / accumulation steps).
    """
    if spec.train.max_steps:
        return spec.train.max_steps
    assert isinstance(spec.train.micro_batch_size, int) and isinstance(spec.train.accumulation_steps, int)
    micro_batches = -(-num_rows // (spec.train.micro_batch_size * spec.hw.world_size))
    per_epoch = max(1, -(-micro_batches // spec.train.accumulation_steps))
    return -(-int(spec.train.num_epochs * per_epoch * 1000) // 1000)


def _pad_to(spec: RunSpec) -> int | str:
    """On a CPU every packed batch gets the same shape: oneDNN builds a kernel per shape and keeps each one's
    scratch memory. The main job peaked at 3.1 GiB without this (252 steps) and 2.2 GiB with it (336 steps)."""
    return spec.train.max_length if spec.hw.accelerator == "cpu" and spec.train.packing else "auto"


def _held_batch(spec: RunSpec) -> int:
    """Held-out rows at a time: rows of preferences are measured one by one, and packed ones are full (heldout.py)."""
    alone = spec.train.packing or spec.objective.name not in ("sft", "pretrain")
    return 1 if alone else int(spec.train.micro_batch_size)


def settings(spec: RunSpec, shared: dict[str, Any]) -> SFTConfig:
    """`shared_settings` and what supervised fine-tuning adds."""
    return SFTConfig(
        **shared,
        packing=spec.train.packing,
        pad_to_multiple_of=_pad_to(spec),
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def shared_settings(
    spec: RunSpec, run: RunDir, total_steps: int, report_to: list[str], deepspeed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Our settings in TRL's words. With `deepspeed` (its resolved JSON) before the model is loaded, for ZeRO-3's sake:
    transformers looks for living settings to know that it has to shard."""
    train, evaluate = spec.train, spec.eval
    warmup = round(train.warmup_ratio * total_steps)
    schedule_options = {}
    if train.schedule == "wsd":
        schedule_options = {"num_decay_steps": max(1, round(WSD_DECAY_SHARE * total_steps))}
    return {
        "output_dir": str(run.path / "checkpoints"),
        "per_device_train_batch_size": int(train.micro_batch_size),
        "per_device_eval_batch_size": _held_batch(spec),
        "gradient_accumulation_steps": int(train.accumulation_steps),
        "num_train_epochs": train.num_epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": SCHEDULES[train.schedule],
        "lr_scheduler_kwargs": schedule_options,
        "warmup_steps": warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": OPTIMIZERS[train.optimizer],
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "use_cpu": spec.hw.accelerator == "cpu",
        "activation_checkpointing": bool(train.gradient_checkpointing),
        "use_liger_kernel": kernels.liger(spec),
        # Not its loss, which would leave TRL's trainers without logits or their own fused head.
        "liger_kernel_config": {"fused_linear_cross_entropy": False} if kernels.liger(spec) else None,
        "max_length": train.max_length,
        "seed": train.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluate.every_steps else "no",
        "eval_steps": evaluate.every_steps,
        "metric_for_best_model": "eval_loss" if evaluate.every_steps else None,
        "greater_is_better": False if evaluate.every_steps else None,
        "save_strategy": "steps",  # and so after the last one, whatever `save_steps` is
        "save_steps": train.save_every_steps or NEVER,
        "save_total_limit": None,  # the sealer deletes, and only once the newer checkpoint is complete
        "deepspeed": deepspeed,
        "ddp_find_unused_parameters": bool(spec.model.num_experts),  # an expert may see no token of a micro batch
        "report_to": report_to,
        "run_name": run.id,
        "disable_tqdm": True,
        "dataloader_pin_memory": spec.hw.accelerator == "cuda",
    }
