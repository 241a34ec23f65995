"""Every shape of a row, named or recognised, with rows of every odd kind; and what objectives make of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runner.data.examples import Example, Kind, Preference, PromptExample, UnpairedExample, columns, content_of
from runner.data.load import canonical, detect_format
from runner.errors import RequestError
from runner.spec import DataSpec

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
WORSE = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "4"}


def spec(**changes: Any) -> DataSpec:
    return DataSpec(**({"path": "my.jsonl"} | changes))


def made(row: dict[str, Any], kind: Kind | None = None, **changes: Any) -> Any:
    return canonical(row, "row 1", spec(**changes), kind)


def told(row: dict[str, Any], kind: Kind | None = None, **changes: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        canonical(row, "row 1", spec(**changes), kind)
    assert all(problem.source == "row 1" for problem in caught.value.problems)
    return [problem.what for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("row", "kind", "shape"),
    [
        ({"conversations": []}, None, "chat"),
        ({"instruction": "", "input": "", "output": ""}, None, "alpaca"),
        ({"instruction": "", "output": ""}, None, "alpaca"),
        ({"prompt": "", "chosen": "", "rejected": ""}, None, "preference"),
        ({"chosen": [], "rejected": [], "messages": []}, None, "preference"),
        ({"prompt": "", "completion": "", "label": 1}, "sft", "prompt_completion"),
        ({"prompt": "", "completion": "", "label": 1}, "unpaired", "unpaired"),
        ({"messages": [], "label": True}, "unpaired", "unpaired"),
        ({"prompt": "", "answer": ""}, None, "prompts"),
        ({"prompt": ""}, "prompts", "prompts"),
        ({"messages": [], "answer": ""}, "prompts", "prompts"),
        ({"input_ids": []}, None, "tokens"),
        ({"text": "", "input_ids": []}, None, "tokens"),
    ],
)
def test_shapes_are_recognised(row: dict[str, Any], kind: Kind | None, shape: str) -> None:
    assert detect_format(row, spec(), kind) == shape


# --- chat --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        [{"from": "user", "value": "2 + 2?"}, {"from": "chatgpt", "value": "4"}],
        [{"role": "prompter", "text": "2 + 2?"}, {"role": "bot", "text": "4"}],
        [{"speaker": "human", "content": "2 + 2?"}, {"speaker": "model", "content": "4"}],
        [{"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]}, ANSWER],
    ],
)
def test_any_names_of_roles_and_contents_are_understood(turns: list[Any]) -> None:
    found = made({"conversations": turns})
    assert (found.prompt, found.completion, found.dialogue) == ([USER], [ANSWER], True)


def test_roles_of_ones_own_are_named_in_yaml() -> None:
    turns = [{"role": "Frage", "content": "2 + 2?"}, {"role": "Antwort", "content": "4"}]
    assert made({"messages": turns}, roles={"Frage": "user", "Antwort": "assistant"}).completion == [ANSWER]
    with pytest.raises(RequestError) as caught:
        made({"messages": turns})
    assert caught.value.problems[0].remedy == "write data.roles={Frage: user}, or assistant, system, tool"


def test_a_system_prompt_beside_the_turns_goes_before_them() -> None:
    assert made({"system": "Be brief.", "conversations": [USER, ANSWER]}).prompt == [SYSTEM, USER]
    assert made({"system": "", "messages": [USER, ANSWER]}, system_prompt="Be brief.").prompt == [SYSTEM, USER]
    assert made({"system": None, "messages": [USER, ANSWER]}).prompt == [USER]


def test_calls_and_thoughts_and_weights_are_kept() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {**TOOL, "tool_call_id": "1", "name": "add"},
        {**ANSWER, "thinking": "easy", "weight": 1},
        USER,
        {**ANSWER, "weight": 0},
    ]
    found = made({"messages": turns, "tools": json.dumps([{"name": "add"}])})
    function = {"name": "add", "arguments": {"a": 2}}
    said = [*found.prompt, *found.completion]
    assert said[1] == {
        "role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }  # fmt: skip
    assert said[2] == {**TOOL, "tool_call_id": "1", "name": "add"}
    assert said[3] == {**ANSWER, "reasoning_content": "easy"}
    assert said[5] == {**ANSWER, "weight": 0} and found.tools == [{"type": "function", "function": {"name": "add"}}]


def test_sharegpts_calls_are_calls() -> None:
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
    ]
    found = made({"conversations": turns, "tools": ""})
    assert found.prompt[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert found.prompt[2] == TOOL and found.tools == []


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]}, "messages[2] is a system turn after the first turn"),
        ({"messages": [ANSWER, USER, ANSWER]}, "messages[0] is the assistant's, before anything was asked"),
        ({"messages": [USER, TOOL, ANSWER]}, "messages[1] is a tool's answer that nothing called for"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight is 0.5, neither 0 nor 1"),
        ({"messages": [USER, {**ANSWER, "weight": "high"}]}, 'messages[1].weight is "high", neither 0 nor 1'),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": ["{"]}]},
            "messages[1].tool_calls[0] is no call of a function with its arguments in JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": "["}, "tools is broken JSON: Expecting value (column 2)"),
        ({"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools is an object, not a list of tools"),
        ({"messages": '[{"role": '}, "messages is broken JSON: Expecting value (column 11)"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]},
            "messages[1].content is a list, not text",
        ),
    ],
)  # fmt: skip
def test_a_conversation_that_is_wrong_is_explained(row: dict[str, Any], what: str) -> None:
    assert told(row) == [what]


def test_a_conversation_in_a_csv_cell_is_json() -> None:
    assert made({"messages": json.dumps([USER, ANSWER])}).completion == [ANSWER]


# --- alpaca ------------------------------------------------------------------------------------


def test_alpaca_joins_task_and_input_after_its_history() -> None:
    row = {"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    found = made(row)
    assert [turn["content"] for turn in found.prompt] == ["Be brief.", "Hi", "Hello", "Add.\n\n2 + 2"]
    assert found.completion == [ANSWER] and found.dialogue
    assert made({"instruction": "2 + 2?", "input": "", "output": "4"}) == Example([USER], [ANSWER])
    assert made({"instruction": "2 + 2?", "input": None, "output": "4", "history": None}).prompt == [USER]
    dolly = {"instruction": "Add.", "context": "2 + 2", "response": "4"}
    assert made(dolly, input_field="context", output_field="response").prompt[0]["content"] == "Add.\n\n2 + 2"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "", "output": "4"}, "instruction is empty"),
        ({"instruction": "a", "output": None}, "output is null, not text"),
        ({"instruction": "a", "input": 3, "output": "4"}, "input is a number, not text"),
        ({"instruction": "a", "output": "4", "history": [["b"]]}, "history[0] is no pair"),
        ({"instruction": "a", "output": "4", "history": "b"}, "history is no list of pairs"),
        ({"instruction": "a", "output": "4", "history": [["b", ""]]}, "history[0][1] is empty"),
    ],
)
def test_an_alpaca_row_that_is_wrong_is_explained(row: dict[str, Any], what: str) -> None:
    assert told(row) == [what]


# --- preferences -------------------------------------------------------------------------------

PAIR = Preference([USER], [ANSWER], [WORSE])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": "2 + 2?", "chosen": ANSWER, "rejected": WORSE},
        {"prompt": "2 + 2?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},  # UltraFeedback
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"messages": [USER], "chosen": ANSWER, "rejected": WORSE},
        {"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"},
         "rejected": {"from": "gpt", "value": "5"}},
        {"instruction": "2 + 2?", "input": "", "chosen": "4", "rejected": "5"},
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},  # HH-RLHF
    ],
)  # fmt: skip
def test_pairs_of_any_spelling_are_the_same(row: dict[str, Any]) -> None:
    assert made(row, "preference") == PAIR
    assert columns([PAIR]) == {"prompt": [[USER]], "chosen": [[ANSWER]], "rejected": [[WORSE]]}


def test_a_pair_of_plain_texts_shares_its_beginning() -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert made(row, "preference") == Preference("The sky is", " blue.", " black.")
    assert made(row, "sft") == Example(text="The sky is blue.")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected is null, not text"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected does not end with an assistant turn"),
        ({"prompt": "a", "chosen": [], "rejected": [WORSE]}, "chosen is an empty list"),
    ],
)
def test_a_pair_that_is_wrong_is_explained(row: dict[str, Any], what: str) -> None:
    assert what in told(row, "preference")


# --- labels, prompts, tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), (1, True), (0, False), ("true", True), ("0", False), (-1, False)]
)
def test_a_label_may_be_written_in_many_ways(label: Any, good: bool) -> None:
    found = made({"prompt": "2 + 2?", "completion": "4", "label": label}, "unpaired")
    assert found == UnpairedExample([USER], [ANSWER], good)
    assert columns([found])["label"] == [good]


@pytest.mark.parametrize("label", [None, "good", 2, 0.5, []])
def test_a_label_that_says_nothing_is_explained(label: Any) -> None:
    (what,) = told({"prompt": "a", "completion": "b", "label": label}, "unpaired")
    assert what.endswith("neither true nor false")


def test_prompts_keep_what_reward_functions_look_at() -> None:
    found = made({"prompt": "2 + 2?", "answer": 4, "level": 2, "tags": ["x"]}, "prompts")
    assert found == PromptExample([USER], 4, {"level": 2, "tags": ["x"]})
    table = columns([found, PromptExample([], None)])
    assert table == {"prompt": [[USER], []], "answer": [4, None], "level": [2, None], "tags": [["x"], None]}
    assert made({"prompt": "2 + 2?"}, "prompts").answer is None
    assert made({"prompt": "a", "answer": ["4", "four"]}, "prompts").answer == ["4", "four"]
    assert told({"prompt": "a", "answer": {"b": 4}}, "prompts") == ["answer is an object, neither text nor a number"]
    assert told({"prompt": [USER, ANSWER], "answer": "4"}, "prompts") == ["the prompt ends with an assistant turn"]


def test_token_ids_are_taken_as_they_are() -> None:
    assert made({"input_ids": [1, 2], "labels": [-100, 2]}) == Example(ids=[1, 2], labels=[-100, 2])
    assert made({"input_ids": [1, 2], "labels": None}).labels is None
    assert told({"input_ids": [1, 2], "labels": [1]}) == ["has 1 labels for 2 tokens"]
    assert told({"input_ids": ["1"]}) == ["input_ids is not a list of whole numbers"]
    assert told({"input_ids": []}) == ["input_ids is an empty list"]


# --- what objectives make of them --------------------------------------------------------------


def test_an_objective_takes_what_it_can_learn_from() -> None:
    pair = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    answered = {"prompt": "2 + 2?", "completion": "4"}
    assert made(pair, "sft") == Example([USER], [ANSWER])
    assert made(pair, "prompts") == PromptExample([USER], None, {"chosen": "4", "rejected": "5"})
    assert made(answered, "prompts") == PromptExample([USER], "4")
    assert "an answer without another to compare it with" in told(answered, "preference")[0]
    assert "a prompt without an answer to learn" in told({"prompt": "a", "answer": "b"}, "sft")[0]
    labelled = told({"prompt": "a", "completion": "b", "label": 1}, "sft", format="unpaired")
    assert "an answer with a label" in labelled[0]


def test_what_is_not_said_is_not_in_the_content() -> None:
    assert content_of(Example([USER], [ANSWER])) == {"prompt": [USER], "completion": [ANSWER], "text": None}
    assert "where" not in content_of(made({"prompt": "a", "chosen": "b", "rejected": "c"}))
