"""A model of the real architecture, a tokenizer of 64 words and rows to learn: a run in this process takes a second."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

WORDS = 64
TEMPLATE = (
    "{% for turn in messages %}{{ 'w2 ' if turn['role'] == 'assistant' }}"
    "{{ turn['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


def base(folder: Path, *, tied: bool = True, architecture: str = "llama", **more: Any) -> Path:
    """A Llama, or another model, of three layers with grouped-query attention, as a Hugging Face folder in bf16."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **{**sizes, **more})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # logits of a trained model's size: at the usual 0.02 they are near 0
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(eos_token_id=[1, 2], bos_token_id=1, pad_token_id=0, max_new_tokens=7).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w1")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def rows(file: Path, count: int = 24) -> Path:
    """Questions whose answers can be learned: three words, and the three that follow each of them."""
    lines = []
    for first in range(count):
        asked = [4 + (first * 7 + k * 11) % (WORDS - 5) for k in range(3)]
        lines.append({"prompt": _said(asked), "completion": _said(word + 1 for word in asked)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def _said(numbers: Iterable[int]) -> str:
    return " ".join(f"w{number}" for number in numbers)


def words(folder: Path, *, tied: bool = True, **more: Any) -> list[str]:
    """What a run on all this is called with; the files are written below `folder`."""
    return [
        "model=hub", f"model.id={base(folder / 'base', tied=tied, **more)}", "hw=cpu", "hw.num_cpus=1",
        "train.precision=bf16", "data=file", f"data.path={rows(folder / 'rows.jsonl')}", "data.eval_fraction=0.2",
        "train.packing=false",
        "train.learning_rate=2e-2", "train.warmup_ratio=0", "train.max_length=32", "train.batch_size=4",
    ]  # fmt: skip
