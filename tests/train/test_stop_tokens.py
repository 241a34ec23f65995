"""Turns end with a token that stops generation, in training, in what is measured and in what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Preference
from runner.data.tokenize_rows import PreferenceSettings, encode_preferences
from runner.errors import RequestError
from runner.train import export, open_model, stop_tokens
from runner.train.evaluation.generation import Answer, compare_answers, generate, learned_answer
from runner.train.merge import adapter
from tests.conftest import spec_of, train_here
from tests.data.test_loss_mask import ENDS, SPECIAL, body, learned_pieces, whole
from tests.data.test_rendered_text_checks import CASES, OSLO, asks, says, words_of
from tests.support import tiny_llama

__all__ = ["body"]  # a fixture

ENDED = "{% for turn in messages %}{{ turn['content'] }} <|im_end|> {% endfor %}"
ENDED += "{% if add_generation_prompt %}w2 {% endif %}"


@pytest.mark.parametrize("name", sorted(ENDS))
def test_a_template_tells_what_ends_its_turns(name: str, body: str) -> None:
    """The model's own eos or not: ChatML on a Llama-like base, <end_of_turn>, <|eot_id|>, <|end|>."""
    words = ChatTokenizer(body, template_source(name), SPECIAL)
    assert [words.backend.id_to_token(token) for token in words.stops] == [ENDS[name].strip()]
    words.check_end()


def test_a_call_may_end_with_another_token_and_what_goes_on_behind_an_end_is_none(body: str) -> None:
    special = ["<|return|>", "<|call|>", "<turn|>", "<|tool_response>"]
    for name, ends in {
        "gptoss": ["<|return|>", "<|call|>"],  # not <|end|>, which ends the thoughts
        "gemma4_v5": ["<turn|>", "<|tool_response>"],
        "phi3": ["<|end|>"],
        "qwen3": ["<|im_end|>"],
    }.items():
        words = words_of(body, name)
        words.backend.add_special_tokens(special)
        assert [words.backend.id_to_token(token) for token in words.stops] == ends


def test_an_answer_that_the_template_ends_with_nothing_gets_the_end_of_text(body: str) -> None:
    """GLM's, and any that leaves the end to the next turn; also of a pair, and once."""
    nothing = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    nothing += "{% if add_generation_prompt %}assistant: {% endif %}"
    for source in (nothing, words_of(body, "glm4moe").turns.template.source):
        words = ChatTokenizer(body, source, SPECIAL)
        words.check_end()
        assert words.stops == [words.end_id]
        for row in (whole([asks("q"), says("yes")]), Example([asks("q")], [says("yes")])):
            encoded = words.encode(row, "auto")
            assert encoded.labels[-1] == encoded.ids[-1] == words.end_id
            assert "yes" in learned_pieces(words, encoded)[0]
        (columns,) = encode_preferences(
            words, [Preference([asks("q")], [says("yes")], [says("no")])], PreferenceSettings(100)
        ).rows
        assert [columns[f"{name}_ids"][-1] for name in ("chosen", "rejected")] == [words.end_id] * 2
    closed = ChatTokenizer(body, template_source("zephyr"), SPECIAL).encode(whole([asks("q"), says("yes")]), "auto")
    assert closed.text.count("</s>") == 2  # of question and answer, and no more


def test_an_end_that_is_no_special_token_is_refused_and_the_remedy_works(body: str) -> None:
    source = template_source("phi3").replace("<|end|>", "<|fin|>")
    words = ChatTokenizer(body, source, SPECIAL)
    with pytest.raises(RequestError, match=r"ends an answer with '<\|fin\|>', which is no special token") as caught:
        encode_preferences(words, [Preference([asks("q")], [says("yes")], [says("no")])], PreferenceSettings(100))
    assert "data.add_tokens=['<|fin|>']" in str(caught.value.problems[0].remedy)
    words.backend.add_special_tokens(["<|fin|>"])
    again = ChatTokenizer(words.backend.to_str(), source, SPECIAL)
    again.check_end()
    assert [again.backend.id_to_token(token) for token in again.stops] == ["<|fin|>"]
    with pytest.raises(RequestError, match="with nothing, and the tokenizer has no end of text"):
        ChatTokenizer(body, "{% for m in messages %}{{ m.content }}{% endfor %}", {}).check_end()


@pytest.mark.parametrize("known", [None, 1, [1, 2]])
def test_generation_stops_there_too_and_what_stopped_before_still_does(known: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.base(tmp_path / "base"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = ENDED
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=known))
    assert stop_tokens.align(model, tokenizer) == ["<|im_end|>"] and tokenizer.eos_token == "w1"
    assert model.generation_config.eos_token_id == [*([1, 2] if known == [1, 2] else [1]), 64]
    assert stop_tokens.align(model, tokenizer, save=True) == [] and tokenizer.eos_token == "<|im_end|>"
    stop_tokens.save(tmp_path, tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [64]
    tokenizer.eos_token, tokenizer.chat_template = "w1", ENDED + "{{ eos_token }}"
    stop_tokens.align(model, tokenizer, save=True)
    assert tokenizer.eos_token == "w1"  # the template would write another token


def test_an_answer_that_does_not_stop_is_wrong(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.base(tmp_path / "base"))

    class Parrot:
        """Says w5 w6, and ends only the first answer."""

        training, device, generation_config = False, "cpu", GenerationConfig(eos_token_id=[9, 1])

        def eval(self) -> None: ...
        def train(self, mode: bool) -> None: ...

        def generate(self, input_ids: Any, **_: Any) -> Any:
            said = torch.tensor([[5, 6, 9, 0], [5, 6, 7, 8]])[: len(input_ids)]
            return torch.cat([input_ids, said], dim=1)

    found = generate(
        Parrot(), tokenizer, [[asks("w4")]] * 2, max_new_tokens=4, batch_size=2, autocast=torch.inference_mode()
    )
    assert found == [Answer("w5 w6", "w5 w6", True), Answer("w5 w6 w7 w8", "w5 w6 w7 w8", False)]
    rows = [Example([asks("w4")], [says("w5 w6")]), Example([asks("w4")], [says("w5 w6 w7 w8")]), Example([asks("w4")])]
    words = ChatTokenizer.of(tokenizer)
    compared = compare_answers(rows, [*found, found[0]], lambda row: learned_answer(words, tokenizer, [1], row))
    assert [(row["exact"], row["stopped"]) for row in compared] == [(True, True), (False, False), (False, True)]
    assert compared[1]["answer"] == compared[1]["expected"] and compared[2]["expected"] is None


def test_a_run_makes_its_chat_tokenizer_once_and_anew_where_the_tokenizer_changed(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.base(tmp_path / "base"))
    tokenizer.chat_template = ENDED
    words = ChatTokenizer.of(tokenizer)
    assert ChatTokenizer.of(tokenizer) is words
    tokenizer.eos_token = "w3"
    other = ChatTokenizer.of(tokenizer)
    assert other is not words and other.end_id == tokenizer.eos_token_id != words.end_id
    tokenizer.chat_template = template_source("chatml")
    assert ChatTokenizer.of(tokenizer).turns.template.source != other.turns.template.source


def test_calls_are_asked_for_with_their_tools_and_compared_as_the_template_writes_them(body: str) -> None:
    words = words_of(body, "our qwen")

    class Tokenizer:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return str(words.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    turns = CASES["a call"][0]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    row = Example(turns[:1], turns[1:], tools=tools)
    assert '"name": "look_up"' in words.prompt_text(row.prompt, row.tools)
    right = learned_answer(words, Tokenizer(), words.stops, row)
    call = '<tool_call>\n{"name": "look_up", "arguments": {"city": "Oslo", "count": 48151}}\n</tool_call>'
    assert right == Answer(call, call, True)
    other = Answer(call.replace("Oslo", "Rome"), call.replace("Oslo", "Rome"), True)
    endless = Answer(call, call, False)
    compared = compare_answers([row] * 3, [right, other, endless], lambda _: right)
    assert [one["exact"] for one in compared] == [True, False, False]
    assert {one["expected"] for one in compared} == {call} and compared[0]["prompt"] == "q"
    assert OSLO in turns[1]["tool_calls"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_saved_stops_where_the_template_ends_a_turn(method: str, tmp_path: Path) -> None:
    """Model or adapter, the merged folder, a checkpoint that is exported; and `chat` loads it so."""
    words = [*tiny_llama.words(tmp_path), f"method={method}", f"run.output_dir={tmp_path / 'runs'}"]
    words += ["train.max_steps=4", "eval.max_new_tokens=4"]
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    base.add_special_tokens({"additional_special_tokens": ["w63"]})  # which ends turns, and w1 is eos
    base.chat_template = ENDED.replace("<|im_end|>", "w63")
    base.save_pretrained(tmp_path / "base")
    finished, run = train_here(spec_of(*words))
    saved = run.path / "model"
    assert sorted(finished.model.generation_config.eos_token_id) == [1, 2, 63]
    assert 63 in GenerationConfig.from_pretrained(saved).eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("w63", 63)
    spec = spec_of(*words)
    model, _ = open_model.load_finished(spec, run)
    assert sorted(model.generation_config.eos_token_id) == [1, 2, 63]
    answers = [json.loads(line) for line in (run.path / "answers_after.jsonl").read_text("utf-8").splitlines()]
    assert answers and all(row["stopped"] or not row["exact"] for row in answers)
    assert finished.summary["eval"]["after"]["num_endless"] == sum(not row["stopped"] for row in answers)
    export.export(spec, run, 4, tmp_path / "exported", lambda line: None)
    assert 63 in GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id
    if method == "lora":
        adapter.merge(spec, run, tmp_path / "merged", lambda line: None)
        assert sorted(GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id) == [1, 2, 63]
