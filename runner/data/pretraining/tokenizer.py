"""Tokenizers for random weights: a byte-level BPE trained on shards, or one that is named, as a bundle that
`AutoTokenizer` reads.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from runner.config import json_text
from runner.data.pretraining.sharder import lines_of
from runner.data.pretraining.workspace import json_object, manifest_of
from runner.errors import Problem, RequestError
from runner.paths import cache_dir
from runner.rundir.atomic_folder import cached, whole

END, PAD, OPEN, CLOSE = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END, PAD, OPEN, CLOSE]
"""The end of a document, padding, and the two marks of a turn in ChatML, for whoever fine-tunes the model later."""
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", CLOSE, "[SEP]")
PADS = (PAD, "<pad>", "[PAD]", "<|padding|>")
"""What tokenizers call the two, in the order of preference: a file of the library `tokenizers` has no such names."""
MOST_BYTES = 1_000_000_000
"""Of text that is read: merges are decided by frequent pairs, which a sample shows (an assumption; GPT-2's tokenizer
saw 40 GB, and reading as much takes hours)."""


def train_tokenizer(shards: Path, target: Path, vocab_size: int) -> dict[str, Any]:
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
    """Return the notes of `train` about a tokenizer; empty for any other."""
    return json_object(folder / "bundle.json")


def is_hub_id(name: str) -> bool:
    """`org/name`, and no file or folder that is here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def end_token(named: Path) -> str | None:
    """The token that ends a text, of a `tokenizer.json` with nothing beside it; None for a folder that says itself.

    RequestError where there is none.
    """
    file = file_of(named)
    if named.is_dir() and (named / "tokenizer_config.json").is_file():
        return None
    end = _special(file, ENDS)
    if end is None:
        what = f"{file} has no token that ends a text: none of {', '.join(ENDS)} is among its special tokens"
        remedy = 'put it in a folder with a tokenizer_config.json, {"eos_token": "…"}, and name the folder'
        raise RequestError(Problem(what, "objective.tokenizer", remedy))
    return end


def bundle_folder(named: Path) -> Path:
    """The folder to open: the one that is named, or one in the cache, made of a `tokenizer.json` with nothing beside
    it; RequestError where it cannot be."""
    end = end_token(named)
    if end is None:
        return named
    content = file_of(named).read_bytes()
    pad = _special(file_of(named), PADS) or end
    target = cache_dir() / "tokenizers" / hashlib.sha256(content).hexdigest()[:32]
    if not target.is_dir():
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": pad}
        with cached(target, target.is_dir) as folder:
            (folder / "tokenizer.json").write_bytes(content)
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return target


def _special(file: Path, names: Sequence[str]) -> str | None:
    """The first of the names that is a special token of the tokenizer."""
    added = json_text.loads(file.read_text("utf-8")).get("added_tokens") or []
    own = {str(token["content"]) for token in added if token.get("special")}
    return next((name for name in names if name in own), None)


def file_of(named: Path) -> Path:
    """The `tokenizer.json` of a folder, or the file itself."""
    return named if named.is_file() else named / "tokenizer.json"


def vocabulary_size(folder: Path) -> int:
    """Tokens of a tokenizer, the added ones included; RequestError where it is none."""
    file = file_of(folder)
    try:
        return int(_library().Tokenizer.from_file(str(file)).get_vocab_size())
    except RequestError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
        remedy = "name a tokenizer.json of the library tokenizers, a folder with one, or a Hub id: org/name"
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
