"""Masks hold exactly what the assistant says, in the shapes of real templates, for conversations of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runner.data.chat_template import Template, named_templates, template_source
from runner.data.chat_tokenizer import ChatTokenizer, Encoded
from runner.data.examples import Example, Turn
from runner.data.loss_mask import IGNORED, TurnFinder, labels_of
from runner.errors import RequestError
from tests.conftest import spec_of

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
OF_TRL = Path(trl.__file__).parent / "chat_templates"
"""Templates as they are on the Hub, and each once more with the assistant's words marked by hand."""
MARKED_BY_TRL = (
    "cohere",
    "cohere2",
    "deepseekv3",
    "gemma",
    "gemma3",
    "lfm2",
    "llama3",
    "phi3",
    "qwen2_5",
    "qwen3_instruct_2507",
)
SHAPES = ("chatml", "llama2", "llama3", "mistral", "zephyr", "gemma", "phi3", "qwen", "deepseek")
ENDS = {
    "chatml": "</s>", "llama2": " </s>", "llama3": "<|eot_id|>", "mistral": "</s>", "zephyr": "</s>", "phi3": "<|end|>",
    "gemma": "<end_of_turn>", "qwen": "<|im_end|>", "deepseek": "<｜end▁of▁sentence｜>",
}  # fmt: skip
TRIMS = {"llama2", "llama3", "gemma"}
FROM_THE_SPACE = {"llama2", "mistral"}  # the space before an answer is generated

# Whole words with what breaks tokenizers around them; no tags, which no template keeps apart from its own.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc", "Co"), exclude_characters="<>|[]{}"), max_size=30)
SAID = st.tuples(st.sampled_from(["", " ", "\n", "a"]), TEXT.filter(str.strip), st.sampled_from(["", " ", "\n"])).map(
    "".join
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    turns: list[Turn] = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [{"role": "user", "content": draw(SAID)}, {"role": "assistant", "content": draw(SAID)}]
    return turns


@pytest.fixture(scope="module")
def body() -> str:
    """A byte-level BPE of 400 tokens with the special tokens of all the templates, as `tokenizer.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|end|>", "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["assistant user system the answer is and then\n\n  it was"] * 20, trainer)
    text: str = tokenizer.to_str()
    return text


def whole(turns: list[Turn], **more: Any) -> Example:
    cut = max(i for i, turn in enumerate(turns, 1) if turn["role"] != "assistant")
    return Example(turns[:cut], turns[cut:], dialogue=True, **more)


def learned_pieces(words: ChatTokenizer, encoded: Encoded) -> list[str]:
    """What the labels say, piece by piece, in characters of the rendered text."""
    pieces: list[str] = []
    last, edge = -1, 0
    for index, label in enumerate(encoded.labels):
        if label == IGNORED:
            continue
        begin, end = encoded.offsets[index]
        if index == last + 1 and pieces:
            pieces[-1] += encoded.text[max(begin, edge) : end]
        else:
            pieces.append(encoded.text[begin:end])
        last, edge = index, end
    return pieces


def expected(name: str, content: str) -> str:
    said = content.strip() if name in TRIMS else content
    return (" " if name in FROM_THE_SPACE else "") + said + ENDS[name]


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=conversations())
@example(turns=[{"role": "user", "content": "0"}, {"role": "assistant", "content": "\n 0"}])  # one token over the edge
def test_exactly_the_assistants_words_are_learned(name: str, body: str, turns: list[Turn]) -> None:
    """Every answer with what ends it, in order, and nothing else; each of its tokens once."""
    words = ChatTokenizer(body, template_source(name), SPECIAL)
    encoded = words.encode(whole(turns), "auto")
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    said = [expected(name, answer) for answer in answers]
    assert_learned(words, encoded, said)
    assert words.backend.decode(encoded.ids, skip_special_tokens=False) == encoded.text  # no token lost or doubled
    assert all(label in (token, IGNORED) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    last = words.encode(whole(turns), "last")
    assert_learned(words, last, said[-1:])
    everything = words.encode(whole(turns), "all")
    assert everything.labels == everything.ids == encoded.ids


def assert_learned(words: ChatTokenizer, encoded: Encoded, said: list[str]) -> None:
    """Of each answer exactly this; with the header's line break only where one token holds it and the answer's first
    character: that token is learned."""
    ids = enumerate(encoded.labels)
    firsts = [index for index, label in ids if label != IGNORED and (not index or encoded.labels[index - 1] == IGNORED)]
    for piece, first, right in zip(learned_pieces(words, encoded), firsts, said, strict=True):
        begin, end = encoded.offsets[first]
        over = encoded.text[begin:end].startswith("\n" + right[0])
        assert piece == ("\n" + right if over and piece != right else right)


def test_a_token_with_a_character_of_the_answer_is_learned(body: str) -> None:
    """One that holds the header's line break as well is, too, as in the mask of transformers, which TRL takes."""
    words = ChatTokenizer(body, (OF_TRL / "phi3.jinja").read_text("utf-8"), SPECIAL)
    turns: list[Turn] = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "\n 0"}]
    encoded = words.encode(whole(turns), "auto")
    first = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    begin, end = encoded.offsets[first]
    assert encoded.text[begin:end] == "\n\n" and encoded.text[:begin].endswith("<|assistant|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend, **SPECIAL)
    marked = (OF_TRL / "phi3_training.jinja").read_text("utf-8")
    found = tokenizer.apply_chat_template(
        turns, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == encoded.ids and found["assistant_masks"].index(1) == first


@pytest.mark.parametrize("name", MARKED_BY_TRL)
@settings(max_examples=25, deadline=None)
@given(turns=conversations())
def test_found_are_the_words_that_trl_marks_by_hand(name: str, turns: list[Turn]) -> None:
    """Templates of the Hub without marks: what is found in them is what TRL marks in its copies.

    But for the header, which the model does not generate, and a line break behind the token that ends a turn.
    """
    turns = turns[turns[0]["role"] == "system" :]  # Gemma refuses system turns
    template = Template((OF_TRL / f"{name}.jinja").read_text("utf-8"), SPECIAL)
    marked = Template((OF_TRL / f"{name}_training.jinja").read_text("utf-8"), SPECIAL).render(turns)
    rendered = template.render(turns)
    assert rendered.marks == [] and rendered.text == marked.text
    found = [
        rendered.text[begin:end] for begin, end in TurnFinder(template).spans(turns, [], rendered.text, []).values()
    ]
    by_hand = [marked.text[begin:end] for begin, end in marked.marks]
    if name == "phi3":  # the end of the text is a mark of its own there
        by_hand[-2:] = ["".join(by_hand[-2:])]
    header = {"deepseekv3": "<｜Assistant｜>", "qwen2_5": "\n"}.get(name, "")
    assert [one.rstrip() for one in found] == [one.removeprefix(header).rstrip() for one in by_hand]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_a_call_is_learned_and_what_the_tool_answers_is_not(body: str) -> None:
    words = ChatTokenizer(body, template_source("qwen"), SPECIAL)
    turns: list[Turn] = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    encoded = words.encode(whole(turns, tools=TOOLS), "auto")
    call, answer = learned_pieces(words, encoded)
    assert call.strip() == '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    assert answer == "It is 4.<|im_end|>"
    assert "# Tools" in encoded.text and "<tool_response>\n4" in encoded.text


def test_thoughts_are_learned_where_the_template_shows_them(body: str) -> None:
    words = ChatTokenizer(body, template_source("deepseek"), SPECIAL)
    turns: list[Turn] = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "one", "reasoning_content": "hm"},
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "two", "reasoning_content": "well"},
    ]
    pieces = learned_pieces(words, words.encode(whole(turns), "auto"))
    end = ENDS["deepseek"]
    assert pieces == [f"well\n</think>\ntwo{end}"]  # asking has opened them with <think>


def test_a_turn_that_weighs_nothing_is_not_learned(body: str) -> None:
    words = ChatTokenizer(body, template_source("llama3"), SPECIAL)
    turns: list[Turn] = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "right"},
    ]
    assert learned_pieces(words, words.encode(whole(turns), "assistant")) == ["right<|eot_id|>"]
    everything = "".join(learned_pieces(words, words.encode(whole(turns), "all")))
    assert "wrong" not in everything and "right" in everything and "1?" in everything


def test_marks_in_the_template_are_believed(body: str) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    words = ChatTokenizer(body, source, SPECIAL)
    turns: list[Turn] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    assert learned_pieces(words, words.encode(whole(turns), "auto")) == ["b</s>", "b</s>"]


def test_a_template_that_hides_who_speaks_is_an_error_and_no_guess(body: str) -> None:
    mute = "{% for m in messages %}{{ m.role }}{{ m.content if m.role == 'user' }}{% endfor %}"
    words = ChatTokenizer(body, mute, SPECIAL)
    with pytest.raises(RequestError, match="does not show which words of turn 2"):
        words.encode(whole([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "auto")


def test_labels_cover_tokens_that_hold_a_learned_character() -> None:
    assert labels_of([5, 6, 7, 8], [(0, 2), (2, 4), (4, 6), (6, 6)], [(3, 5)]) == [IGNORED, 6, 7, IGNORED]


def test_templates_render_as_transformers_does() -> None:
    """The same text and the same ids, for the demo model's own template and every one that is named."""
    from transformers import AutoTokenizer

    from runner.train import model_loading as train_models

    tokenizer = AutoTokenizer.from_pretrained(train_models.source_of(spec_of().model))
    turns = [{"role": "user", "content": " a<b> é"}, {"role": "assistant", "content": "世界 🌍\n"}]
    tokenizer.bos_token = tokenizer.bos_token or "<s>"
    for source in (tokenizer.chat_template, *(file.read_text("utf-8") for file in named_templates().values())):
        tokenizer.chat_template = source
        words = ChatTokenizer.of(tokenizer)
        theirs = tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
        assert words.turns.template.render(turns, tools=TOOLS).text == theirs
        tools = TOOLS if "add" in theirs else []  # a template that does not show them is refused
        example = Example(turns[:1], turns[1:], tools=tools)
        assert words.encode(example, "auto").ids == tokenizer.apply_chat_template(turns, tools=tools)["input_ids"]
