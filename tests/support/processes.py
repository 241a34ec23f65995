"""A model of the real architecture that trains in a second, and runs of it as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.data.load import load_examples
from runner.rundir.directory import RunDir
from runner.spec import DataSpec
from tests.conftest import ROOT


def tiny_model(folder: Path) -> Path:
    """A Llama with grouped-query attention, 3 layers, width 64, and a tokenizer trained on the demo's sentences."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    examples, _ = load_examples(DataSpec(name="commands", source="commands"), 0)
    tokenizer.train_from_iterator([turn["content"] for e in examples for turn in (*e.prompt, *e.completion)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=1, eos_token_id=3, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def words(model: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run of the tiny model: 12 steps of 8 × 96 tokens, nothing answered."""
    return [
        "model=hub", f"model.id={model}", f"run.output_dir={out}", "hw=cpu", "train.precision=fp32",
        "train.max_steps=12", "train.batch_size=8", "train.micro_batch_size=2", "train.max_length=96",
        "train.learning_rate=1e-3", "data.max_examples=120", "data.max_eval_examples=4", "eval.num_prompts=0", *more,
    ]  # fmt: skip


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    """`python -m runner …`, not waited for; one thread per process."""
    return subprocess.Popen(
        [sys.executable, "-m", "runner", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What the condition returns as soon as it is true; AssertionError if it takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def only_run(out: Path) -> Path | None:
    """The one run directory below `out`, as soon as it has its spec."""
    found = [file.parent for file in out.glob("*/spec.json")]
    return found[0] if found else None


def losses(run: Path) -> list[float]:
    """Of every step, in order; a step that is there twice or missing fails."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def sign(run: Path, rank: int) -> dict[str, Any]:
    """The last sign of life of a process; empty before the first."""
    return RunDir(run).read(f"logs/rank{rank}.json")
