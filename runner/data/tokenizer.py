"""A byte-level BPE tokenizer trained on shards, as a bundle that `AutoTokenizer` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.data.sharder import lines_of
from runner.data.workspace import manifest_of
from runner.errors import Problem, RequestError
from runner.folders import whole

END, PAD, OPEN, CLOSE = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END, PAD, OPEN, CLOSE]
"""The end of a document, padding, and the two marks of a turn in ChatML, for whoever fine-tunes the model later."""
MOST_BYTES = 1_000_000_000
"""Of text that is read: merges are decided by frequent pairs, which a sample shows (an assumption; GPT-2's tokenizer
saw 40 GB, and reading as much takes hours)."""


def train(shards: Path, target: Path, vocab_size: int) -> dict[str, Any]:
    """Write `target`, whole or not at all; the facts of it. RequestError where `tokenizers` is not installed."""
    tokenizers = _library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(shards), trainer)
    facts = {"vocab_size": tokenizer.get_vocab_size(), "wanted": vocab_size, "trained_on": str(shards)}
    facts["settings"] = manifest_of(shards).get("settings", {})
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as folder:
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": [OPEN, CLOSE],
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / "bundle.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return facts


def facts_of(folder: Path) -> dict[str, Any]:
    """What `train` has noted about a tokenizer; empty for any other."""
    try:
        content = json.loads((folder / "bundle.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def size_of(folder: Path) -> int:
    """Tokens of a tokenizer, the added ones included; RequestError where it is none."""
    file = folder if folder.is_file() else folder / "tokenizer.json"
    try:
        return int(_library().Tokenizer.from_file(str(file)).get_vocab_size())
    except RequestError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
        remedy = "name a folder with a tokenizer.json"
        raise RequestError(Problem(f"{file} is no tokenizer: {error}", "objective.tokenizer", remedy)) from None


def _library() -> Any:
    try:
        return import_module("tokenizers")
    except ImportError:
        raise RequestError(Problem("training a tokenizer needs tokenizers", None, "pip install tokenizers")) from None


def _text(shards: Path) -> Iterator[str]:
    read = 0
    for line in lines_of(shards):
        yield line
        read += len(line)
        if read > MOST_BYTES:
            return
