"""Row ids of a micro batch, and the rows' text.

The training set gets a column `__row__`. The collator takes it off again and puts `row_ids` [b] beside what it makes of
the rows; the trainer takes that out before the model sees the batch. So it is true of any sampler, any number of
processes and packed rows: the data itself says where it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

COLUMN = "__row__"  # not `row`: a data set may have a column of that name for its reward function
KEY = "row_ids"
LONGEST_TEXT = 300
"""Characters shown of one document."""


def numbered(rows: Dataset) -> Dataset:
    """The same rows with their index as a column: 8 bytes a row, the rest is not copied."""
    return rows.add_column(COLUMN, list(range(len(rows))))


class RowIds:
    """A collator around another one, which does not see the column; rows without it (held-out ones) pass unchanged."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """What the collator makes of b rows, with `row_ids` [b]: one per row also where it joins all into one."""
        ids = [example[COLUMN] for example in examples if COLUMN in example]
        batch = self.collator([{k: v for k, v in example.items() if k != COLUMN} for example in examples])
        if ids:
            batch[KEY] = torch.tensor(ids)
        return batch


def texts(rows: Dataset, ids: Sequence[int], tokenizer: Any) -> list[dict[str, Any]]:
    """For people: `row`, `num_tokens` and `texts` of each, the beginnings of its documents (one if not packed)."""
    found = []
    for index in ids:
        row = rows[index]
        if "input_ids" not in row:  # a preference: its prompt and answers; a prompt to be answered: itself
            parts = {name: value for name, value in row.items() if name.endswith("_ids")}
            shown = [f"{name}: {tokenizer.decode(ids[:LONGEST_TEXT])[:LONGEST_TEXT]}" for name, ids in parts.items()]
            shown = shown or [str(row.get("prompt"))[:LONGEST_TEXT]]
            found.append({"row": index, "num_tokens": sum(map(len, parts.values())), "texts": shown})
            continue
        tokens, begin, shown = row["input_ids"], 0, []
        for length in row.get("seq_lengths") or [len(tokens)]:
            # A token is a character or more, but for the rare ones of several bytes.
            shown.append(tokenizer.decode(tokens[begin : begin + min(length, LONGEST_TEXT)])[:LONGEST_TEXT])
            begin += length
        found.append({"row": index, "num_tokens": len(tokens), "texts": shown})
    return found
