"""Tokens that the model has no row for, and a tokenizer that cannot end anything: one line each, before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example
from runner.data.tokenize_rows import TokenizeSettings, encode_chunk
from runner.errors import RequestError
from runner.train import model_loading
from tests.conftest import spec_of
from tests.data.test_loss_mask import SPECIAL, body
from tests.data.test_tokenize_rows import tokenizer

__all__ = ["body", "tokenizer"]  # fixtures


@pytest.mark.parametrize("change", [lambda n: ([n], None), lambda n: ([-1], None), lambda n: ([1, 2], [-100, n]),
                                    lambda n: ([1, 2], [-1, 2])])  # fmt: skip
def test_token_ids_outside_the_vocabulary_are_named_with_their_row(change: Any, body: str) -> None:
    words = ChatTokenizer(body, template_source("chatml"), SPECIAL)
    size = words.backend.get_vocab_size()
    ids, labels = change(size)
    right = Example(ids=[1, size - 1], labels=[-100, size - 1], where="row 1")
    chunk = encode_chunk(words, [right, Example(ids=ids, labels=labels, where="row 2")], TokenizeSettings("auto", 64))
    (problem,) = chunk.problems
    assert problem.source == "row 2" and list(chunk.ids) == [1, size - 1]
    assert problem.what.endswith(f"is outside the model's vocabulary of {size:,} tokens")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    size = len(tokenizer)
    spec = spec_of("model=hub", f"model.id={tmp_path}")
    LlamaConfig(vocab_size=size).save_pretrained(tmp_path)
    model_loading.check_vocabulary(spec, str(tmp_path), tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    with pytest.raises(
        RequestError, match=f"{size + 1:,} tokens, and the model's embedding has {size:,} rows"
    ) as caught:
        model_loading.check_vocabulary(spec, str(tmp_path), tokenizer)
    assert "data.add_tokens=['<call>']" in str(caught.value.problems[0].remedy)
    larger = spec_of("model=hub", f"model.id={tmp_path}", "data.add_tokens=['<call>']")
    model_loading.check_vocabulary(larger, str(tmp_path), tokenizer)


def test_a_tokenizer_without_any_end_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    spec = spec_of("model=hub", f"model.id={tmp_path}")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert model_loading.load_tokenizer(spec, str(tmp_path)).pad_token == tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="names neither an eos_token nor a pad_token"):
        model_loading.load_tokenizer(spec, str(tmp_path))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)  # of which transformers makes a tokenizer of no words
    with pytest.raises(RequestError, match="has no tokenizer"):
        model_loading.load_tokenizer(spec_of("model=hub", f"model.id={tmp_path}"), str(tmp_path))
