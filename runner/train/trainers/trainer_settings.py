"""Training settings in TRL's words, which all objectives share; autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from runner.machine import kernels
from runner.rundir.directory import RunDir
from runner.spec import RunSpec

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
    "muon": "adamw_torch_fused",  # for what is no matrix of a layer (muon.py)
}
NEVER = 2**31 - 1
WSD_DECAY_SHARE = 0.2  # of all steps; 10–20% decays as well as a full cosine (arXiv 2405.18392)


def autocast(spec: RunSpec) -> AbstractContextManager[Any]:
    """Autocast as in training, for evaluation outside the trainer."""
    if spec.train.precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if spec.train.precision == "bf16" else torch.float16
    return torch.autocast("cuda" if spec.hw.accelerator == "cuda" else "cpu", dtype)


SharedSettings = dict[str, Any]
"""TRL's settings that all objectives have, by its names; TRL refuses one that it does not know."""


def shared_settings(
    spec: RunSpec, run: RunDir, total_steps: int, report_to: list[str], deepspeed: dict[str, Any] | None = None
) -> SharedSettings:
    """Our settings in TRL's words. With `deepspeed` (its resolved JSON) before the model is loaded, for ZeRO-3's sake:
    transformers looks for existing settings to know that it has to shard."""
    train, evaluate, on_gpu = spec.train, spec.eval, spec.hw.accelerator == "cuda"
    decay = {"num_decay_steps": max(1, round(WSD_DECAY_SHARE * total_steps))} if train.schedule == "wsd" else {}
    return {
        "output_dir": str(run.path / "checkpoints"),
        "per_device_train_batch_size": int(train.micro_batch_size),
        "per_device_eval_batch_size": 1,  # rows of preferences are measured one by one (heldout.py)
        "gradient_accumulation_steps": int(train.accumulation_steps),
        "num_train_epochs": train.num_epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": SCHEDULES[train.schedule],
        "lr_scheduler_kwargs": decay,
        "warmup_steps": round(train.warmup_ratio * total_steps),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": OPTIMIZERS[train.optimizer],
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "tf32": train.tf32 or None,  # None leaves torch's own setting
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
        "dataloader_pin_memory": on_gpu,
        # A copy that the host waits for waits for all work that was launched before it.
        "accelerator_config": {"non_blocking": on_gpu},
    }
