"""Our worker against a bare TRL script with the same settings: the same losses, step by step.

In fp32: on a CPU our head scores labelled positions only and TRL's scores all, and in bf16 two orders of summing
move apart by up to 0.02 within five steps; in fp32 by less than 0.00001.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import FALLBACK
from runner.data.commands_dataset import examples
from runner.train import model_loading
from tests.conftest import spec_of
from tests.support import preferences

# What somebody would write without this project. It gets the rows as text and lets TRL do the rest.
SCRIPT = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

source, rows, out, packing = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3], sys.argv[4] == "true"
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    args=SFTConfig(
        output_dir=out, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=1, max_length=128, packing=packing,
        bf16=False, use_cpu=True, gradient_checkpointing=False, seed=42,
        pad_to_multiple_of=128 if packing else "auto", logging_steps=1, save_strategy="no",
        max_grad_norm=1.0, weight_decay=0.0, optim="adamw_torch_fused", report_to="none", disable_tqdm=True,
    ),
)
trainer.train()
json.dump([h["loss"] for h in trainer.state.log_history if "loss" in h], open(out + "/losses.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_same_losses_as_bare_trl(packing: str, train: Callable[..., Any], tmp_path: Path) -> None:
    finished, run = train(
        "train.precision=fp32", f"train.packing={packing}", "train.batch_size=4", "train.micro_batch_size=2",
        "train.learning_rate=1e-3", "train.warmup_ratio=0.2", "train.attention=sdpa", "hw.num_cpus=1",
        "eval.num_prompts=0",
    )  # fmt: skip
    ours = [line["loss"] for line in run.metrics()]

    system = {"role": "system", "content": spec_of().data.system_prompt}
    rows = [
        {
            "prompt": [system, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in examples()[0][:40]
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    out = tmp_path / "bare"
    out.mkdir()
    source = model_loading.source_of(spec_of().model)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, source, str(tmp_path / "rows.json"), str(out), packing],
        check=True, capture_output=True, timeout=500,
    )  # fmt: skip
    theirs = json.loads((out / "losses.json").read_text("utf-8"))
    assert len(ours) == len(theirs) == 5
    assert ours == pytest.approx(theirs, abs=5e-5)
    assert finished.summary["train"]["loss_first"] == ours[0]


# The same for preferences: TRL tokenises, copies the reference model and computes the loss by itself.
PREFERENCES = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

source, rows, out, loss, adapter = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3], sys.argv[4], sys.argv[5]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.chat_template = sys.argv[6]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
trainer = DPOTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if adapter == "lora" else None,
    args=DPOConfig(
        output_dir=out, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, beta=0.1,
        loss_type=[loss], learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=1, max_length=48,
        bf16=False, use_cpu=True, gradient_checkpointing=False, seed=42, logging_steps=1, save_strategy="no",
        max_grad_norm=1.0, weight_decay=0.0, optim="adamw_torch_fused", report_to="none", disable_tqdm=True,
    ),
)
trainer.train()
history = [h for h in trainer.state.log_history if "loss" in h]
json.dump([[h["loss"], h["rewards/margins"], h["grad_norm"]] for h in history], open(out + "/losses.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "method"), [("sigmoid", "lora"), ("ipo", "full")])
def test_same_preference_losses_as_bare_trl(loss: str, method: str, tmp_path: Path) -> None:
    """Some rows are longer than `max_length`: what is cut is the same, too."""
    _, run = preferences.train(
        tmp_path, "objective=dpo", f"objective.loss={loss}", f"method={method}", "train.max_steps=5",
        "train.learning_rate=2e-3", "train.warmup_ratio=0.2", "train.attention=sdpa", "train.max_length=48",
        "data.eval_fraction=0",
    )  # fmt: skip
    ours = [[line["loss"], line["reward_margin"], line["grad_norm"]] for line in run.metrics()]
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in preferences.pairs()
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), "utf-8")
    out = tmp_path / "bare"
    out.mkdir()
    template = template_source(FALLBACK)
    arguments = [str(tmp_path / "tiny"), str(tmp_path / "rows.json"), str(out), loss, method, template]
    subprocess.run([sys.executable, "-c", PREFERENCES, *arguments], check=True, capture_output=True, timeout=300)
    theirs = json.loads((out / "losses.json").read_text("utf-8"))
    assert len(ours) == len(theirs) == 5
    assert ours == [pytest.approx(step, abs=1e-5) for step in theirs]
    assert ours[-1][0] < ours[0][0]
