"""Cache of token ids: keyed by the content of everything that shapes them, complete or absent.

It is mapped into memory: a million rows take no more of it than a thousand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from runner.paths import cache_dir
from runner.report.text import counted
from runner.rundir.atomic_folder import cached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FOLDER = "tokenised"
ROWS = "rows.arrow"
LAYOUT = 6  # raise it when what is stored changes shape: old entries are then left alone
OnProgress = Callable[[int, int], None]
"""Told after every chunk: rows done, rows in all."""


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Token ids for the trainer, with counts of what was cut, dropped or skipped."""

    rows: Dataset
    """`input_ids` [s], `labels` [s], and `seq_lengths` where packed; preferences: preference_dataset.py."""
    num_examples: int
    num_truncated: int = 0
    num_dropped: int = 0
    """Examples without a token to learn, after cutting to the longest length."""
    num_split: int = 0
    """Examples that were longer and go on in another row."""
    num_refused: int = 0
    """Examples that the template refuses, skipped under `data.on_error=skip`."""
    num_unlearned: int = 0
    """Answers that are not learned, because the template drops a part of what they say as the conversation goes on."""
    num_prompt_differs: int = 0
    """Examples whose answer does not begin where the template asks for one, as generation will."""
    num_conversations: int = 0
    """Examples that the chat template rendered."""
    num_tokens: int
    packing_efficiency: float | None = None
    """Share of the positions in packed sequences that hold tokens; None without packing."""
    from_cache: bool

    @property
    def folder(self) -> Path:
        """Folder of the entry in the cache."""
        return Path(self.rows.cache_files[0]["filename"]).parent


def cached_rows(parts: list[Any], write: Callable[[Path], dict[str, Any]]) -> Tokenised:
    """The entry that `parts` stand for: found, or made by `write`, which puts `rows.arrow` into a folder and gives the
    facts. Two runs may make the same one at once."""
    disable_progress_bar()
    folder = cache_dir() / CACHE_FOLDER / hashlib.sha256(json.dumps([LAYOUT, *parts]).encode()).hexdigest()[:32]
    found = _read(folder)
    from_cache = found is not None
    if found is None:
        with cached(folder, lambda: _read(folder) is not None) as temporary:
            facts = write(temporary)
            (temporary / "facts.json").write_text(json.dumps(facts), "utf-8")
        found = _read(folder)
        assert found is not None
    rows, facts = found
    return Tokenised(rows=rows, from_cache=from_cache, **facts)


def _read(folder: Path) -> tuple[Dataset, dict[str, Any]] | None:
    try:
        facts = json.loads((folder / "facts.json").read_text("utf-8"))
        return Dataset.from_file(str(folder / ROWS)), facts
    except (OSError, ValueError):
        return None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides a token id: vocabulary, merges, added tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = sorted(tokenizer.special_tokens_map.items())
    parts = [type(tokenizer).__name__, body, str(tokenizer.chat_template), special]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


_WHAT_BECAME = {
    "num_truncated": "cut to the longest length",
    "num_dropped": "dropped: nothing left to learn after the cut",
    "num_split": "longer ones go on in another row",
    "num_refused": "skipped: the chat template refuses them",
    "num_unlearned": "earlier answers not learned: the chat template drops their thoughts",
    "num_prompt_differs": "answers do not begin where the chat template asks for one: generation gets another prompt "
    "than training (docs/data.md)",
}


def row_statistics(rows: Tokenised, num_eval: int) -> dict[str, int | float]:
    """The counts of the tokenised rows, for `environment.json`; those that are zero are left out."""
    found = {
        "examples": rows.num_examples,
        "tokens": rows.num_tokens,
        "sequences": len(rows.rows),
        "packing_efficiency": rows.packing_efficiency,
        "held_out_examples": num_eval,
        **{name.removeprefix("num_"): getattr(rows, name) for name in _WHAT_BECAME},
    }
    return {name: value for name, value in found.items() if value}


def describe_rows(rows: Tokenised, num_eval: int) -> str:
    """The tokenised rows as a line of text."""
    parts = [f"{counted(rows.num_examples, 'example')}, {rows.num_tokens:,} tokens"]
    if rows.packing_efficiency is not None:
        parts.append(f"packed into {counted(len(rows.rows), 'sequence')}, {rows.packing_efficiency:.0%} full")
    parts += [f"{count:,} {what}" for name, what in _WHAT_BECAME.items() if (count := getattr(rows, name))]
    if num_eval:
        parts.append(f"{num_eval:,} held out")
    return "Data    " + "; ".join(parts) + (" (tokens from the cache)" if rows.from_cache else "")
