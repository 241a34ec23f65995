"""Every shape of a row, named or recognised, with rows of every odd kind; and what objectives make of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from runner.data.examples import Example, Kind, Preference, PromptExample, UnpairedExample, columns, content_of
from runner.data.row_checks import check_rows
from runner.data.row_formats import detect_format, left_out, rewarded
from runner.errors import RequestError
from runner.spec import DataSpec
from tests.support.front import spec_of
from tests.support.rows import canonical_row
from tests.support.rows import data_spec as spec

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
WORSE = {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "4"}


def made(row: dict[str, Any], kind: Kind | None = None, **changes: Any) -> Any:
    return canonical_row(row, "row 1", spec(**changes), kind)


def told(row: dict[str, Any], kind: Kind | None = None, **changes: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        canonical_row(row, "row 1", spec(**changes), kind)
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
    assert caught.value.problems[0].remedy == "write data.roles={Frage:user}, or assistant, system, tool"


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
        ({"messages": [ANSWER, USER, ANSWER]}, "messages[0] is the assistant's, before any user turn"),
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
            "messages[1].content has a part of the type image, and only text is learned",
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


def one(row: dict[str, Any], **data: Any) -> Any:
    return canonical_row(row, "row 1", DataSpec(path="x", **data), "sft")


def refusal_of(row: dict[str, Any], **data: Any) -> str:
    with pytest.raises(RequestError) as caught:
        one(row, **data)
    return "; ".join(f"{problem.what} → {problem.remedy}" for problem in caught.value.problems)


def test_roles_are_known_however_they_are_cased() -> None:
    turns = [{"from": "System", "value": "s"}, {"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]
    found = one({"conversations": turns})
    assert [turn["role"] for turn in (*found.prompt, *found.completion)] == ["system", "user", "assistant"]
    assert one({"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]}).dialogue


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (("Frage", "Antwort"), ["write data.roles={Frage:user}, or", "write data.roles={Antwort:assistant}, or"]),
        (
            ("用户", "助手"),
            ['{"用户": user}, or', '{"助手": assistant}, or user, system, tool, below data in'],
        ),
    ],
)
def test_a_role_of_another_name_is_told_with_what_its_place_makes_it(roles: tuple[str, str], said: list[str]) -> None:
    told = refusal_of({"messages": [{"role": roles[0], "content": "q"}, {"role": roles[1], "content": "a"}]})
    assert all(part in told for part in said), told
    known = {roles[0]: "user", roles[1]: "assistant"}
    assert one({"messages": [{"role": role, "content": "x"} for role in roles]}, roles=known).dialogue


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image", "image": "a.png"}, "has a part of the type image, and only text is learned"),
        ({"type": "image_url", "image_url": {"url": "http://x"}}, "of the type image_url, and only text is learned"),
        ({"type": "input_audio", "input_audio": {}}, "of the type input_audio, and only text is learned"),
        ({"image": {"format": "png"}}, "of the type image, and only text is learned"),
        ({"type": "thinking", "thinking": "t"}, "thoughts as reasoning_content"),
        ({"type": "tool_use", "id": "1", "name": "f", "input": {}}, "calls as tool_calls"),
        ({"type": "tool_result", "tool_use_id": "1", "content": "x"}, "as a turn of the role tool"),
    ],
)
def test_a_part_of_content_that_is_no_text_is_called_what_it_is(part: dict[str, Any], said: str) -> None:
    turns = [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}]
    told = refusal_of({"messages": turns})
    assert told.startswith("messages[0].content has a part of the type ") and said in told
    assert "write it as text in quotes" not in told


def test_text_parts_are_text_with_or_without_a_type() -> None:
    for text in ({"type": "text", "text": "q"}, {"text": "q"}):
        found = one({"messages": [{"role": "user", "content": [text, text]}, {"role": "assistant", "content": [text]}]})
        assert (found.prompt[0]["content"], found.completion[0]["content"]) == ("qq", "q")


@pytest.mark.parametrize("absent", ["", None, float("nan"), "<noinput>", " "])
def test_an_alpaca_task_without_input_is_the_task_alone(absent: object) -> None:
    found = one({"instruction": "Add.", "input": absent, "output": "4"})
    assert [turn["content"] for turn in found.prompt] == ["Add."]


@pytest.mark.parametrize(("value", "meant"), [(1.0, True), (0.0, False), ("1.0", True), ("0.0", False)])
def test_a_mark_may_be_the_float_that_pandas_makes_of_it(value: object, meant: bool) -> None:
    row = {"prompt": "q", "completion": "a", "label": value}
    found = canonical_row(row, "row 1", DataSpec(path="x"), "unpaired")
    assert isinstance(found, UnpairedExample) and found.label is meant
    with pytest.raises(RequestError, match=r"label is 0\.5, neither true nor false"):
        canonical_row({**row, "label": 0.5}, "row 1", DataSpec(path="x"), "unpaired")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("fråga", "svar"), "write 'data.prompt_field=fråga' data.completion_field=svar"),
        (("Prompt", "Completion"), "write data.prompt_field=Prompt data.completion_field=Completion"),
        ((" prompt ", "completion "), """write 'data.prompt_field=" prompt "' 'data.completion_field="completion "'"""),
        (("问题", "答案 (短)"), """write 'data.prompt_field=问题' 'data.completion_field="答案 (短)"'"""),
    ],
)
def test_two_columns_of_text_are_a_question_and_its_answer_in_the_words_that_are_proposed(
    names: tuple[str, str], said: str, tmp_path: Path
) -> None:
    row = dict(zip(names, ("q", "a"), strict=True))
    told = refusal_of(row)
    assert said in told
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    words = shlex.split(said.removeprefix("write "))
    spec = spec_of(f"data.path={tmp_path / 'rows.jsonl'}", "data=file", *words)  # as somebody types them
    found = canonical_row(row, "row 1", spec.data, "sft")
    assert isinstance(found, Example) and found.completion[0]["content"] == "a"


def test_turns_of_no_known_form_are_told_of_a_format_of_ones_own() -> None:
    told = refusal_of({"conversation": [{"human": "q", "assistant": "a"}]})
    assert "data.format=FILE.py:CLASS for a format of your own" in told


GEMMA_OF_THE_HUB = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (
            ["system", "user", "assistant"],
            "takes a system turn (such as chatml, or gemma, which puts it before",
        ),
        (["user", "user", "assistant"], "join turns 1 and 2, both of the role user, or set data.chat_template"),
        (
            ["user", "assistant", "tool", "assistant"],
            "shows them (such as qwen), or leave them out of the row",
        ),
    ],
)
def test_what_a_template_refuses_is_told_with_what_is_unusual_in_it(
    turns: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(GEMMA_OF_THE_HUB, "utf-8")
    row = {"messages": [{"role": role, "content": f"words {n} {role}"} for n, role in enumerate(turns)]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    words = (f"data.path={tmp_path / 'rows.jsonl'}", f"data.chat_template={tmp_path / 't.jinja'}")
    with pytest.raises(RequestError) as caught:
        check_rows(spec_of("data=file", "data.eval_fraction=0", *words))
    (problem,) = caught.value.problems
    assert "the model's chat template refuses a conversation: " in problem.what and said in str(problem.remedy)


# --- what is told of a row that nothing reads --------------------------------------------------------------------


def remedy(row: dict[str, Any], kind: Kind | None = None, **changes: Any) -> str:
    """What to write instead, of the one thing that is wrong with the row."""
    with pytest.raises(RequestError) as caught:
        canonical_row(row, "row 1", spec(**changes), kind)
    (problem,) = caught.value.problems
    return str(problem.remedy)


def test_columns_that_nothing_reads_are_listed() -> None:
    assert told({"a": 1, "b": 2}) == ["cannot tell what to learn by the fields: a, b"]
    assert told({}) == ["cannot tell what to learn by the fields: none"]


KEYS = (
    "write data.messages_field=…, data.text_field=…, or data.prompt_field=… data.completion_field=…; where no column "
    'is such, write rows as {"prompt": "…", "completion": "…"} first, or data.format=FILE.py:CLASS for a format of '
    "your own (CONTRIBUTING.md)"
)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "target": "b"}, "write data.output_field=target"),
        ({"instruction": "a", "context": "c", "target": "b"},
         "write data.output_field=target data.input_field=context"),
        ({"prompt": "a", "reply": "b"}, "write data.completion_field=reply"),
        ({"user": "a", "completion": "b"}, "write data.prompt_field=user"),
        ({"human": "a", "gpt": "b"}, "write data.prompt_field=human data.completion_field=gpt"),
        ({"body": "words"}, "write data.text_field=body"),
        ({"Content": "words"}, "write data.text_field=Content"),
        ({"turns": [USER, ANSWER]}, "write data.messages_field=turns"),
        ({"dialog": json.dumps([USER, ANSWER])}, "write data.messages_field=dialog"),
        ({"turns": "a text", "body": "b"}, "write data.text_field=body"),  # turns that are none
        ({"frage": "a", "antwort": "b"}, "write data.prompt_field=frage data.completion_field=antwort"),
        ({"frage": "a", "source": "b"}, KEYS),  # of which one is a fact about the row
        ({"a": 1}, KEYS),
        ({"prompt": 1}, f"prompt is a number, and prompt and answer have to be text or turns: {KEYS}"),
        ({"prompt": 1, "reply": {}},
         f"prompt is a number and reply is an object, and prompt and answer have to be text or turns: {KEYS}"),
    ],
)  # fmt: skip
def test_names_that_others_use_are_answered_with_the_keys_to_write(row: dict[str, Any], words: str) -> None:
    assert remedy(row) == words


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen_response": "b", "rejected_response": "c"},
         "write data.chosen_field=chosen_response data.rejected_field=rejected_response"),
        ({"prompt": "a", "answer_chosen": "b", "chosen_score": 3, "answer_rejected": "c", "chosen_model": "m"},
         "write data.chosen_field=answer_chosen data.rejected_field=answer_rejected"),
        ({"prompt": "a", "good": "b", "bad": "c"},
         "write data.prompt_field=… data.chosen_field=… data.rejected_field=…: the better and the worse answer; rows "
         "that mark one of two answers have to be written so first"),
    ],
)  # fmt: skip
def test_a_preference_by_other_names_is_answered_with_its_keys(row: dict[str, Any], words: str) -> None:
    assert remedy(row, "preference") == words


@pytest.mark.parametrize(
    "row", [{"messages": [USER, ANSWER]}, {"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}]
)
def test_a_judgement_under_another_name_is_looked_for_in_every_shape_that_answers(row: dict[str, Any]) -> None:
    assert told({**row, "good": True}, "unpaired") == ["has no field label"]
    assert remedy({**row, "good": True}, "unpaired") == "write data.label_field=good"
    assert isinstance(made({**row, "label": True}, "unpaired"), UnpairedExample)
    with pytest.raises(RequestError):  # which of the two is not guessed
        made({**row, "good": True, "seen": False}, "unpaired")


def test_a_column_that_is_left_out_is_named_with_what_leaves_it_out() -> None:
    row = {"messages": [USER, ANSWER], "image": "a.png"}
    assert told(row) == ["column image looks like content, and nothing reads it"]
    assert remedy(row) == "write data.ignore_columns=[image] to leave it out"
    both = {**row, "audio": "a.wav"}
    assert told(both) == ["columns image and audio look like content, and nothing reads them"]
    assert remedy(both) == "write data.ignore_columns=[image,audio] to leave them out"
    assert made(both, ignore_columns=["image", "audio"]).completion


def test_an_example_knows_where_it_stands_and_what_was_not_read() -> None:
    row = {"prompt": "a", "completion": "b", "id": 7, "": 1, "score": 2}
    assert made(row).where == "row 1"
    shape = detect_format(row, spec())
    assert left_out(row, spec(), shape) == ["id", "score"]
    asked = {"prompt": "a", "answer": "4", "level": 3}
    assert left_out(asked, spec(), "prompts", "prompts") == []  # reward functions get all of it
    assert left_out({"messages": [USER], "level": 3}, spec(), "chat", "prompts") == []
    assert rewarded(asked, spec()) == ["level"]
    assert rewarded({"text": "a", "level": 3}, spec()) == []


def test_token_ids_and_named_text_are_taken_as_they_are_whatever_stands_beside_them() -> None:
    ids = {"input_ids": [1, 2], "prompt": "a", "image": "a.png"}
    assert made(ids, "sft").ids == [1, 2]
    assert detect_format({"input_ids": [1]}, spec(), "preference") == "tokens"
    text = {"text": "words", "summary": "short", "image": "a.png"}
    assert made(text, format="text").text == "words"
    assert told({"text": "words", "image": "a.png"}) == ["column image looks like content, and nothing reads it"]


def test_a_pair_asks_for_a_prompt_with_its_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row = {"chosen": [USER, ANSWER], "rejected": [USER, WORSE], "tools": tools, "level": 3}
    found = made(row, "prompts")
    assert isinstance(found, PromptExample) and found.tools == tools and found.extra["level"] == 3
    assert found.prompt == [USER]


def test_names_of_ones_own_for_roles_and_weights_hold_in_every_reading() -> None:
    talk = [{"role": "frage", "content": "2 + 2?"}, {"role": "assistant", "content": "4", "keep": 0},
            {"role": "frage", "content": "3 + 3?"}, {"role": "assistant", "content": "6", "keep": 1}]  # fmt: skip
    own: dict[str, Any] = {"roles": {"frage": "user"}, "weight_field": "keep"}
    found = made({"messages": talk}, **own)
    assert [turn.get("weight") for turn in found.prompt + found.completion][1] == 0
    assert rewarded({"messages": talk[:1], "level": 3}, spec(**own)) == ["level"]


def test_a_name_of_ones_own_is_kept_beside_one_that_is_guessed() -> None:
    assert remedy({"frage": "a", "reply": "b"}, prompt_field="frage") == "write data.completion_field=reply"


def test_what_a_judgement_still_lacks_is_no_reason_for_other_keys() -> None:
    assert remedy({"human": "a", "gpt": "b"}, "unpaired") == "write data.prompt_field=human data.completion_field=gpt"
    talk = remedy({"conversation": [USER, ANSWER]}, "unpaired")
    own = "data.format=FILE.py:CLASS for a format of your own (CONTRIBUTING.md)"
    assert talk == f"write data.messages_field=conversation; or {own}"


def test_keys_are_told_only_where_they_read_every_column() -> None:
    """Two that would both be the input: neither is, and leaving them out is what helps."""
    row = {"prompt": "a", "completion": "b", "context": "c", "story": "d"}
    assert remedy(row) == "write data.ignore_columns=[context,story] to leave them out"
    one = {"prompt": "a", "completion": "b", "context": "c"}
    keys = "data.instruction_field=prompt data.input_field=context"
    assert remedy(one).startswith(f"write {keys}")


@pytest.mark.parametrize(
    "name", ['my "text"', "back\\slash", "trailing ", "a,b", "größe", "x: y", 'both\\"', "end\\", 'two\\\\"']
)
def test_names_with_any_character_work_as_they_are_told(name: str) -> None:
    row = {name: "q", "antwort (1)": "a"}
    words = shlex.split(remedy(row).removeprefix("write "))
    found = canonical_row(row, "row 1", spec_of("data=file", "data.path=x.jsonl", *words).data, "sft")
    assert found.prompt == [{"role": "user", "content": "q"}] and found.completion[0]["content"] == "a"


def test_a_null_is_missed_where_the_objective_looks_for_it() -> None:
    assert detect_format({"prompt": None}, spec(), "prompts") == "prompts"


TICKETS = """
from runner.data.user_formats import RowFormat


class Tickets(RowFormat):
    def convert(self, row):
        if "worse" in row:
            return {"prompt": row["ticket"], "chosen": row["reply"], "rejected": row["worse"]}
        return {"prompt": row["ticket"], "completion": row["reply"]}
"""


def test_a_format_of_ones_own_is_read_as_what_it_makes(tmp_path: Path) -> None:
    (tmp_path / "tickets.py").write_text(TICKETS, "utf-8")
    own = {"format": f"{tmp_path / 'tickets.py'}:Tickets"}
    row = {"ticket": "2 + 2?", "reply": "4", "id": 7}
    found = made(row, "sft", **own)
    assert found.prompt == [USER] and found.completion == [ANSWER] and found.where == "row 1"
    pair = made({**row, "worse": "5"}, "preference", **own)
    assert isinstance(pair, Preference) and pair.rejected == [WORSE]
    assert isinstance(made({**row, "worse": "5"}, "prompts", **own), PromptExample)
    assert left_out(row, spec(**own), own["format"]) == []  # it was given all of them
    with pytest.raises(RequestError) as caught:
        made({**row, "reply": 4.5, "ticket": None}, "sft", **own)
    assert [(p.source, p.remedy) for p in caught.value.problems] == [
        ("row 1", "correct Tickets.convert, or the row")
    ] * len(caught.value.problems)
    assert all(p.what.startswith("as Tickets converts it: ") for p in caught.value.problems)
