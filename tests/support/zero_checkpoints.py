"""Real DeepSpeed checkpoints for `test_export.py`: transformers' Trainer on two ranks, two steps per case.

    torchrun --nproc-per-node 2 tests/support/zero_checkpoints.py CASES.json

CASES is a list of {run, stage, bare, frozen}: a run directory with its spec; `bare` leaves the shards alone, as the
worker does, where the Trainer also writes the model; `frozen` says whether the shards hold frozen weights, null leaves
that to the Trainer. Beside the checkpoint goes `weights.pt`: every weight as the model itself held it at the end.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate.state import AcceleratorState
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from runner.paths import DEEPSPEED_CONFIGS
from runner.spec import RunSpec
from runner.train import adapter_config, model_loading, trainable_weights

STEPS = 2


class Bare(Trainer):
    """Writes shards only."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing within a checkpoint."""


def train(case: dict[str, Any]) -> None:
    """One case: model, two steps, checkpoint, weights."""
    run = Path(case["run"])
    spec = RunSpec.model_validate(json.loads((run / "spec.json").read_text("utf-8")))
    args = TrainingArguments(
        output_dir=str(run / "checkpoints"), per_device_train_batch_size=2, max_steps=STEPS, save_steps=STEPS,
        save_strategy="steps", learning_rate=1e-2, bf16=True, use_cpu=True, optim="adamw_torch", report_to=[],
        disable_tqdm=True, deepspeed=str(DEEPSPEED_CONFIGS / f"zero{case['stage']}.json"),
    )  # fmt: skip
    model = model_loading.load_model(spec, spec.model.id)
    trainable_weights.mark_trainable(spec, model)
    adapter = adapter_config.adapter_config(spec, model)
    if adapter is not None:
        model = get_peft_model(model, adapter)
        for parameter in model.parameters():  # ZeRO-3 wants one precision: an adapter's is fp32, a saved module's not
            if parameter.requires_grad and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(model_loading.DTYPES[spec.train.precision])
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 60, (16, 12))]
    trainer = (Bare if case["bare"] else Trainer)(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=model_loading.load_tokenizer(spec, spec.model.id),
    )
    trainer.train()
    if case["frozen"] is not None:
        checkpoint = run / "checkpoints" / f"checkpoint-{STEPS}"
        if args.process_index == 0:
            shutil.rmtree(checkpoint / f"global_step{STEPS}")
        torch.distributed.barrier()
        trainer.deepspeed.save_checkpoint(str(checkpoint), exclude_frozen_parameters=not case["frozen"])
    weights = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        with GatheredParameters([parameter], enabled=case["stage"] == 3):
            weights[name] = parameter.detach().clone()
    if args.process_index == 0:
        torch.save(weights, run / "weights.pt")
    trainer.deepspeed.destroy()


def main() -> None:
    """All cases in one pair of processes: importing takes longer than training."""
    # Without this DeepSpeed compiles a C++ all-reduce for CPUs, half a minute on two cores; gloo has one.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # the attribute `torch` is torch itself
    deepspeed.init_distributed("gloo")
    for case in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        train(case)
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
