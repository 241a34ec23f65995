"""Tokens, labels, packing and their cache."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer

from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example
from runner.data.loss_mask import IGNORED
from runner.errors import RequestError
from runner.train import model_loading
from runner.train.tokens import token_dataset
from tests.conftest import spec_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of tokens; the unpacked model stays where it is."""
    source()
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))


@cache
def source() -> str:
    return model_loading.source_of(spec_of().model)


def encoded(example: Example, words: Any, loss_on: str) -> tuple[list[int], list[int]]:
    found = ChatTokenizer.of(words).encode(example, loss_on)
    return found.ids, found.labels


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(source())


def chat(question: str, answer: str) -> Example:
    return Example(
        prompt=[{"role": "user", "content": question}], completion=[{"role": "assistant", "content": answer}]
    )


EXAMPLES = [chat(f"What is {n} plus {n}?" + " Think." * (n % 3), f"It is {2 * n}.") for n in range(30)]


@pytest.mark.slow
def test_loss_is_taken_on_the_answer_and_its_end_only() -> None:
    words = tokenizer()
    ids, labels = encoded(EXAMPLES[3], words, "auto")
    learned = words.decode([t for t, label in zip(ids, labels, strict=True) if label != IGNORED])
    assert learned == "It is 6.<|im_end|>\n"
    ids, labels = encoded(EXAMPLES[3], words, "all")
    assert labels == ids


@pytest.mark.slow
def test_plain_text_ends_with_the_end_token_and_is_learned_whole() -> None:
    words = tokenizer()
    ids, labels = encoded(Example(text="Once upon a time"), words, "auto")
    assert ids[-1] == words.eos_token_id and labels == ids


@pytest.mark.slow
def test_packing_is_lossless_and_tight() -> None:
    packed = token_dataset.tokenise(EXAMPLES, tokenizer(), spec_of("train.max_length=256"))
    loose = token_dataset.tokenise(EXAMPLES, tokenizer(), spec_of("train.max_length=256", "train.packing=false"))
    assert packed.packing_efficiency is not None
    fewest = -(-packed.num_tokens // 256)
    assert fewest <= len(packed.rows) <= fewest + 1
    assert sum(map(len, packed.rows["input_ids"])) == sum(map(len, loose.rows["input_ids"])) == packed.num_tokens
    assert len(loose.rows) == 30
    assert all(sum(r["seq_lengths"]) == len(r["input_ids"]) <= 256 for r in packed.rows)


def best_fit_decreasing(lengths: list[int], limit: int) -> list[list[int]]:
    """By the book: each row, the longest first, into the fullest sequence that has room for it."""
    found: list[list[int]] = []
    for row in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        room = [limit - sum(lengths[i] for i in one) for one in found]
        fitting = [(left, number) for number, left in enumerate(room) if left >= lengths[row]]
        if fitting:
            found[min(fitting)[1]].append(row)
        else:
            found.append([row])
    return found


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_packed_by_best_fit_decreasing(seed: int) -> None:
    rng = Random(seed)
    limit = rng.choice((1, 2, 7, 64, 100))
    lengths = [rng.randrange(limit + 1) for _ in range(rng.randrange(60))]
    found = token_dataset.pack_best_fit(lengths, limit)
    assert sorted(row for one in found for row in one) == [i for i, n in enumerate(lengths) if n]  # each once
    assert all(0 < sum(lengths[row] for row in one) <= limit for one in found)
    by_the_book = best_fit_decreasing(lengths, limit)
    spaces = [sorted(sum(lengths[row] for row in one) for one in packed) for packed in (found, by_the_book)]
    assert spaces[0] == spaces[1]
    assert [lengths[one[0]] for one in found] == sorted((lengths[one[0]] for one in found), reverse=True)


def test_packed_rows_lie_one_after_the_other_with_their_lengths(tmp_path: Path) -> None:
    lengths = array("i", [3, 1, 0, 2])
    for name, first in (("ids", 0), ("labels", 100)):
        np.arange(first, first + 6, dtype=np.int32).tofile(tmp_path / name)
    token_dataset._write_rows(tmp_path / "packed", tmp_path / "ids", tmp_path / "labels", lengths, [[3, 1], [0]])
    token_dataset._write_rows(tmp_path / "loose", tmp_path / "ids", tmp_path / "labels", lengths, None)
    packed, loose = (
        pa.ipc.open_stream((tmp_path / name).read_bytes()).read_all().to_pylist() for name in ("packed", "loose")
    )
    assert packed == [
        {"input_ids": [4, 5, 3], "labels": [104, 105, 103], "seq_lengths": [2, 1]},
        {"input_ids": [0, 1, 2], "labels": [100, 101, 102], "seq_lengths": [3]},
    ]
    assert [one["input_ids"] for one in loose] == [[0, 1, 2], [3], [], [4, 5]]
    assert [one["labels"] for one in loose] == [[100, 101, 102], [103], [], [104, 105]]


def test_more_rows_than_are_written_at_once_keep_their_order(tmp_path: Path) -> None:
    count = 2 * token_dataset.SEQUENCES_AT_ONCE + 3
    for name in ("ids", "labels"):
        np.arange(count, dtype=np.int32).tofile(tmp_path / name)
    files = tmp_path / "rows", tmp_path / "ids", tmp_path / "labels"
    token_dataset._write_rows(*files, array("i", [1] * count), None)
    rows = pa.ipc.open_stream(files[0].read_bytes()).read_all()["input_ids"].to_pylist()
    assert rows == [[number] for number in range(count)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other(attention: str) -> None:
    """The logits of a packed row are those of its documents alone."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    spec = spec_of("train.max_length=128", "train.precision=fp32", "method=full", f"train.attention={attention}")
    model = model_loading.load_model(spec, source()).eval()
    rows = token_dataset.tokenise(EXAMPLES[:6], tokenizer(), spec).rows
    row = max(rows, key=lambda r: len(r["seq_lengths"]))
    assert len(row["seq_lengths"]) > 1
    batch = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)([row])
    with torch.inference_mode():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        start = 0
        for length in row["seq_lengths"]:
            alone = model(input_ids=torch.tensor([row["input_ids"][start : start + length]])).logits[0]
            torch.testing.assert_close(together[start : start + length], alone, atol=2e-3, rtol=1e-3)
            start += length


def test_second_time_comes_from_the_cache() -> None:
    spec = spec_of("train.max_length=128")
    first = token_dataset.tokenise(EXAMPLES, tokenizer(), spec)
    again = token_dataset.tokenise(EXAMPLES, tokenizer(), spec)
    assert (first.from_cache, again.from_cache) == (False, True)
    assert first.rows[:] == again.rows[:] and first.num_tokens == again.num_tokens


def _changed_template(words: Any) -> Any:
    words.chat_template = words.chat_template.replace("SmolLM, trained", "SmolLM2, trained")
    return words


def _added_token(words: Any) -> Any:
    words.add_tokens(["<command>"])
    return words


@pytest.mark.parametrize(
    "change",
    [
        lambda w: (EXAMPLES[:-1], w, ()),
        lambda w: (EXAMPLES, _changed_template(w), ()),
        lambda w: (EXAMPLES, _added_token(w), ()),
        lambda w: (EXAMPLES, w, ("train.max_length=64",)),
        lambda w: (EXAMPLES, w, ("train.packing=false",)),
        lambda w: (EXAMPLES, w, ("objective.loss_on=all",)),
    ],
    ids=["data", "template", "vocabulary", "length", "packing", "loss"],
)
def test_any_change_misses_the_cache(change: Callable[[Any], Any]) -> None:
    token_dataset.tokenise(EXAMPLES, tokenizer(), spec_of("train.max_length=128"))
    examples, words, overrides = change(tokenizer())
    spec = spec_of("train.max_length=128", *overrides)
    assert not token_dataset.tokenise(examples, words, spec).from_cache


def test_a_half_written_entry_is_built_again(tmp_path: Path) -> None:
    spec = spec_of("train.max_length=128")
    token_dataset.tokenise(EXAMPLES, tokenizer(), spec)
    entry = next((tmp_path / "cache" / "tokenised").iterdir())
    (entry / "facts.json").write_text('{"num_ex', "utf-8")
    assert not token_dataset.tokenise(EXAMPLES, tokenizer(), spec).from_cache
    assert token_dataset.tokenise(EXAMPLES, tokenizer(), spec).from_cache
    assert [p.name for p in (tmp_path / "cache" / "tokenised").iterdir()] == [entry.name]


def test_long_rows_are_cut_and_counted_and_empty_ones_dropped() -> None:
    spec = spec_of("train.max_length=64", "train.packing=false")
    long = chat("word " * 100, "never reached")
    found = token_dataset.tokenise([*EXAMPLES[:3], long], tokenizer(), spec)
    assert (found.num_truncated, found.num_dropped, len(found.rows)) == (1, 1, 3)
    with pytest.raises(RequestError, match=r"no token to learn within 64 tokens, in 1 example$"):
        token_dataset.tokenise([long], tokenizer(), spec)


def test_a_template_that_refuses_a_conversation_says_so() -> None:
    words = tokenizer()
    words.chat_template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(RequestError, match="no system turn, please"):
        encoded(EXAMPLES[0], words, "auto")
