"""A model of the catalogue's sizes with random weights, a tokenizer of numbered words, and rows to train on.

Nothing is downloaded: what a step costs depends on shapes and lengths, not on what the weights know.
`python -m benchmarks.random_model MODEL FOLDER [--tiny]` writes the model.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.simulate import transformers_config
from runner.config.command_line import Request
from runner.resolve.steps import resolved

WORDS = 1000
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": WORDS + 2,
}  # fmt: skip
"""Sizes of `--tiny`: the same code on a CPU, within seconds."""
MEDIAN_TOKENS = 180
"""Of a row. Rows of Alpaca with their template: about that; the longest are many times as long (a log-normal)."""


def write_model(name: str, folder: Path, *, tiny: bool) -> None:
    """A folder that `model.id` can name: config.json, bf16 weights, tokenizer. Made on the GPU where one is."""
    model = resolved(Request(overrides=(f"model={name}", "hw=h200")))[0].model
    config = transformers_config(model)
    if tiny:
        sizes = {key: value for key, value in TINY.items() if hasattr(config, key)}
        config = type(config)(**{**config.to_dict(), **sizes})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, 1
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    words = {"</s>": 0, "<pad>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def write_rows(file: Path, tokens: int, longest: int) -> int:
    """Rows of random words, at least one and `tokens`, of log-normal lengths below `longest`; the mean length."""
    dice = random.Random(0)
    lengths: list[int] = []
    with file.open("w", encoding="utf-8") as out:
        while not lengths or sum(lengths) < tokens:
            length = min(longest - 1, max(8, round(dice.lognormvariate(0, 0.8) * min(MEDIAN_TOKENS, longest / 3))))
            lengths.append(length + 1)  # and the end of the text
            out.write(json.dumps({"text": " ".join(f"w{dice.randrange(WORDS)}" for _ in range(length))}) + "\n")
    return round(sum(lengths) / len(lengths))


if __name__ == "__main__":
    write_model(sys.argv[1], Path(sys.argv[2]), tiny="--tiny" in sys.argv)
