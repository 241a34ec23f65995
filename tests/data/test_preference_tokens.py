"""Preferences, marked answers and questions as columns: whole, in any number of processes, found again in the cache."""

from __future__ import annotations

import json
import random
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from runner.data.chat_template import template_source
from runner.data.chat_tokenizer import ChatTokenizer
from runner.data.examples import Learnable, Preference, PromptExample, Turn, UnpairedExample
from runner.data.inspect import preview as previewing
from runner.data.load import InspectedFile
from runner.data.tokenize_rows import TOOLS, PreferenceSettings, encode_preferences, in_chunks, split_prompt
from runner.errors import RequestError
from runner.spec import DataSpec, RunSpec
from runner.train.objectives import objective_of
from runner.train.objectives.grpo import GrpoTrainer
from runner.train.trainers.preference_trainer import GivenSpansCollator
from tests.conftest import spec_of
from tests.data.test_loss_mask import SPECIAL, body
from tests.data.test_tokenize_rows import tokenizer
from tests.support.rows import canonical_row, said, user

__all__ = ["body", "tokenizer"]  # fixtures
SEARCH = {
    "type": "function",
    "function": {"name": "search_the_web", "parameters": {"type": "object", "properties": {}}},
}
SEARCH_CALL = {"type": "function", "function": {"name": "search_the_web", "arguments": {"for": "x"}}}


def chat_ids(tokenizer: Any, turns: list[Turn], ask: bool) -> list[int]:
    """By transformers."""
    found: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=ask)["input_ids"]
    return found


def tokenise(rows: list[Any], tokenizer: Any, spec: RunSpec, tell: Any = None) -> Any:
    return objective_of(spec).tokenise(rows, tokenizer, tell)


def preference(n: int) -> Preference:
    return Preference([user(f"{n}? " * (n % 5 + 1))], [said(f"yes {n}")], [said("no " * (n % 4))], where=f"row {n + 1}")


def rows_of(objective: str, count: int) -> list[Learnable]:
    """Rows that the objective learns from."""
    pairs_of = [preference(n) for n in range(count)]
    if objective == "kto":
        return [UnpairedExample(row.prompt, row.chosen, n % 2 == 0) for n, row in enumerate(pairs_of)]
    if objective == "grpo":
        return [PromptExample(row.prompt, str(n), {"level": n}) for n, row in enumerate(pairs_of)]
    return list(pairs_of)


def spec(objective: str = "dpo", *overrides: str) -> RunSpec:
    words = ["train.batch_size=8", "train.micro_batch_size=4", "data=file", "data.path=x.jsonl"]
    generated = ["objective.max_new_tokens=8"] if objective == "grpo" else []
    return spec_of(f"objective={objective}", "train.max_length=64", *words, *generated, *overrides)


def test_several_processes_give_what_one_does(body: str) -> None:
    words, rows = ChatTokenizer(body, template_source("chatml"), SPECIAL), rows_of("dpo", 2500)
    one, two = (
        list(in_chunks(partial(encode_preferences, settings=PreferenceSettings(64)), words, rows, count))
        for count in (1, 2)
    )
    assert [chunk.rows for chunk in one] == [chunk.rows for chunk in two]
    assert sum(chunk.examples for chunk in two) == 2500


def test_prompt_and_answer_together_are_the_conversation(tokenizer: Any) -> None:
    words = ChatTokenizer.of(tokenizer)
    for row in map(preference, range(20)):
        prompt, (right, wrong) = split_prompt(words, row.prompt, (row.chosen, row.rejected))
        assert prompt + right == chat_ids(tokenizer, [*row.prompt, *row.chosen], ask=False)
        assert prompt + wrong == chat_ids(tokenizer, [*row.prompt, *row.rejected], ask=False)


def test_text_is_ended_once(tokenizer: Any) -> None:
    words, end = ChatTokenizer.of(tokenizer), tokenizer.eos_token
    prompt, (right, wrong) = split_prompt(words, "2+2? ", ("4", f"5{end}"))
    assert prompt + right == tokenizer(f"2+2? 4{end}")["input_ids"]
    assert prompt + wrong == tokenizer(f"2+2? 5{end}")["input_ids"]


@pytest.mark.parametrize("kind", [Preference, UnpairedExample])
def test_tools_are_shown_to_the_model(kind: type, body: str) -> None:
    """As TRL does; the template decides settings."""
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + template_source("chatml")
    words, row = ChatTokenizer(body, template, SPECIAL), preference(1)
    if kind is UnpairedExample:
        given: Any = UnpairedExample(row.prompt, row.chosen, True, tools=[SEARCH])
    else:
        given = Preference(row.prompt, row.chosen, row.rejected, tools=[SEARCH])
    (columns,) = encode_preferences(words, [given], PreferenceSettings(4000)).rows
    assert "search_the_web" in words.backend.decode(columns["prompt_ids"])


@pytest.mark.parametrize("objective", ["dpo", "orpo", "reward", "kto", "grpo"])
def test_a_question_and_its_system_prompt_are_in_what_is_trained(objective: str, tokenizer: Any) -> None:
    row: dict[str, Any] = {"question": "2+2?", "system": "Be brief.", "chosen": "It is 4.", "rejected": "It is 5."}
    row |= {"completion": "It is 4.", "label": True} if objective == "kto" else {}
    kind = spec(objective).objective.learns_from
    if objective == "kto":
        del row["chosen"], row["rejected"]
    (found,) = tokenise([canonical_row(row, "row 1", DataSpec(path="x"), kind)], tokenizer, spec(objective)).rows
    turns: list[Turn] = [{"role": "system", "content": "Be brief."}, user("2+2?")]
    asked = chat_ids(tokenizer, turns, ask=True)
    good, bad = (chat_ids(tokenizer, [*turns, said(text)], ask=False) for text in ("It is 4.", "It is 5."))
    if objective == "grpo":
        assert found["prompt"] == turns and found["chosen"] == "It is 4."
    elif objective == "kto":
        assert (found["prompt_ids"], found["prompt_ids"] + found["completion_ids"]) == (asked, good)
    elif objective == "reward":
        assert (found["chosen_ids"], found["rejected_ids"]) == (good, bad)
    else:
        prompt = found["prompt_ids"]
        assert (prompt, prompt + found["chosen_ids"], prompt + found["rejected_ids"]) == (asked, good, bad)


@pytest.mark.parametrize("objective", ["dpo", "reward", "kto"])
def test_a_preview_shows_the_tokens_that_are_learned(
    objective: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of answers with several turns, too: what others say between them is given, but for a reward model, which judges
    the whole."""
    tokenizer.save_pretrained(tmp_path)
    kind: Learnable = Preference([user("a?")], [said("b"), user("c?"), said("d")], [said("e")], where="row 1")
    if objective == "kto":
        kind = UnpairedExample([user("a?")], [said("b"), user("c?"), said("d")], True, where="row 1")
    found = InspectedFile("x", "preference", [kind], [], [])
    monkeypatch.setattr(previewing, "inspect_files", lambda *_: ([found], []))
    (shown,) = previewing.preview(spec(objective, "model=hub", f"model.id={tmp_path}"))["rows"]
    (trained,) = tokenise([kind], tokenizer, spec(objective)).rows
    decode = tokenizer.backend_tokenizer.decode
    for name in ("completion",) if objective == "kto" else ("chosen", "rejected"):
        pieces = [piece for piece in shown["segments"] if piece.get("part", "completion") == name]
        several = "c?" in "".join(piece["text"] for piece in pieces) and objective != "reward"
        assert [piece["trained"] for piece in pieces] == [False, True] * (1 + several)
        ids = trained.get("prompt_ids", []) + trained[f"{name}_ids"]
        assert "".join(piece["text"] for piece in pieces) == decode(ids, skip_special_tokens=False)
        assert sum(piece["tokens"] for piece in pieces) == len(ids)
        if "prompt_ids" in trained:
            edges = [0, *trained[f"{name}_given"], len(trained[f"{name}_ids"])]
            sizes = [end - begin for begin, end in pairwise(edges)]
            assert [piece["tokens"] for piece in pieces] == [len(trained["prompt_ids"]), *sizes]
    between = shown["segments"][1 if objective == "reward" else 2]["text"]
    assert "c?" in between and (objective == "reward" or not {"b", "d"} & set(between.split("c?")))


RESULT: Turn = {"role": "tool", "content": "RESULT"}


@pytest.mark.parametrize("between", [user("c?"), RESULT], ids=["user", "tool"])
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_what_others_say_inside_an_answer_is_given_and_not_learned(
    objective: str, between: Turn, tokenizer: Any
) -> None:
    first: Turn = {**said(""), "tool_calls": [SEARCH_CALL]} if between is RESULT else said("b")
    answer = [first, between, said("d")]
    row: Learnable = Preference([user("a?")], [said("e")], answer)
    name = "rejected"
    if objective == "kto":
        row, name = UnpairedExample([user("a?")], answer, True), "completion"
    tokenizer.chat_template = template_source("qwen")
    (found,) = tokenise([row], tokenizer, spec(objective)).rows
    begin, end = found[f"{name}_given"]
    ids, decode = found[f"{name}_ids"], tokenizer.decode
    assert decode(ids[end:]) == "d<|im_end|>\n" and decode(ids[:begin]).endswith("<|im_end|>")
    inside = between["content"] if between is not RESULT else "<tool_response>\nRESULT\n</tool_response>"
    assert decode(ids[begin:end]) == f"\n<|im_start|>user\n{inside}<|im_end|>\n<|im_start|>assistant\n"
    if objective != "kto":
        assert found["chosen_given"] == []
    if objective == "orpo":
        return
    collator: Any = {"dpo": DataCollatorForPreference, "kto": DataCollatorForUnpairedPreference}[objective]
    batch = GivenSpansCollator(collator(pad_token_id=0))([found])
    learned = batch["input_ids"][-1][batch["completion_mask"][-1].bool()]
    assert learned.tolist() == ids[:begin] + ids[end:]


def test_a_question_is_asked_with_its_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = template_source("qwen")
    row: dict[str, Any] = {"prompt": "Wie wird das Wetter?", "tools": json.dumps([SEARCH]), "answer": "7"}
    question = canonical_row(row, "row 1", DataSpec(path="x"), "prompts")
    assert question == PromptExample([user("Wie wird das Wetter?")], "7", {"tools": row["tools"]}, [SEARCH])
    (found,) = tokenise([question], tokenizer, spec("grpo", "train.max_length=999")).rows
    assert found[TOOLS] == [SEARCH] and found["tools"] == row["tools"]  # the text is the reward functions'
    trainer = GrpoTrainer.__new__(GrpoTrainer)
    trainer.processing_class, trainer.row_tools = tokenizer, [found[TOOLS], None]
    ids, *_ = trainer._tokenize_prompts([found["prompt"], found["prompt"]])
    with_tools, without = (tokenizer.decode(one) for one in ids)
    assert '"name": "search_the_web"' in with_tools and "search_the_web" not in without
    assert with_tools.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "reward", "grpo"])
def test_the_second_time_comes_from_the_cache(objective: str, tokenizer: Any) -> None:
    rows = rows_of(objective, 30)
    told: list[tuple[int, int]] = []
    first = tokenise(rows, tokenizer, spec(objective), lambda *done: told.append(done))
    again = tokenise(rows, tokenizer, spec(objective))
    assert (first.from_cache, again.from_cache) == (False, True) and told == [(30, 30)]
    assert first.rows[:] == again.rows[:] and first.num_tokens == again.num_tokens > 0
    assert len(first.rows) + first.num_dropped == first.num_examples == 30
    changes = [
        tokenise(rows[:-1], tokenizer, spec(objective)),
        tokenise(rows, tokenizer, spec(objective, "train.max_length=60")),
    ]
    assert not any(found.from_cache for found in changes)
    tokenizer.chat_template = template_source("zephyr")
    assert not tokenise(rows, tokenizer, spec(objective)).from_cache


def test_a_reward_takes_other_columns_than_a_preference(tokenizer: Any) -> None:
    rows = rows_of("dpo", 5)
    preferences, rewards = (tokenise(rows, tokenizer, spec(name)) for name in ("dpo", "reward"))
    assert not rewards.from_cache
    for pair, whole in zip(preferences.rows, rewards.rows, strict=True):
        assert whole["chosen_ids"] == pair["prompt_ids"] + pair["chosen_ids"]
        assert whole["rejected_ids"] == pair["prompt_ids"] + pair["rejected_ids"]
    assert tokenise(rows, tokenizer, spec("orpo")).from_cache  # which takes the same as DPO


def test_rows_that_the_template_refuses_are_named_all_or_skipped(tokenizer: Any) -> None:
    wrong = [Preference([user("a"), user("b")], [said("c")], [said("d")], where=f"my.jsonl, line {n}") for n in (3, 9)]
    rows = [*rows_of("dpo", 4), *wrong]
    with pytest.raises(RequestError, match="user and assistant must take turns") as caught:
        tokenise(rows, tokenizer, spec())
    assert [problem.source for problem in caught.value.problems] == ["my.jsonl, line 3", "my.jsonl, line 9"]
    found = tokenise(rows, tokenizer, spec("dpo", "data.on_error=skip"))
    assert (found.num_refused, found.num_examples, len(found.rows)) == (2, 6, 4)
    with pytest.raises(RequestError, match="user and assistant must take turns"):
        tokenise(wrong, tokenizer, spec("dpo", "data.on_error=skip"))


def test_a_question_comes_back_as_it_was(tokenizer: Any) -> None:
    """Calls with other arguments, fields that only some rows have, or that are a number here and a text there."""
    tokenizer.chat_template = template_source("chatml")

    def call(**arguments: Any) -> Turn:
        function = {"name": "look", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    rows = [
        PromptExample([user("2+2?")], "007", {"level": "3", "tests": ["a"], "pi": 3.141592653589793}),
        PromptExample([user("a"), call(x=1), {"role": "tool", "content": "b"}], None, {"level": 1}),
        PromptExample([user("c"), call(y="z"), {"role": "tool", "content": "d"}], "e", {"level": "hard", "seen": True}),
    ]
    found = tokenise(rows, tokenizer, spec("grpo", "train.max_length=200")).rows
    assert [row["prompt"] for row in found] == [row.prompt for row in rows]
    assert [row["answer"] for row in found] == ["007", None, "e"]  # text stays text, and a number whole
    assert [row["tests"] for row in found] == [["a"], None, None] and found[0]["pi"] == 3.141592653589793
    assert [(row["level"], row["seen"]) for row in found] == [("3", None), (1, None), ("hard", True)]


def test_a_row_that_leaves_no_room_is_dropped_and_counted(tokenizer: Any) -> None:
    rows = rows_of("dpo", 10)
    random.Random(0).shuffle(rows)
    long = Preference([user("why? " * 80)], [said("a")], [said("b")])
    found = tokenise([*rows, long], tokenizer, spec())
    assert (found.num_dropped, len(found.rows)) == (1, 10)
    with pytest.raises(RequestError, match=r"no room for an answer within 64 tokens, in 1 row$"):
        tokenise([long], tokenizer, spec())
