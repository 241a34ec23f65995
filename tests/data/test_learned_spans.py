"""Which characters of a conversation are learned: by turn, template and `objective.loss_on`; no tokenizer is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from runner.data.chat_template import Template, template_source
from runner.data.examples import Example, Turn
from runner.data.loss_mask import (
    IGNORED,
    TurnFinder,
    _whole_tags,
    _without,
    common_prefix_length,
    labels_of,
    learned_spans,
)
from runner.errors import RequestError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
OF_TRL = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}",
)
THINKS = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}",
)
"""Shows thoughts in the last turn only, as Qwen3's and DeepSeek's templates do."""


def asks(content: str) -> Turn:
    return {"role": "user", "content": content}


def says(content: str, **more: Any) -> Turn:
    turn: Any = {"role": "assistant", "content": content, **more}
    return turn


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str) -> Turn:
    turn: Any = {"role": "tool", "content": content, "name": "add"}
    return turn


def talk(*turns: Turn, dialogue: bool = True, **more: Any) -> Example:
    """A conversation, its prompt everything up to the last turn that is not the assistant's."""
    cut = max(index for index, turn in enumerate(turns, 1) if turn["role"] != "assistant")
    return Example([*turns[:cut]], [*turns[cut:]], dialogue=dialogue, **more)


def of(source: str) -> TurnFinder:
    return TurnFinder(Template(source, SPECIAL))


def learned(source: str, example: Example, loss_on: str = "auto") -> list[str]:
    """The text of every learned piece; asserts nothing was dropped."""
    pieces, dropped = with_dropped(source, example, loss_on)
    assert dropped == 0
    return pieces


def with_dropped(source: str, example: Example, loss_on: str = "auto") -> tuple[list[str], int]:
    finder = of(source)
    rendered = finder.template.render([*example.prompt, *example.completion], tools=example.tools)
    found = learned_spans(example, loss_on, rendered.text, rendered.marks, finder)
    return [rendered.text[begin:end] for begin, end in found.spans], found.num_dropped


# --- the pieces of it ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [("", "", 0), ("abc", "abd", 2), ("abc", "ab", 2), ("x", "y", 0), ("abc", "abc", 3), ("abcd", "abxd", 2)],
)
def test_common_prefixes(one: str, other: str, length: int) -> None:
    assert common_prefix_length(one, other) == common_prefix_length(other, one) == length


@pytest.mark.parametrize(
    ("text", "end", "begin"),
    [
        ("ab<th|ink>", 5, 2),  # within a tag: where it begins
        ("<b>cd", 4, 4),  # behind one
        ("<b>cd<e", 7, 5),
        ("<b>", 3, 3),
        ("<b>", 2, 0),
        ("abc", 2, 2),
        ("a<b", 1, 1),  # the tag begins behind the end
        ("a>b<c", 5, 3),
    ],
)
def test_a_tag_is_not_cut_in_two(text: str, end: int, begin: int) -> None:
    assert _whole_tags(text, end) == begin


@pytest.mark.parametrize(
    ("silent", "spans"),
    [([], [(0, 9)]), ([(2, 4)], [(0, 2), (4, 9)]), ([(0, 4), (6, 9)], [(4, 6)]), ([(0, 9)], []),
     ([(2, 4), (4, 5)], [(0, 2), (5, 9)])],
)  # fmt: skip
def test_all_but_some(silent: list[tuple[int, int]], spans: list[tuple[int, int]]) -> None:
    assert _without(silent, 9) == spans


OFFSETS = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 8), (8, 9)]


@pytest.mark.parametrize(
    ("spans", "learns"),
    [
        ([], []),
        ([(0, 9)], [0, 1, 2, 3, 4, 5]),
        ([(2, 4)], [1]),
        ([(3, 5)], [1, 2]),  # a token is learned for any one of its characters
        ([(4, 4)], []),
        ([(1, 2), (7, 9)], [0, 3, 4, 5]),
        ([(7, 9), (1, 2)], [0, 3, 4, 5]),  # in any order
        ([(2, 3), (3, 4)], [1]),  # two spans of one token
        ([(0, 1), (2, 3), (4, 5)], [0, 1, 2]),
        ([(9, 12)], []),
    ],
)
def test_a_token_is_learned_with_any_character_of_a_span(spans: list[tuple[int, int]], learns: list[int]) -> None:
    ids = [10, 11, 12, 13, 14, 15]
    assert labels_of(ids, OFFSETS, spans) == [10 + i if i in learns else IGNORED for i in range(6)]
    assert IGNORED == -100  # torch.nn.functional.cross_entropy's ignore_index


# --- the frame of a turn -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "closing", "opening"),
    [
        (CHATML, "<|im_end|>", "<|im_start|>assistant\n"),
        ((OF_TRL / "phi3.jinja").read_text("utf-8"), "<|end|>", "<|assistant|>\n"),  # "</s>" where nothing asks
        (template_source("gemma"), "<end_of_turn>", "<start_of_turn>model\n"),
        ("{{ raise_exception('no') }}", "", ""),
        ("{% if messages | length == 1 %}{{ raise_exception('no') }}{% endif %}" + CHATML, "", ""),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "", ""),  # nothing follows an answer and nothing asks
        ("{% for m in messages %}{{ m.content if m.role == 'user' }}|{% endfor %}", "", ""),  # shows no answer
        # <thi> and <tha> behind an answer have three characters in common, which are half a tag.
        ("{% for m in messages %}{{ m.content }}<e>{{ '<tha>' if loop.last else '<thi>' }}{% endfor %}", "<e>", ""),
    ],
)  # fmt: skip
def test_what_asks_for_an_answer_and_what_ends_one(source: str, closing: str, opening: str) -> None:
    finder = of(source)
    assert (finder.closing, finder.opening) == (closing, opening)


# --- every answer, whole, and nothing else -------------------------------------------------------

ENDS = {
    "chatml": "</s>", "llama2": " </s>", "llama3": "<|eot_id|>", "mistral": "</s>", "zephyr": "</s>", "phi3": "<|end|>",
    "gemma": "<end_of_turn>", "qwen": "<|im_end|>", "deepseek": "<｜end▁of▁sentence｜>",
}  # fmt: skip
ANSWERS = (
    ["4"], ["4", "5"], ["a", "a", "aa"], ["?", "? ?"], ["yes</b>", "<b>no"], ["one\ntwo", "three\n\nfour"],
    ["user", "assistant", "a"],
)  # fmt: skip


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_every_answer_with_its_end_is_learned(name: str, system: bool) -> None:
    for answers in ANSWERS:
        turns: list[Turn] = [{"role": "system", "content": "Be brief."}] if system else []
        for answer in answers:
            turns += [asks("?"), says(answer)]
        source, space = template_source(name), " " if name in ("llama2", "mistral") else ""
        said = [f"{space}{answer}{ENDS[name]}" for answer in answers]
        for loss_on in ("auto", "assistant"):
            assert [piece.rstrip("\n") for piece in learned(source, talk(*turns), loss_on)] == said
        assert [piece.rstrip("\n") for piece in learned(source, talk(*turns), "last")] == said[-1:]


def test_what_a_template_trims_is_not_learned() -> None:
    trims = CHATML.replace("m.content", "m.content | trim")
    assert learned(trims, talk(asks("a"), says(" b "), asks("c"), says("\nd"))) == ["b<|im_end|>", "d<|im_end|>"]
    assert learned(CHATML, talk(asks("a"), says(" b "), asks("c"), says("\nd"))) == [" b <|im_end|>", "\nd<|im_end|>"]


def test_turns_that_say_the_same_are_each_found() -> None:
    source = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{{ 'a:' if add_generation_prompt }}"
    assert learned(source, talk(asks("a:a;"), says("a:a;"), asks("a:a;"), says("a:a;"))) == ["a:a;;", "a:a;;"]


def test_marks_of_the_template_are_taken_where_there_is_one_for_each_turn() -> None:
    marked = CHATML.replace("{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}")  # fmt: skip
    both = talk(asks("a"), says("b"), asks("c"), says("d"))
    assert learned(marked, both) == ["b", "d"]
    assert learned(marked, both, "last") == ["d"]
    assert learned(marked, talk(asks("a"), says("b"), dialogue=False)) == ["b"]  # also of a pair
    first = marked.replace("m.role == 'assistant'", "m.role == 'assistant' and not loop.last")
    assert learned(first, both) == ["b<|im_end|>", "d<|im_end|>"]  # one mark for two turns says nothing


def test_a_template_that_asks_in_other_words_is_understood() -> None:
    """What asks (`<a>`) is not what stands before an answer: the turn begins where its own words do."""
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ '<a>' if add_generation_prompt }}"
    assert learned(source, talk(asks("x"), says("y"), asks("z"), says("a")))[0].endswith("y</>")
    assert "x" not in "".join(learned(source, talk(asks("x"), says("y"), asks("z"), says("w"))))


# --- objective.loss_on ---------------------------------------------------------------------------


def test_a_pair_is_learned_from_where_the_prompt_asks_to_the_end() -> None:
    """As TRL's completion mask; with a dialogue every answer is."""
    few = (asks("1"), says("one"), asks("2"), says("two"))
    end = "two<|im_end|>\n"
    assert learned(CHATML, talk(*few, dialogue=False)) == [end]
    for loss_on, pieces in (
        ("completion", [end]), ("last", ["two<|im_end|>"]), ("assistant", ["one<|im_end|>", "two<|im_end|>"]),
    ):  # fmt: skip
        assert learned(CHATML, talk(*few, dialogue=False), loss_on) == pieces
    assert learned(CHATML, talk(*few), "completion") == [end]
    assert learned(CHATML, talk(*few), "auto") == ["one<|im_end|>", "two<|im_end|>"]
    several = Example([asks("1")], [says("a"), says("b")])
    assert learned(CHATML, several) == ["a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"]


def test_a_pair_whose_completion_holds_a_tool_is_learned_by_turns() -> None:
    pair = Example([asks("1 + 1")], [says("", tool_calls=[call("add", a=1)]), result("2"), says("two")])
    assert learned(CALLS, pair) == ['<call>add{"a": 1}</call><|im_end|>', "two<|im_end|>"]
    prompt = Example([asks("0"), says("none"), asks("1 + 1")], pair.completion)
    assert learned(CALLS, prompt) == ['<call>add{"a": 1}</call><|im_end|>', "two<|im_end|>"]
    assert learned(CALLS, prompt, "assistant")[0] == "none<|im_end|>"


def test_a_pairs_answer_that_begins_like_what_asks_is_learned_from_its_beginning() -> None:
    """The template asks with `<a><think>`, which is not in the text of an answer that begins with `<th`."""
    source = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</>{% endfor %}"
        "{{ '<a><think>' if add_generation_prompt }}"
    )
    assert learned(source, talk(asks("x"), says("<thin air"), dialogue=False)) == ["<thin air</>"]
    assert learned(source, talk(asks("x"), says("y"), dialogue=False)) == ["y</>"]


def test_all_is_the_whole_text_but_for_what_weighs_nothing() -> None:
    text = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
    assert learned(CHATML, talk(asks("1"), says("one")), "all") == [text]
    silent = talk(asks("1"), says("one", weight=0), asks("2"), says("two"))
    assert learned(CHATML, silent, "all") == [
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n",
    ]
    for loss_on in ("auto", "assistant", "last"):
        assert learned(CHATML, silent, loss_on) == ["two<|im_end|>"]
    first = talk(asks("1"), says("one"), asks("2"), says("two", weight=0))
    assert learned(CHATML, first) == ["one<|im_end|>"] and learned(CHATML, first, "last") == []
    pair = talk(asks("1"), says("one"), asks("2"), says("two", weight=0), dialogue=False)
    assert learned(CHATML, pair) == []
    assert learned(CHATML, talk(asks("1"), says("one", weight=1), dialogue=False)) == ["one<|im_end|>\n"]


# --- thoughts that are dropped, turns that are not shown -----------------------------------------

DROPS = talk(asks("1"), says("one", reasoning_content="hm"), asks("2"), says("two", reasoning_content="so"))
LAST = "<think>so</think>two<|im_end|>"


def test_an_answer_without_its_thoughts_is_not_learned_and_counted() -> None:
    assert with_dropped(THINKS, DROPS) == ([LAST], 1)
    pieces, dropped = with_dropped(THINKS, DROPS, "all")
    assert dropped == 1 and "one" not in "".join(pieces) and "".join(pieces).endswith(LAST + "\n")
    assert pieces[0] == "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
    assert with_dropped(THINKS, DROPS, "last") == ([LAST], 0)
    pair = Example(DROPS.prompt, DROPS.completion)
    assert with_dropped(THINKS, pair) == ([LAST + "\n"], 0)
    assert with_dropped(THINKS, pair, "completion") == ([LAST + "\n"], 0)
    plain = talk(asks("1"), says("one"), asks("2"), says("two", reasoning_content="so"))
    assert with_dropped(THINKS, plain) == (["one<|im_end|>", LAST], 0)


def test_what_no_template_shows_is_an_error() -> None:
    for example, what in (
        (talk(asks("1"), says("one", reasoning_content="hm")), "does not show the reasoning of turn 2"),
        (talk(asks("1"), says("", tool_calls=[call("add", a=1)])), "does not show the tool calls of turn 2"),
    ):
        for loss_on in ("auto", "all", "last"):
            with pytest.raises(RequestError, match=what):
                learned(CHATML, example, loss_on)
    mute = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
    for example in (talk(asks("1"), says("one")), talk(asks("1"), says("one"), dialogue=False)):
        for loss_on in ("auto", "all"):
            with pytest.raises(RequestError) as caught:
                learned(mute, example, loss_on)
            (problem,) = caught.value.problems
            assert problem.what == "the chat template does not show which words of turn 2 are the assistant's"
            assert "{% generation %}" in str(problem.remedy) and "objective.loss_on=all" in str(problem.remedy)
    with pytest.raises(RequestError, match="which words of turn 2"):
        learned(mute, talk(asks("the same words"), says("the same words")))  # these are the question's
    first = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last }}")
    with pytest.raises(RequestError, match="which words of turn"):
        learned(first, talk(asks("1"), says("one"), asks("2"), says("two")))


def test_turns_that_a_template_puts_in_another_order_are_an_error() -> None:
    backwards = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    with pytest.raises(RequestError, match="does not show which words of turn"):
        learned(backwards, talk(asks("1"), says("one"), asks("2"), says("two")))


# --- templates that rewrite ----------------------------------------------------------------------


def test_a_turn_is_found_where_the_text_before_it_changes_with_what_follows() -> None:
    """The number of turns stands at the beginning: no rendering of a part is a beginning of the whole."""
    counting = "{{ messages | length }}:" + CHATML
    turns = (asks("1"), says("one"), asks("2"), says("two"), asks("3"), says("three"))
    assert learned(counting, talk(*turns)) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    odd = counting.replace("<|im_start|>assistant\n{% endif %}", "{% endif %}")  # and nothing asks
    assert learned(odd, talk(*turns)) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    calls = "{{ messages | length }}:" + CALLS
    called = (asks("1"), says("I add", tool_calls=[call("add", a=1)]), result("2"), says("two"))
    assert learned(calls, talk(*called)) == ['I add<call>add{"a": 1}</call><|im_end|>', "two<|im_end|>"]
    assert learned(calls, talk(asks("1"), says("", tool_calls=[call("add", a=1)]))) == [
        '<call>add{"a": 1}</call><|im_end|>'
    ]
    thinks = "{{ messages | length }}:" + THINKS.replace(" and loop.last", "")
    thought = (asks("1"), says("", reasoning_content="hm"), asks("2"), says("two"))
    assert learned(thinks, talk(*thought)) == ["<think>hm</think><|im_end|>", "two<|im_end|>"]


def test_a_template_that_refuses_half_a_conversation_is_asked_otherwise() -> None:
    """Pairs of turns only: what ends with a question, or has an odd number of turns, is refused."""
    strict = "{% if messages | length % 2 or add_generation_prompt %}{{ raise_exception('odd') }}{% endif %}" + CHATML
    turns = (asks("1"), says("one"), asks("2"), says("two"))
    assert [piece.rstrip("\n") for piece in learned(strict, talk(*turns))] == ["one<|im_end|>", "two<|im_end|>"]


def test_answers_of_tools_inside_the_assistants_turn_are_cut_out() -> None:
    inside = (
        "{% for m in messages %}{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}"
        "{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}<{{ m.role }}>{% endif %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>"
        "{% endfor %}{% if loop.last or messages[loop.index].role != 'tool' %}</end>\n{% endif %}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}<assistant>{% endif %}"
    )
    turns = (asks("1"), says("I add. ", tool_calls=[call("add", a=1)]), result("sum-2"), says("two"))
    assert learned(inside, talk(*turns)) == ['I add. <call>add{"a": 1}</call>', "two</end>"]
    twice = (*turns[:2], result("sum-2"), says("and", tool_calls=[call("add", a=2)]), result("sum-4"), says("four"))
    assert learned(inside, talk(*twice)) == [
        'I add. <call>add{"a": 1}</call>', 'and<call>add{"a": 2}</call>', "four</end>",
    ]  # fmt: skip
    gemma = (OF_TRL / "gemma4_v5.jinja").read_text("utf-8")
    call_piece, answer = learned(gemma, talk(*turns[:1], says("", tool_calls=[call("add", a=1)]), *turns[2:]))
    assert call_piece.startswith("<|tool_call>call:add{a:1}") and "sum-2" not in call_piece
    assert answer == "two<turn|>"
    schema = {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}}
    tool = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": schema}}
    for tools in ([], [tool]):  # it puts what the turn says behind what the tool answers
        pieces = learned(gemma, talk(*turns, tools=tools))
        assert pieces == ["<|tool_call>call:add{a:1}<tool_call|>", "I add.", "two<turn|>"]


def test_answers_of_tools_that_cannot_be_told_apart_are_an_error() -> None:
    """The result stands before the words of the turn that asked for it."""
    mixed = (
        "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{% for t in messages if t.role == 'tool' and "
        "m.tool_calls %}[{{ t.content }}]{% endfor %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}</>{% endfor %}"
        "{{ '<assistant>' if add_generation_prompt }}"
    )
    turns = (asks("1"), says("I add", tool_calls=[call("add", a=1)]), result("sum-2"), says("two"))
    with pytest.raises(RequestError, match="puts what a tool answers inside turn 2") as caught:
        learned(mixed, talk(*turns))
    assert "qwen" in str(caught.value.problems[0].remedy)


# --- each kind of turn beside others -------------------------------------------------------------

RECENT = CALLS.replace("{{ m.content }}", "{% if m.reasoning_content and loop.index0 >= messages | length - 2 %}"
                       "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}", 1)  # fmt: skip
"""Shows thoughts in the last two turns: what stands before a turn changes with it."""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def test_a_turn_that_lost_its_thoughts_is_dropped_behind_one_that_has_all_its_words() -> None:
    dropping = talk(asks("p"), says("a"), asks("q"), says("b", reasoning_content="t"), asks("r"), says("c"))
    assert with_dropped(THINKS, dropping) == (["a<|im_end|>", "c<|im_end|>"], 1)


def test_calls_at_the_end_are_learned_with_their_end_where_the_text_before_them_changes() -> None:
    calls = says("", tool_calls=[call("add", a=1)])
    changing = talk(asks("p"), says("a", reasoning_content="t"), asks("q"), calls)
    assert with_dropped(RECENT, changing) == (['<call>add{"a": 1}</call><|im_end|>'], 1)


def test_tools_that_a_template_shows_first_are_not_learned_with_a_pair() -> None:
    shown = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}" + CHATML
    pair = talk(asks("2 + 2?"), says("4"), dialogue=False, tools=TOOLS)
    assert learned(shown, pair) == ["4<|im_end|>\n"]


def test_what_a_tool_answers_directly_behind_the_end_of_a_turn_is_not_inside_it() -> None:
    bare = CALLS.replace("<|im_end|>\n", "<|im_end|>").replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'tool' %}{{ m.content }}{% continue %}{% endif %}",
    )
    turns = (asks("p"), says("", tool_calls=[call("add", a=1)]), result("7"), says("seven"))
    assert learned(bare, talk(*turns)) == ['<call>add{"a": 1}</call><|im_end|>', "seven<|im_end|>"]
