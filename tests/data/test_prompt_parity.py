"""Evaluation, chat and GRPO give a model the prompt that it was trained behind: one renderer, the same token ids."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Preference, PromptExample, Turn
from runner.data.loss_mask import IGNORED
from runner.data.tokenize_rows import PreferenceSettings, encode_preferences
from runner.train.objectives.grpo import GrpoTrainer
from tests.conftest import spec_of
from tests.data.test_loss_mask import CALL, OF_TRL, SPECIAL, body
from tests.support.rows import canonical_row

__all__ = ["body"]  # a fixture

RUNNER = Path(__file__).parents[2] / "runner"
OF_LLAMA_3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    ]
)  # fmt: skip
"""How Llama 3, Qwen, Phi-4 and others cut text into words; GPT-2's way cuts two line breaks apart before a word."""
NO_SYSTEM = "{{ raise_exception('no system turn') if messages[0].role == 'system' }}" + template_source("mistral")
SOURCES = {name: template_source(name) for name in ("chatml", "llama3", "mistral", "gemma", "qwen", "zephyr")}
SOURCES |= {"without system": NO_SYSTEM}
SOURCES |= {
    name: (OF_TRL / f"{name}.jinja").read_text("utf-8") for name in ("llama3_1", "qwen3", "gemma4_v5", "gptoss")
}
CALLING = ("qwen", "llama3_1", "qwen3", "gemma4_v5")
NUMBER = {"type": "integer"}
ADD = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}}}
DESCRIBED = [{"type": "function", "function": ADD}]


def chat(body: str, source: str) -> ChatTokenizer:
    tokenizer = json.loads(body)
    split = {"type": "Split", "pattern": {"Regex": OF_LLAMA_3}, "behavior": "Isolated", "invert": False}
    by_byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, by_byte]}
    return ChatTokenizer(json.dumps(tokenizer), source, SPECIAL)


def rows(name: str) -> dict[str, Example]:
    """The forms of a row that hold a prompt, as they are read."""
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]
    more = [{"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "seven, I think"}]
    found: dict[str, dict[str, Any]] = {
        "messages": {"messages": said},
        "longer": {"messages": said + more},
        "pair": {"prompt": "2 + 2?", "completion": "four"},
        "turns": {"prompt": said[:1], "completion": said[1:]},
        "alpaca": {"instruction": "Add.", "input": "2 + 2", "output": "four"},
    }
    if name != "without system":
        found["system"] = {"messages": [{"role": "system", "content": "Be short."}, *said]}
    if name in CALLING:
        call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        found["tools"] = {"messages": [said[0], call], "tools": DESCRIBED}
    spec = spec_of("data.system_prompt=null").data
    examples = {kind: canonical_row(row, kind, spec, "sft") for kind, row in found.items()}
    return {kind: row for kind, row in examples.items() if isinstance(row, Example)}


@pytest.mark.parametrize("name", SOURCES)
def test_a_prompt_in_evaluation_is_what_stands_before_the_first_learned_token(name: str, body: str) -> None:
    words = chat(body, SOURCES[name])
    for kind, row in rows(name).items():
        encoded = words.encode(row, "last" if row.dialogue else "auto")
        first = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
        assert words.prompt_ids(row.prompt, row.tools) == encoded.ids[:first], kind
        assert encoded.text.startswith(words.prompt_text(row.prompt, row.tools)) and not encoded.prompt_differs


@pytest.mark.parametrize("name", SOURCES)
def test_grpo_and_transformers_render_the_same_prompt(name: str, body: str) -> None:
    words = chat(body, SOURCES[name])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend, **SPECIAL)
    tokenizer.chat_template = SOURCES[name]
    for kind, row in rows(name).items():
        (columns,) = encode_preferences(
            words, [PromptExample(row.prompt, "4", tools=row.tools)], PreferenceSettings(10_000)
        ).rows
        trainer = SimpleNamespace(words=words, row_tools=[row.tools] if row.tools else [])
        ((asked,), _, _) = GrpoTrainer._tokenize_prompts(trainer, [columns["prompt"]])
        assert asked == words.prompt_ids(row.prompt, row.tools), kind
        theirs = tokenizer.apply_chat_template(
            [dict(turn) for turn in row.prompt], tools=row.tools or None, add_generation_prompt=True
        )
        assert asked == theirs["input_ids"], kind


def test_a_token_over_the_edge_is_the_only_difference(body: str) -> None:
    """The header's line break and the answer's are one token: it is learned, and the prompt ends with half of it."""
    words = chat(body, template_source("chatml"))
    row = Example([{"role": "user", "content": "0"}], [{"role": "assistant", "content": "\n 0"}])
    encoded = words.encode(row, "auto")
    first = next(index for index, label in enumerate(encoded.labels) if label != IGNORED)
    begin, end = encoded.offsets[first]
    asked = words.prompt_ids(row.prompt)
    assert asked[:first] == encoded.ids[:first] and len(asked) == first + 1
    assert encoded.text[begin:end] == "\n\n" and words.backend.decode(asked[first:]) == "\n"
    assert encoded.text.startswith(words.prompt_text(row.prompt)) and not encoded.prompt_differs


def test_answers_that_begin_elsewhere_than_the_template_asks_are_counted(body: str) -> None:
    """DeepSeek's prompt ends with <think>: an answer without thoughts is written without it."""
    words = chat(body, template_source("deepseek"))
    asked: list[Turn] = [{"role": "user", "content": "1?"}]
    plain: list[Turn] = [{"role": "assistant", "content": "one"}]
    thinks: list[Turn] = [{"role": "assistant", "content": "one", "reasoning_content": "hm"}]
    assert words.encode(Example(asked, plain), "auto").prompt_differs
    assert not words.encode(Example(asked, thinks), "auto").prompt_differs
    assert encode_preferences(words, [Preference(asked, plain, thinks)], PreferenceSettings(500)).prompt_differs == 1
    assert encode_preferences(words, [Preference(asked, thinks, thinks)], PreferenceSettings(500)).prompt_differs == 0


def test_plain_text_is_learned_from_its_first_token_and_has_no_prompt(body: str) -> None:
    words = chat(body, template_source("chatml"))
    encoded = words.encode(Example(text="It is four."), "auto")
    assert encoded.labels == encoded.ids and encoded.text == "It is four." and not encoded.prompt_differs
    text = Preference("It is", " four.", " five.")
    (columns,) = encode_preferences(words, [text], PreferenceSettings(500)).rows
    assert columns["prompt_ids"] == words.token_ids(["It is"], special=True)[0]


def test_nothing_in_the_package_renders_a_prompt_in_another_way() -> None:
    assert [file for file in RUNNER.rglob("*.py") if "apply_chat_template" in file.read_text("utf-8")] == []
