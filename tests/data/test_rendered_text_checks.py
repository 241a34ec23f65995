"""Everything that a learned turn says is in what is learned, in any template, or the row is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from runner.data.chat_template import named_templates, template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Example, Preference, Turn, UnpairedExample
from runner.data.tokenize_rows import PreferenceSettings, encode_preferences
from runner.errors import RequestError
from tests.conftest import spec_of
from tests.data.test_loss_mask import ENDS, OF_TRL, SPECIAL, body, learned_pieces, whole
from tests.support.rows import canonical_row
from tests.support.rows import user as asks

__all__ = ["body"]  # a fixture

TRLS = sorted(file.stem for file in OF_TRL.glob("*.jinja") if "training" not in file.stem)


ANALYSIS = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"


def words_of(body: str, name: str) -> ChatTokenizer:
    """A template of ours by its name, or TRL's copy of one on the Hub."""
    ours = named_templates().get(name.removeprefix("our "))
    return ChatTokenizer(body, (ours or OF_TRL / f"{name}.jinja").read_text("utf-8"), SPECIAL)


def call(function: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "call12345", "function": {"name": function, "arguments": arguments}}


def says(content: str, thoughts: str = "", calls: tuple[Any, ...] = ()) -> Turn:
    turn: Turn = {"role": "assistant", "content": content}
    if thoughts:
        turn["reasoning_content"] = thoughts
    if calls:
        turn["tool_calls"] = list(calls)
    return turn


SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Look.", "parameters": SCHEMA}}]
OSLO = call("look_up", city="Oslo", count=48151)
HARD = call("look_up", city='Zürich "7"\n<x> & y', count=16234, flag=True, deep={"list": [1.25, "é"]})
RESULT: Turn = {"role": "tool", "content": "result-77", "name": "look_up", "tool_call_id": "call12345"}

CASES: dict[str, tuple[list[Turn], list[str]]] = {
    "a call": ([asks("q"), says("", calls=(OSLO,))], ["look_up", "city", "Oslo", "48151"]),
    "a hard call": ([asks("q"), says("", calls=(HARD,))], ["look_up", "rich", "16234", "flag", "deep", "1.25"]),
    "two calls": ([asks("q"), says("", calls=(OSLO, call("look_up", city="Bern")))], ["Oslo", "48151", "Bern"]),
    "words and a call": ([asks("q"), says("I look.", calls=(OSLO,))], ["I look.", "Oslo"]),
    "thoughts": ([asks("q"), says("final words", "deep thought")], ["deep thought", "final words"]),
    "thoughts inside": ([asks("q"), says("<think>\ndeep thought\n</think>\n\nfinal words")], ["deep thought"]),
    "a call and its result": (
        [asks("q"), says("", calls=(OSLO,)), RESULT, says("final words")],
        ["Oslo", "final words"],
    ),
}


@pytest.mark.parametrize("name", [*TRLS, *(f"our {name}" for name in named_templates())])
def test_what_a_turn_says_is_learned_or_the_row_is_refused(name: str, body: str) -> None:
    """And of a tool's result nothing, whatever the template does with it."""
    words = words_of(body, name)
    for case, (turns, parts) in CASES.items():
        try:
            encoded = words.encode(whole(turns), "auto")
        except RequestError:
            continue
        said = "".join(learned_pieces(words, encoded))
        assert encoded.num_dropped or all(part in said for part in parts), (case, said)
        assert "result-77" not in said, (case, said)


SHOWS_CALLS = {"qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "gemma4_v5", "deepseekv3",
               "nemotron_3_nano", "lfm2_2_5", "our qwen"}  # fmt: skip
SHOWS_THOUGHTS = {"qwen3", "qwen3_5_think", "gptoss", "glm4moe", "gemma4_v5", "lfm2_2_5", "nemotron_3_nano",
                  "our deepseek"}  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted({*SHOWS_CALLS, *SHOWS_THOUGHTS, "llama3", "gemma", *(f"our {n}" for n in named_templates())})
)
def test_templates_that_show_calls_and_thoughts_are_not_refused(name: str, body: str) -> None:
    words = words_of(body, name)
    shown = {"a call": SHOWS_CALLS, "a hard call": SHOWS_CALLS, "thoughts": SHOWS_THOUGHTS}
    for case, names in shown.items():
        if name in names:
            assert words.encode(whole(CASES[case][0]), "auto").num_dropped == 0
            continue
        what = "reasoning" if case == "thoughts" else "tool calls"
        with pytest.raises(RequestError, match=f"the chat template does not show the {what} of turn 2"):
            words.encode(whole(CASES[case][0]), "auto")


@pytest.mark.parametrize("name", ["our llama3", "demo"])
def test_a_turn_that_is_only_a_call_is_refused_where_the_template_shows_none(name: str, body: str) -> None:
    """However it is learned: as a conversation, a pair, a preference, an answer with a label."""
    if name == "demo":
        from transformers import AutoTokenizer

        from runner.train import model_loading

        words = ChatTokenizer.of(AutoTokenizer.from_pretrained(model_loading.source_of(spec_of().model)))
    else:
        words = words_of(body, name)
    turns = CASES["a call"][0]
    for loss_on in ("auto", "completion", "last", "all", "assistant"):
        for row in (whole(turns), Example(turns[:1], turns[1:])):
            with pytest.raises(RequestError, match="does not show the tool calls of turn 2") as caught:
                words.encode(row, loss_on)
            assert "data.chat_template" in str(caught.value.problems[0].remedy)
    for row in (Preference(turns[:1], turns[1:], [says("no")]), UnpairedExample(turns[:1], turns[1:], True)):
        assert (
            "does not show the tool calls"
            in encode_preferences(words, [row], PreferenceSettings(1000)).problems[0].what
        )


def test_thoughts_go_by_the_name_that_the_template_reads(body: str) -> None:
    analysis = ANALYSIS.format("deep thought")
    for key in ("thinking", "reasoning", "reasoning_content"):
        row = {"messages": [asks("q"), {"role": "assistant", "content": "final words", key: "deep thought"}]}
        example = canonical_row(row, "row 1", spec_of("data=file", "data.path=x.jsonl").data)
        words = words_of(body, "gptoss")
        assert learned_pieces(words, words.encode(example, "auto")) == [f"{analysis}final words<|return|>"]
        words = words_of(body, "qwen3")
        thought = "<think>\ndeep thought\n</think>\n\nfinal words<|im_end|>"
        assert learned_pieces(words, words.encode(example, "auto")) == [thought]


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("qwen3", "<think>\nlate thought\n</think>\n\nlate words<|im_end|>"),
        ("our deepseek", "late thought\n</think>\nlate words<｜end▁of▁sentence｜>"),
        ("gptoss", f"{ANALYSIS.format('late thought')}late words<|return|>"),
    ],
)
def test_an_earlier_answer_whose_thoughts_are_dropped_is_not_learned_without_them(
    name: str, learned: str, body: str
) -> None:
    turns = [asks("1"), says("early words", "early thought"), asks("2"), says("late words", "late thought")]
    words = words_of(body, name)
    encoded = words.encode(whole(turns), "auto")
    assert (learned_pieces(words, encoded), encoded.num_dropped) == ([learned], 1)
    assert "early words" in encoded.text and "early thought" not in encoded.text
    everything = words.encode(whole(turns), "all")
    said = "".join(learned_pieces(words, everything))
    assert everything.num_dropped == 1 and "early words" not in said and "late thought" in said
    plain = [asks("1"), says("early words"), asks("2"), says("late words", "late thought")]
    encoded = words.encode(whole(plain), "auto")  # nothing is dropped of it
    assert encoded.num_dropped == 0 and "early words" in learned_pieces(words, encoded)[0]


GEMMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}<start_function_response>{{ m.name }}{value:{{ m.content }}}<end_function_response>"
    "{% else %}{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}"
    "{% if loop.last or messages[loop.index].role != 'tool' %}<end_of_turn>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<start_of_turn>model\n{% endif %}"
)


def test_what_a_tool_answers_inside_the_assistants_turn_is_not_learned(body: str) -> None:
    words = ChatTokenizer(body, GEMMA_LIKE, SPECIAL)
    turns = CASES["a call and its result"][0]
    call_piece, answer = learned_pieces(words, words.encode(whole(turns), "auto"))
    assert call_piece == '<call>look_up{"city": "Oslo", "count": 48151}</call>'
    assert answer == "final words<end_of_turn>"
    words = words_of(body, "gemma4_v5")
    call_piece, answer = learned_pieces(words, words.encode(whole(turns), "auto"))
    assert call_piece == '<|tool_call>call:look_up{city:<|"|>Oslo<|"|>,count:48151}<tool_call|><|tool_response>'
    assert answer == "final words<turn|>"


def test_several_calls_in_one_list_are_several_calls() -> None:
    """ShareGPT's, OpenAI's old and new forms, as lists and as text."""
    spec = spec_of("data=file", "data.path=x.jsonl").data
    calls = [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]
    text = '[{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": "{}"}]'
    for turn in (
        {"from": "function_call", "value": text},
        {"from": "function_call", "value": calls},
        {"from": "gpt", "value": None, "tool_calls": text},
        {"role": "assistant", "content": "", "tool_calls": [{"function": one} for one in calls]},
    ):
        row = {"messages": [{"role": "user", "content": "?"}, turn]}
        (said,) = canonical_row(row, "row 1", spec).completion
        assert [one["function"] for one in said["tool_calls"]] == calls, turn
    row = {"messages": [asks("?"), {"role": "assistant", "content": None, "function_call": calls[0]}]}
    (said,) = canonical_row(row, "row 1", spec).completion
    assert [one["function"] for one in said["tool_calls"]] == calls[:1]
    for wrong in ('[{"name": "a"}, 7]', "look it up", '{"name": "a", "arguments": [1]}'):
        with pytest.raises(RequestError, match="is no call of a function"):
            canonical_row({"messages": [asks("?"), {"from": "function_call", "value": wrong}]}, "row 1", spec)


def test_what_the_model_is_given_is_shown_or_the_row_is_refused(body: str) -> None:
    mute = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    system: Turn = {"role": "system", "content": "Be brief."}
    words = ChatTokenizer(body, mute, SPECIAL)
    with pytest.raises(RequestError, match="does not show turn 1, of the role system"):
        words.encode(whole([system, asks("q"), says("a")]), "auto")
    with pytest.raises(RequestError, match="does not show the row's tools"):
        words.encode(whole([asks("q"), says("a")], tools=TOOLS), "auto")
    words = ChatTokenizer(body, template_source("qwen"), SPECIAL)
    assert "look_up" in words.encode(whole([system, asks("q"), says("a")], tools=TOOLS), "auto").text
    assert ENDS["qwen"] in words.encode(whole([asks("q"), says("a")]), "auto").text


@pytest.mark.parametrize("end", ["", "\n", "  \n"])
def test_a_template_for_tools_is_taken_where_there_are_tools(body: str, end: str) -> None:
    """As transformers does of the two that some models have (Hermes, Command R): character for character."""
    default = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}" + end
    tool_use = "\n  {%- for t in tools %}{{ t.function.name }}{% endfor %}\n{{ messages[-1].content }}!" + end
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(body), **SPECIAL)
    tokenizer.chat_template = {"default": default, "tool_use": tool_use}
    words = ChatTokenizer.of(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for tools in ([], TOOLS):
        right = tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False)
        assert words.turns.template.render(turns, tools=tools).text == right


def test_words_that_are_in_the_text_by_chance_are_not_shown(body: str) -> None:
    """gpt-oss's template takes the first of two system turns alone, and `d` stands in many words."""
    words = words_of(body, "gptoss")
    turns: list[Turn] = [{"role": "system", "content": "s"}, {"role": "system", "content": "d"}, asks("q"), says("a")]
    with pytest.raises(RequestError, match="does not show turn 2, of the role system"):
        words.encode(whole(turns), "auto")
    assert words.encode(whole([turns[0], *turns[2:]]), "auto").num_dropped == 0


def test_thoughts_of_a_turn_have_many_names() -> None:
    spec = spec_of("data=file", "data.path=x.jsonl").data
    for key in ("thinking", "reasoning", "thought", "cot", "analysis"):
        example = canonical_row({"messages": [asks("q"), {**says("a"), key: "deep"}]}, "row 1", spec)
        assert example.completion == [says("a", "deep")]


def test_a_tool_is_shown_as_the_model_knows_tools(body: str) -> None:
    """ShareGPT, xLAM and OpenAI's newer interface write the function alone; several templates refuse that."""
    spec = spec_of("data=file", "data.path=x.jsonl").data
    function = TOOLS[0]["function"]
    for tool in (TOOLS[0], function, {"type": "function", **function}):
        example = canonical_row({"messages": [asks("q"), says("a")], "tools": [tool]}, "row 1", spec)
        assert example.tools == TOOLS
        for name in ("our qwen", "gptoss", "gemma4_v5", "llama3_1"):
            assert "city" in words_of(body, name).encode(example, "auto").text


def test_a_tool_whose_parameters_are_not_shown_is_refused(body: str) -> None:
    """xLAM's are no JSON schema: gpt-oss's and Gemma 4's templates find nothing in them."""
    loose = {"name": "look_up", "description": "Look.", "parameters": {"city": {"type": "str"}}}
    row = whole([asks("q"), says("a")], tools=[{"type": "function", "function": loose}])
    assert "city" in words_of(body, "our qwen").encode(row, "auto").text
    for name in ("gptoss", "gemma4_v5"):
        with pytest.raises(RequestError, match="does not show 'city' of the row's tools"):
            words_of(body, name).encode(row, "auto")
