"""Chunks of tokens, packed: nothing lost, nothing twice, the same whatever the number of processes."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import pack_dataset

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example
from runner.data.inspect.lengths import packed_sequences
from runner.data.loss_mask import IGNORED
from runner.data.tokenize_rows import TokenChunk, TokenizeSettings, encode_chunk, in_chunks
from runner.errors import RequestError
from runner.train.tokens import token_dataset
from runner.train.tokens.token_cache import describe_rows
from runner.train.tokens.token_dataset import pack_best_fit
from tests.conftest import spec_of
from tests.data.test_loss_mask import SPECIAL, body
from tests.support.rows import said, user

__all__ = ["body"]  # a fixture


@settings(deadline=None)
@given(st.lists(st.integers(0, 64), max_size=200), st.integers(64, 100))
def test_packing_loses_no_row_and_overfills_no_sequence(lengths: list[int], limit: int) -> None:
    found = pack_best_fit(lengths, limit)
    assert sorted(row for group in found for row in group) == [row for row, length in enumerate(lengths) if length]
    assert all(sum(lengths[row] for row in group) <= limit for group in found)
    assert len(found) == packed_sequences(lengths, limit)  # what the plan counts on


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=300))
def test_packing_is_trls_bin_by_bin(lengths: list[int]) -> None:
    rows = Dataset.from_dict({"input_ids": [[row] * length for row, length in enumerate(lengths)]})
    by_trl = pack_dataset(rows, 40, "bfd")
    assert [[lengths[row] for row in group] for group in pack_best_fit(lengths, 40)] == by_trl["seq_lengths"][:]
    assert [[row for row in group for _ in range(lengths[row])] for group in pack_best_fit(lengths, 40)] == by_trl[
        "input_ids"
    ][:]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(2, 10),
    st.sampled_from(["truncate", "drop", "split"]),
)
def test_long_rows_are_cut_dropped_or_split_and_counted(tokens: list[int], limit: int, on_long: str) -> None:
    labels = [token if token else IGNORED for token in tokens]
    chunk = TokenChunk()
    chunk.add(tokens, labels, TokenizeSettings("auto", limit, on_long))
    assert chunk.examples == 1 and len(chunk.ids) == len(chunk.labels) == sum(chunk.lengths)
    assert all(1 < length <= limit for length in chunk.lengths)
    long = len(tokens) > limit
    assert (chunk.truncated, chunk.split) == (long and on_long == "truncate", long and on_long == "split")
    if long and on_long == "drop":
        assert (chunk.dropped, chunk.lengths) == (1, [])
    elif on_long == "split":
        learned = Counter(chunk.labels)
        del learned[IGNORED]
        begins = set(range(0, len(tokens), limit))  # of a piece, nothing predicts its first token
        lost = Counter(label for at, label in enumerate(labels) if label != IGNORED and at not in begins)
        assert lost - learned == Counter()  # every token that can be predicted is learned
        assert learned - Counter(label for label in labels if label != IGNORED) == Counter()  # none of them twice


def examples(count: int) -> list[Example]:
    pairs = [(user(f"{n}? " * (n % 5 + 1)), said("yes " * (n % 9) + str(n))) for n in range(count)]
    return [Example([question], [answer], where=f"row {n}") for n, (question, answer) in enumerate(pairs, 1)]


def test_several_processes_give_what_one_does(body: str) -> None:
    words, rows = ChatTokenizer(body, template_source("chatml"), SPECIAL), examples(2500)
    encode = partial(encode_chunk, settings=TokenizeSettings("auto", 64))
    one, two = (list(in_chunks(encode, words, rows, processes)) for processes in (1, 2))
    assert [chunk.ids for chunk in one] == [chunk.ids for chunk in two]
    assert [chunk.labels for chunk in one] == [chunk.labels for chunk in two]
    assert sum(chunk.examples for chunk in two) == 2500


@pytest.fixture
def tokenizer(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tokenizer.json").write_text(body)
    found = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **SPECIAL)
    found.chat_template = template_source("mistral")  # refuses two questions in a row
    return found


def spec(*overrides: str) -> Any:
    return spec_of("train.max_length=64", *overrides)


def test_rows_that_the_template_refuses_are_named_all_or_skipped(tokenizer: Any) -> None:
    wrong = [Example([user("a"), user("b")], [said("c")], where=f"my.jsonl, line {n}") for n in (3, 9)]
    rows = [*examples(4), *wrong]
    with pytest.raises(RequestError, match="user and assistant must take turns") as caught:
        token_dataset.tokenise(rows, tokenizer, spec())
    assert [problem.source for problem in caught.value.problems] == ["my.jsonl, line 3", "my.jsonl, line 9"]
    found = token_dataset.tokenise(rows, tokenizer, spec("data.on_error=skip"))
    assert (found.num_refused, found.num_examples) == (2, 6)
    assert "2 skipped: the chat template refuses them" in describe_rows(found, 0)


@pytest.mark.parametrize(("policy", "facts"), [("truncate", (1, 0, 0)), ("drop", (0, 1, 0)), ("split", (0, 0, 1))])
def test_the_policy_for_long_rows_is_said(tokenizer: Any, policy: str, facts: tuple[int, int, int]) -> None:
    long = Example(text="word " * 200)
    found = token_dataset.tokenise([*examples(3), long], tokenizer, spec(f"data.on_long={policy}"))
    assert (found.num_truncated, found.num_dropped, found.num_split) == facts
    assert found.num_tokens == sum(map(len, found.rows["input_ids"][:]))


def test_rows_that_came_tokenised_are_packed_as_they_are(tokenizer: Any) -> None:
    rows = [Example(ids=[1, 2, 3], labels=[-100, 2, 3]), Example(ids=[4, 5])]
    (row,) = token_dataset.tokenise(rows, tokenizer, spec()).rows
    assert row == {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, 4, 5], "seq_lengths": [3, 2]}
