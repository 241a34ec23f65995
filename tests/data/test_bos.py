"""BOS is there exactly once, whoever writes it: the text, the template or the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Preference, PromptExample, Turn, UnpairedExample
from runner.data.inspect.preview import preview
from runner.data.tokenize_rows import PreferenceSettings, encode_preferences
from runner.train import model_loading
from runner.train.tokens import text_dataset
from tests.conftest import spec_of

BOS, EOS = 256, 257
ASKED: list[Turn] = [{"role": "user", "content": "hi"}]
SAID: list[Turn] = [{"role": "assistant", "content": "yes"}]


def saved(folder: Path, adds: str, template: str | None = None) -> Path:
    """Bytes with <s> and </s>; the tokenizer puts around a text what `adds` says."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]
    )
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    whole.chat_template = template
    whole.save_pretrained(folder)
    return folder


def loaded(folder: Path, *more: str) -> tuple[Any, ChatTokenizer, ChatTokenizer]:
    """transformers' tokenizer as a run loads it, its words, and those that a preview reads from the files."""
    spec = spec_of("model=hub", f"model.id={folder}", *more)
    tokenizer = model_loading.load_tokenizer(spec, str(folder))
    return tokenizer, ChatTokenizer.of(tokenizer), ChatTokenizer.from_file(folder / "tokenizer.json", spec.data)


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("said", ["Hello", "<s>Hello", "<s>Hello</s>", "Hello</s>"])
def test_plain_text_begins_and_ends_once(tmp_path: Path, adds: str, said: str) -> None:
    tokenizer, words, shown = loaded(saved(tmp_path, adds))
    hello = AutoTokenizer.from_pretrained(tmp_path)("Hello", add_special_tokens=False)["input_ids"]
    begins = [BOS] if adds or said.startswith("<s>") else []
    right = [*begins, *hello, EOS]
    for one in (words, shown):
        encoded = one.encode(Example(text=said), "auto")
        assert (encoded.ids, encoded.labels) == (right, right)
        assert len(encoded.offsets) == len(right)
    rows = list(text_dataset.cut_into_sequences([said], tokenizer, 64, packing=False))
    assert rows == [{"input_ids": right, "labels": right}]
    pair = Preference(said.removesuffix("</s>"), " a", " b")
    (columns,) = encode_preferences(words, [pair], PreferenceSettings(64)).rows
    assert columns["prompt_ids"] == right[:-1] and columns["chosen_ids"][-1] == EOS


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
def test_a_preview_shows_the_tokens_that_are_put_around_plain_text(tmp_path: Path, adds: str) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text('{"text": " Hi"}\n', "utf-8")
    spec = spec_of("model=hub", f"model.id={saved(tmp_path, adds)}", "data=file", f"data.path={file}")
    (row,) = preview(spec)["rows"]
    begins = "<s>" if adds else ""
    assert row["segments"] == [{"text": f"{begins} Hi</s>", "trained": True, "tokens": 4 + bool(adds)}]


@pytest.mark.parametrize("adds", ["", "<s> $A"])
@pytest.mark.parametrize("name", [None, "chatml", "phi3", "zephyr", "qwen", "llama2", "llama3", "gemma", "mistral"])
def test_a_conversation_begins_once_in_every_template_and_in_chatml_as_fallback(
    tmp_path: Path, adds: str, name: str | None
) -> None:
    """Training, a preview, preferences, GRPO's prompts, held-out prompts; and what others render with what is saved."""
    more = [f"data.chat_template={name}"] if name else []
    tokenizer, words, shown = loaded(saved(tmp_path, adds), *more)
    count = int(bool(adds) or name in ("llama2", "llama3", "gemma", "mistral"))
    for one in (words, shown):
        for row in (Example(ASKED, SAID), Example(ASKED, SAID, dialogue=True)):
            ids = one.encode(row, "auto").ids
            assert (ids.count(BOS), ids[0] == BOS) == (count, bool(count))
    assert ids == tokenizer.apply_chat_template([*ASKED, *SAID])["input_ids"]
    (asked,) = words.token_ids([words.prompt_text(ASKED)])
    assert asked == tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    assert asked.count(BOS) == count
    for kind in (Preference(ASKED, SAID, [{"role": "assistant", "content": "no"}]), UnpairedExample(ASKED, SAID, True)):
        (columns,) = encode_preferences(words, [kind], PreferenceSettings(500)).rows
        assert columns["prompt_ids"].count(BOS) == count
    assert encode_preferences(words, [PromptExample(ASKED)], PreferenceSettings(500)).rows[0]["prompt"] == ASKED


def test_the_models_own_template_and_a_file_of_yours_are_taken_as_they_are(tmp_path: Path) -> None:
    own = template_source("chatml")
    _, words, shown = loaded(saved(tmp_path / "own", "<s> $A", own))
    file = tmp_path / "mine.jinja"
    file.write_text(own, "utf-8")
    _, mine, seen = loaded(saved(tmp_path / "none", "<s> $A"), f"data.chat_template={file}")
    assert all(BOS not in one.encode(Example(ASKED, SAID), "auto").ids for one in (words, shown, mine, seen))
    twice = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    _, words, _ = loaded(saved(tmp_path / "twice", "<s> $A", twice))
    question: Turn = {"role": "user", "content": "<s>hi"}
    assert words.encode(Example([question], SAID), "auto").ids.count(BOS) == 1
