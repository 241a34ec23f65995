"""Plain text becomes sequences: nothing lost, nothing learned twice, no document attends to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.data.examples import Example
from runner.train.tokens import text_dataset
from tests.conftest import spec_of
from tests.support.preferences import words


class Letters:
    """A tokenizer of one token a character; 0 ends a document."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, texts: list[str]) -> dict[str, Any]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@settings(deadline=None)
@given(st.lists(st.text("abc", max_size=20), min_size=1, max_size=12), st.integers(2, 9), st.booleans())
def test_every_token_is_there_once_and_in_order(documents: list[str], limit: int, packing: bool) -> None:
    rows = list(text_dataset.cut_into_sequences(documents, Letters(), limit, packing))
    expected = [token for document in documents for token in [*map(ord, document), 0]]
    found = [token for row in rows for token in row["input_ids"]]
    assert found == expected[: len(found)]
    assert len(expected) - len(found) <= 1  # a last token that stands alone has nothing to be learned from
    assert all(row["labels"] == row["input_ids"] for row in rows)
    if packing:
        assert all(len(row["input_ids"]) == limit for row in rows[:-1])
        assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in rows)
        for row in rows:  # a part ends where a document does, or where the sequence does
            ends = [sum(row["seq_lengths"][: i + 1]) for i in range(len(row["seq_lengths"]))]
            assert all(row["input_ids"][end - 1] == 0 for end in ends[:-1])
            assert row["input_ids"][: ends[-1] - 1].count(0) == len(ends) - 1


@settings(deadline=None)
@given(st.lists(st.text("abc", max_size=20), min_size=1, max_size=12), st.integers(2, 9))
def test_what_is_measured_of_a_document_does_not_depend_on_packing(documents: list[str], limit: int) -> None:
    def parts(packing: bool) -> list[list[int]]:
        """Those with something to be learned from."""
        found = []
        for row in text_dataset.cut_into_sequences(documents, Letters(), limit, packing, whole=True):
            ids, begin = row["input_ids"], 0
            assert len(ids) <= limit
            for length in row.get("seq_lengths", [len(ids)]):
                found.append(ids[begin : begin + length])
                begin += length
        return [part for part in found if len(part) > 1]

    assert parts(packing=True) == parts(packing=False)


def test_conversations_are_refused(tmp_path: Path) -> None:
    from runner.errors import RequestError
    from runner.train import model_loading

    spec = spec_of(*words(tmp_path, "objective=pretrain"))
    tokenizer = model_loading.load_tokenizer(spec, spec.model.id)
    chat = Example(prompt=[{"role": "user", "content": "a"}], completion=[{"role": "assistant", "content": "b"}])
    with pytest.raises(RequestError, match="learns plain text"):
        text_dataset.tokenise([chat], tokenizer, spec)
