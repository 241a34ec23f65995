"""Examples → token ids and labels, packed, cached by content.

A cached set is found again only if the examples, the tokenizer, its chat template and every
setting that shapes the tokens are the same; so a changed tokenizer never meets old tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from datasets.utils.logging import disable_progress_bar
from trl import pack_dataset

from runner.data.formats import Example, Turn, fingerprint
from runner.errors import Problem, RequestError
from runner.paths import cache_dir
from runner.spec import RunSpec, Sft

LAYOUT = 1  # raise it when what is stored changes shape: old entries are then left alone
IGNORED = -100  # torch's cross_entropy leaves these labels out


@dataclass(frozen=True)
class Tokenised:
    """Token ids ready for the trainer, and what was found on the way."""

    rows: Dataset
    """`input_ids` [s], `labels` [s], and `seq_lengths` where packed."""
    num_examples: int
    num_truncated: int
    num_dropped: int
    """Examples without a token to learn, after cutting to the longest length."""
    num_tokens: int
    packing_efficiency: float | None
    """Share of the positions in packed sequences that hold tokens; None without packing."""
    from_cache: bool


def tokenise(examples: list[Example], tokenizer: Any, spec: RunSpec) -> Tokenised:
    """Tokenise and pack, or take from the cache; RequestError if nothing is left to learn."""
    disable_progress_bar()
    folder = cache_dir() / "tokenised" / _key(examples, tokenizer, spec)
    stored = _read(folder)
    if stored is None:
        _build(examples, tokenizer, spec, folder)
        stored = _read(folder)
        assert stored is not None
        found, facts, from_cache = *stored, False
    else:
        found, facts, from_cache = *stored, True
    return Tokenised(rows=found, from_cache=from_cache, **facts)


def _key(examples: list[Example], tokenizer: Any, spec: RunSpec) -> str:
    assert isinstance(spec.objective, Sft)
    parts = [
        LAYOUT,
        fingerprint(examples),
        tokenizer_fingerprint(tokenizer),
        spec.train.max_length,
        spec.train.packing,
        spec.objective.loss_on,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over everything that decides a token id: vocabulary, merges, added tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        type(tokenizer).__name__,
        body,
        str(tokenizer.chat_template),
        sorted(tokenizer.special_tokens_map.items()),
    ]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _read(folder: Path) -> tuple[Dataset, dict[str, Any]] | None:
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        rows = load_from_disk(str(folder / "rows"))
    except (OSError, ValueError):
        return None
    assert isinstance(rows, Dataset)
    return rows, facts


def _build(examples: list[Example], tokenizer: Any, spec: RunSpec, folder: Path) -> None:
    """Write one cache entry, whole or not at all; two runs may build the same one at once."""
    assert isinstance(spec.objective, Sft)
    limit = spec.train.max_length
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    truncated = 0
    for example in examples:
        ids, labels = encode(example, tokenizer, spec.objective.loss_on)
        truncated += len(ids) > limit
        if any(label != IGNORED for label in labels[1:limit]):  # the first token has nothing before it
            columns["input_ids"].append(ids[:limit])
            columns["labels"].append(labels[:limit])
    if not columns["input_ids"]:
        raise RequestError(
            Problem(
                f"none of the {len(examples)} examples has a token to learn within {limit} tokens",
                None,
                "raise train.max_length, or check the field names of the data",
            )
        )
    rows = Dataset.from_dict(columns)
    num_tokens = sum(map(len, columns["input_ids"]))
    efficiency = None
    if spec.train.packing:
        rows = pack_dataset(rows, limit, "bfd")
        efficiency = num_tokens / (len(rows) * limit)
    facts = {
        "num_examples": len(examples),
        "num_truncated": truncated,
        "num_dropped": len(examples) - len(columns["input_ids"]),
        "num_tokens": num_tokens,
        "packing_efficiency": efficiency,
    }
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        rows.save_to_disk(str(temporary / "rows"))
        (temporary / "facts.json").write_text(json.dumps(facts), "utf-8")
        if _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # an entry that cannot be read
            try:
                temporary.rename(folder)
            except OSError:  # another run was faster
                if _read(folder) is None:
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def encode(example: Example, tokenizer: Any, loss_on: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of one example, both [s]; labels are -100 where no loss is taken."""
    if example.text is not None:
        ids = list(tokenizer(example.text)["input_ids"])
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        return ids, list(ids)
    prompt = chat_ids(tokenizer, example.prompt, ask=True)
    ids = chat_ids(tokenizer, [*example.prompt, *example.completion], ask=False)
    if loss_on == "all":
        return ids, list(ids)
    start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return ids, [IGNORED] * start + ids[start:]


def chat_ids(tokenizer: Any, turns: Sequence[Turn], ask: bool) -> list[int]:
    """Token ids of a rendered conversation; `ask` ends it where the assistant is to speak.

    RequestError for a conversation the model's template refuses (a system turn, say).
    """
    import jinja2

    try:
        encoded = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], add_generation_prompt=ask, return_dict=True
        )
    except jinja2.TemplateError as error:
        raise RequestError(
            Problem(
                f"the model's chat template refuses a conversation: {error}",
                None,
                "set data.chat_template to a Jinja file, or data.system_prompt=null",
            )
        ) from None
    return list(encoded["input_ids"])
