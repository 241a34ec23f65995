"""Public data sets by the columns of their rows: each is read rightly, or refused with the keys to write."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from runner.data.examples import Example, Kind, Preference, PromptExample, Turn, UnpairedExample
from runner.data.load import load_examples, read_dataset
from runner.data.row_formats import detect_format, left_out
from runner.errors import RequestError
from tests.support.front import here, laptop, runner
from tests.support.rows import canonical_row, said, system, user
from tests.support.rows import data_spec as spec

__all__ = ["here", "laptop"]  # fixtures


def made(row: dict[str, Any], kind: Kind, **changes: Any) -> Any:
    return canonical_row(row, "row 1", spec(**changes), kind)


def refusal(row: dict[str, Any], kind: Kind, **changes: Any) -> tuple[str, str]:
    with pytest.raises(RequestError) as caught:
        made(row, kind, **changes)
    (problem,) = caught.value.problems
    return problem.what, str(problem.remedy)


ONE, TWO = {"chosen": "It is 4.", "rejected": "It is 5."}, {"score_chosen": 8.0, "score_rejected": 3.0}
ASKED = [system(), user()]
TURNS = {"chosen": [user(), said()], "rejected": [user(), said("It is 5.")]}


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "question": "2+2?", **ONE},  # Intel/orca_dpo_pairs
        {"system_prompt": "Be brief.", "query": "2+2?", **ONE},
        # argilla/distilabel-intel-orca-dpo-pairs: generations, judge's words and figures
        {"system": "Be brief.", "input": "2+2?", **ONE, "generations": ["a", "b"], "rating": [9.0, 8.0],
         "labelling_prompt": [user("Rate.")], "rationale": "The first is right.", "original_chosen": "It is 4."},
        {"prompt": [system(), user()], **TURNS},  # the system turn is in the prompt alone
        {"prompt": "2+2?", "chosen": [system(), *TURNS["chosen"]], "rejected": [system(), *TURNS["rejected"]]},
        {"prompt": [system(), user()], "chosen": [said()], "rejected": [said("It is 5.")]},
        {"question": "2+2?", "system": "Be brief.", "chosen": [said()], "rejected": [said("It is 5.")]},
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "2+2?"}],
         "chosen": {"from": "gpt", "value": "It is 4."}, "rejected": {"from": "gpt", "value": "It is 5."}},
        {"system": "Be brief.", "instruction": "2+2?", "input": "", **ONE},
        {"system": "Be brief.", **TURNS},
        # HuggingFaceH4/ultrafeedback_binarized
        {"system": "Be brief.", "prompt": "2+2?", "prompt_id": "a", **TURNS, "messages": TURNS["chosen"], **TWO},
        # Dahoas/full-hh-rlhf
        {"system": "Be brief.", "prompt": "\n\nHuman: 2+2?\n\nAssistant:", "response": "It is 4.", **ONE},
        {"system": "Be brief.", "chosen": "\n\nHuman: 2+2?\n\nAssistant: It is 4.",
         "rejected": "\n\nHuman: 2+2?\n\nAssistant: It is 5."},  # Anthropic/hh-rlhf
    ],
)  # fmt: skip
def test_nothing_of_a_preferences_prompt_is_dropped(row: dict[str, Any]) -> None:
    assert made(row, "preference") == Preference(ASKED, [said()], [said("It is 5.")])
    assert made(row, "sft") == Example(ASKED, [said()])
    found = made({**row, "tests": [1]}, "prompts")
    assert isinstance(found, PromptExample) and found.prompt == ASKED and found.extra["tests"] == [1]


def test_an_instruction_with_its_input_asks_for_both_answers() -> None:
    row = {"instruction": "Add.", "input": "1+1", "history": [["Hi", "Hello"]], "chosen": "2", "rejected": "3"}
    asked = [user("Hi"), said("Hello"), user("Add.\n\n1+1")]
    assert made(row, "preference") == Preference(asked, [said("2")], [said("3")])
    marked = {"instruction": "Add.", "input": "1+1", "output": "2", "label": True}
    assert made(marked, "unpaired") == UnpairedExample([user("Add.\n\n1+1")], [said("2")], True)
    assert made({"question": "a", "completion": "b", "label": 0}, "unpaired") == UnpairedExample(
        [user("a")], [said("b")], False
    )


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chosen": [said()], "rejected": [said("no")]}, "chosen has no user turn before the answer"),
        ({"prompt": "3+3?", **TURNS}, "prompt is not what chosen and rejected begin with"),
        (
            {"prompt": [system("Rhyme."), user()], "chosen": [*ASKED, said()], "rejected": [*ASKED, said("no")]},
            "prompt and chosen have different system turns",
        ),
        ({"system": "Rhyme.", "chosen": [*ASKED, said()], "rejected": [*ASKED, said("no")]},
         "system and the system turn of the conversation are not the same"),
        ({"prompt": "a", "chosen": [{**said(), "weight": 0}, user("b"), said("c")], "rejected": [said("no")]},
         "chosen has a turn that is not to be learned, and answers are compared as a whole"),
    ],
)  # fmt: skip
def test_a_pair_that_contradicts_itself_is_explained(row: dict[str, Any], what: str) -> None:
    assert refusal(row, "preference")[0] == what


@pytest.mark.parametrize(
    ("row", "kind", "shape", "left"),
    [
        ({"instruction": "Add.", "input": "1+1", "output": "2", "text": "…"}, "sft", "alpaca", ["text"]),
        (  # iamtarun/python_code_instructions_18k_alpaca: the whole rendered, called prompt
            {"instruction": "Add.", "input": "1+1", "output": "2", "prompt": "### Task\nAdd.\n### Input\n1+1\n### 2"},
            "sft", "alpaca", ["prompt"],
        ),
        ({"prompt": "Q", "completion": "R", "text": "…"}, "sft", "prompt_completion", ["text"]),
        ({"messages": [user(), said()], "text": "…", "score": 0.5}, "sft", "chat", ["text", "score"]),
        ({"input_ids": [1, 2], "labels": [1, 2], "text": "…"}, "sft", "tokens", ["text"]),
        ({"text": "…", "id": 1, "url": "a", "embedding": [0.5]}, "sft", "text", ["id", "url", "embedding"]),
        ({"prompt": "2+2?", "prompt_id": "a", "messages": [user(), said()]}, "sft", "chat", ["prompt", "prompt_id"]),
        (  # Magpie
            {"instruction": "2+2?", "response": "It is 4.", "conversations": [user(), said()], "intent": "Maths"},
            "sft", "chat", ["instruction", "response", "intent"],
        ),
        ({"problem": "2+2?", "solution": "It is 4.", "messages": [user(), said()]}, "sft", "chat",
         ["problem", "solution"]),  # NuminaMath
        ({"prompt": "2+2?", "completion": "It is 4.", "answer": "4"}, "sft", "prompt_completion", ["answer"]),
        ({"conversations": ["2+2?", "It is 4."], "source": "x"}, "sft", "chat", ["source"]),  # LIMA
        ({"prompt": "2+2?", "completion": "4", "label": True}, "sft", "prompt_completion", ["label"]),
        ({"prompt": "Q", "response": "R", "text": "…"}, "sft", "prompt_completion", ["text"]),
        ({"question": "Q", "answer": "R", "text": "…"}, "sft", "prompt_completion", ["text"]),
        ({"query": "Q", "response": "R", "type": "GSM", "original_question": "O"}, "sft", "prompt_completion",
         ["type", "original_question"]),  # MetaMathQA
        ({"id": "a", "system_prompt": "S", "question": "q", "response": "r"}, "sft", "prompt_completion", ["id"]),
        ({"input": "a", "output": "b", "text": "…"}, "sft", "prompt_completion", ["text"]),
        ({"problem": "q", "solution": "It is 4.", "answer": "4"}, "sft", "prompt_completion", ["answer"]),
        ({"prompt": "q", "response": "r", "label": True}, "unpaired", "unpaired", []),
        # One table of several kinds of rows.
        ({"messages": None, "text": "hello", "prompt": None}, "sft", "text", ["messages", "prompt"]),
        ({"prompt": None, "question": "2+2?", "completion": "4", "text": None}, "sft", "prompt_completion",
         ["prompt", "text"]),
        ({"prompt": "a", "completion": "b", "context": "", "tools": "[]", "functions": "[]", "history": []}, "sft",
         "prompt_completion", ["context", "functions", "history"]),
        ({"Unnamed: 0": 3, "__index_level_0__": 3, "": "3", "prompt": "a", "completion": "b"}, "sft",
         "prompt_completion", []),
    ],
)  # fmt: skip
def test_the_most_specific_shape_wins_and_what_is_left_out_is_known(
    row: dict[str, Any], kind: Kind, shape: str, left: list[str]
) -> None:
    assert detect_format(row, spec(), kind) == shape
    made(row, kind)
    assert left_out(row, spec(), detect_format(row, spec(), kind), kind) == left


def test_the_more_specific_shape_is_what_is_learned() -> None:
    row = {"instruction": "Add.", "input": "1+1", "output": "2", "text": "…"}
    assert made(row, "sft") == Example([user("Add.\n\n1+1")], [said("2")])
    assert made(row, "sft", format="text") == Example(text="…")
    assert made({"input_ids": [1, 2], "labels": [-100, 2], "text": "…"}, "sft") == Example(ids=[1, 2], labels=[-100, 2])
    assert made({"conversations": ["2+2?", "4"]}, "sft") == Example([user()], [said("4")], dialogue=True)


@pytest.mark.parametrize(
    ("row", "kind", "columns", "keys"),
    [
        ({"prompt": "Q", "reply": "R", "text": "…"}, "sft", "prompt and reply", "data.completion_field=reply"),
        ({"question": "Q", "answer": 3, "text": "…"}, "sft", "question", "data.completion_field=text"),
        ({"text": "long", "summary": "short"}, "sft", "summary",
         "data.prompt_field=text data.completion_field=summary"),
        ({"problem": "q", "solution": "long", "answer": "4"}, "sft", "answer", None),
        ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, "sft", "context",
         "data.input_field=context"),  # Dolly
        ({"prompt": "a", "completion": "b", "user_context": "c"}, "sft", "user_context",
         "data.instruction_field=prompt data.input_field=user_context"),
        ({"prompt": "a", "completion": "b", "sys_prompt": "c"}, "sft", "sys_prompt", "data.system_field=sys_prompt"),
        # Answers to a prompt of any name, in any language; what says something about the row is none.
        ({"frage": "2+2?", **ONE, "source": "x", "chosen_model": "m"}, "preference", "frage",
         "data.prompt_field=frage"),
        ({"user_input": "2+2?", "chosen": "Four", "rejected": "5"}, "preference", "user_input",
         "data.prompt_field=user_input"),
        ({"context_messages": [user()], "chosen": "Four", "rejected": "5"}, "preference", "context_messages",
         "data.prompt_field=context_messages"),
        ({"prompt": "a", "text": "b"}, "sft", "prompt", "data.completion_field=text"),  # Cosmopedia
        ({"prompt": "a", "completion": "b", "context": "c"}, "sft", "context",
         "data.instruction_field=prompt data.input_field=context"),
        ({"question": "a", "context": "France", "completion": "Paris, France"}, "sft", "context",
         "data.instruction_field=question data.input_field=context"),
        ({"question": "a", "context": "c", **ONE}, "preference", "context",
         "data.instruction_field=question data.input_field=context"),
        ({"prompt": "a", "history": [["b", "c"]], **ONE}, "preference", "history",
         "data.instruction_field=prompt data.history_field=history"),
        ({"trajectory": [user()], **ONE}, "preference", "trajectory", "data.messages_field=trajectory"),
        ({"prompt": "a", "completion": "b", "Complex CoT": "c"}, "sft", "Complex CoT",
         "'data.thinking_field=Complex CoT'"),
        ({"prompt": "a", "completion": "b", "cot": "c"}, "sft", "cot", "data.thinking_field=cot"),
        ({"prompt": "a", "completion": "b", "system_message": "c"}, "sft", "system_message",
         "data.system_field=system_message"),
        ({"messages": [user(), said()], "functions": '[{"name": "f"}]'}, "sft", "functions",
         "data.tools_field=functions"),
        ({"messages": [user(), said()], "reasoning": "easy"}, "sft", "reasoning", None),
        ({"messages": [user("<image>What?"), said()], "images": ["a.png"]}, "sft", "images", None),
        ({"image": "a.png", "conversations": [user(), said()]}, "sft", "image", None),  # LLaVA
        ({"question": "q", "image": {"bytes": "…"}, "answer": "4"}, "prompts", "image", None),
        ({"messages": [user(), said()], "solution": "Another."}, "sft", "solution", None),
        ({"text": "hi", "role": "prompter", "parent_id": "1"}, "sft", "role", None),  # OASST's single messages
        ({"prompt": "a", "completion": "b", "label": 1, "context": "c"}, "unpaired", "context",
         "data.instruction_field=prompt data.input_field=context"),
    ],
)  # fmt: skip
def test_a_column_that_looks_like_content_is_mapped_or_ignored(
    row: dict[str, Any], kind: Kind, columns: str, keys: str | None
) -> None:
    what, remedy = refusal(row, kind)
    assert what.startswith(f"column{'s' * (' and ' in columns)} {columns} look") and "nothing reads" in what
    assert remedy.startswith(f"write {keys}, or" if keys else "write data.ignore_columns=")
    names = [name.strip('"') for name in columns.split(" and ")]
    typed = json.dumps(names, separators=(",", ":")) if " " in columns and len(names) == 1 else f"[{','.join(names)}]"
    assert f"data.ignore_columns={typed}" in remedy.replace("'", "")
    # Both work as they are written.
    made(row, kind, ignore_columns=names)
    if keys:
        found = dict(word.removeprefix("data.").split("=") for word in shlex.split(keys))
        assert not {*names} & {*left_out(row, read_by := spec(**found), detect_format(row, read_by, kind), kind)}
        made(row, kind, **found)


def test_mapped_columns_are_where_they_belong() -> None:
    row = {
        "prompt": "Where?",
        "completion": "Paris",
        "context": "France",
        "cot": "Easy.",
        "system_message": "S",
    }
    keys = {"instruction_field": "prompt", "input_field": "context", "thinking_field": "cot"}
    found = made(row, "sft", **keys, system_field="system_message")
    assert found.prompt == [system("S"), user("Where?\n\nFrance")]
    assert found.completion == [{**said("Paris"), "reasoning_content": "Easy."}]
    thought = made({"instruction": "a", "output": "b", "reasoning": "c"}, "sft")
    assert thought.completion == [{**said("b"), "reasoning_content": "c"}]


@pytest.mark.parametrize(
    ("row", "kind", "remedy"),
    [
        ({"Question": "Q", "Complex_CoT": "C", "Response": "R"}, "sft",  # medical-o1
         "data.prompt_field=Question data.completion_field=Response data.thinking_field=Complex_CoT"),
        ({"id": 1, "query": "q", "answers": "[]", "tools": "[]"}, "sft",  # xLAM
         "data.prompt_field=query data.completion_field=answers"),
        ({"prompt": "q", "chosen_response": "a", "rejected_response": "b", "chosen_model": "m"}, "preference",
         "data.chosen_field=chosen_response data.rejected_field=rejected_response"),
        ({"instruction": "q", "output": "a", "kto_tag": True}, "unpaired", "data.label_field=kto_tag"),
        ({"conversation": [user(), said()]}, "sft", "data.messages_field=conversation"),  # WildChat
    ],
)  # fmt: skip
def test_names_that_are_not_known_are_answered_with_keys_that_read_all(
    row: dict[str, Any], kind: Kind, remedy: str
) -> None:
    assert refusal(row, kind)[1] == f"write {remedy}"
    made(row, kind, **dict(re.findall(r"data\.(\w+)=(\S+)", remedy)))


@pytest.mark.parametrize("row", [{"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1}, {"text": "a"}])
def test_a_preference_without_two_answers_is_refused(row: dict[str, Any]) -> None:
    assert "chosen" in refusal(row, "preference")[1] or "objective=sft" in refusal(row, "preference")[1]


# --- an answer is text, whatever it says ---------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "Human: a member of our species.",
        "Human: a member.\n\nAssistant: a helper.",
        "\n\nHuman: hi\n\nAssistant: hello",
        '[{"name": "Bob"}]',
        '[{"role": "user", "content": "hi"}]',
        "### Human: hi",
    ],
)
def test_an_answer_is_never_taken_apart(answer: str) -> None:
    row = {"prompt": "Define: human.", "completion": answer}
    assert made(row, "sft") == Example([user("Define: human.")], [said(answer)])
    assert made({**row, "label": True}, "unpaired") == UnpairedExample([user("Define: human.")], [said(answer)], True)
    assert made({"instruction": "a", "output": answer}, "sft").completion == [said(answer)]
    pair = made({"prompt": "a", "chosen": answer, "rejected": "no"}, "preference")
    assert pair == Preference([user("a")], [said(answer)], [said("no")])


def test_turns_as_text_are_an_answer_where_they_do_not_begin_with_the_prompt() -> None:
    """The same JSON text is a conversation where it does, as CSV has it."""
    whole, alone = [user("2+2?"), said()], [said()]
    chosen = json.dumps(whole)
    row = {"prompt": "Write JSON.", "chosen": chosen, "rejected": json.dumps([user(), said("5")])}
    pair = made(row, "preference")
    assert pair.prompt == [user("Write JSON.")] and pair.chosen == [said(chosen)]
    for turns in (whole, alone):
        row = {"prompt": "2+2?", "chosen": json.dumps(turns), "rejected": json.dumps([*turns[:-1], said("5")])}
        assert made(row, "preference") == Preference([user()], [said()], [said("5")])


@pytest.mark.parametrize(
    ("key", "row"),
    [("completion_field", {"prompt": "a", "response": "b"}), ("output_field", {"instruction": "a", "output": "b"})],
)
def test_other_names_are_not_tried_where_one_is_named(key: str, row: dict[str, Any]) -> None:
    assert refusal(row, "sft", **{key: "reply"})[0].startswith("cannot tell what to learn")


def test_which_of_two_columns_is_the_prompt_is_not_guessed() -> None:
    what, remedy = refusal({"titel": "a", "frage": "b", "chosen": "Four", "rejected": "5"}, "preference")
    assert what == "columns titel and frage look like content, and nothing reads them"
    assert remedy == "write data.prompt_field=titel, or another of them, or data.ignore_columns=[titel,frage]"


def test_masks_beside_token_ids_say_what_is_learned() -> None:
    """TRL's and others' names; padding is no token."""
    ids = [5, 6, 7, 8]
    for name in ("completion_mask", "assistant_masks", "loss_mask"):
        assert made({"input_ids": ids, name: [0, 0, 1, 1]}, "sft") == Example(ids=ids, labels=[-100, -100, 7, 8])
    row = {"input_ids": ids, "labels": [5, -100, 7, 8], "completion_mask": [0, 1, 1, 1], "attention_mask": [1, 1, 1, 0]}
    assert made(row, "sft") == Example(ids=[5, 6, 7], labels=[-100, -100, 7])
    assert left_out(row, spec(), "tokens") == []
    assert made({"input_ids": ids, "attention_mask": [1, 1, 1, 1]}, "sft") == Example(ids=ids)
    told = refusal({"input_ids": ids, "loss_mask": [0, 1]}, "sft")[0]
    assert told == "loss_mask is not a 0 or a 1 for each of 4 tokens"
    assert "every token" in refusal({"input_ids": [5], "attention_mask": [0]}, "sft")[0]


def test_turns_may_be_columns_of_a_column() -> None:
    """datasets writes Sequence({"from": …, "value": …}) so."""
    row = {"conversations": {"from": ["human", "gpt"], "value": ["2+2?", "It is 4."]}}
    assert made(row, "sft") == Example([user()], [said()], dialogue=True)


def test_what_only_reward_functions_get_is_said(here: Path) -> None:
    (here / "my.jsonl").write_text('{"question": "q", "context": "c", "answer": "4", "tests": ["a"]}\n')
    words = ("data", "preview", "data.path=my.jsonl", "objective=grpo", "model=llama3_8b")
    assert "  columns that only reward functions get: context, tests" in runner(*words).output


def test_texts_that_only_begin_like_a_conversation_are_plain() -> None:
    row = {"chosen": "Human: a species.", "rejected": "Human: a robot."}
    assert made(row, "preference") == Preference("Human: a", " species.", " robot.")
    row = {"chosen": "\n\nHuman: Who?\n\nAssistant: The Human: one.", "rejected": "\n\nHuman: Who?\n\nAssistant: No."}
    assert made(row, "preference") == Preference([user("Who?")], [said("The Human: one.")], [said("No.")])


# --- turns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [{"loss": False}, {"train": False}, {"training": False}, {"weight": 0}, {"loss": 0},
                                  {"train": "false"}, {"weight": 0.0}, {"trainable": False}, {"masked": True},
                                  {"loss_mask": 0}, {"learn": 0}])  # fmt: skip
def test_a_turn_is_not_learned_where_it_says_so(flag: dict[str, Any]) -> None:
    found = made(
        {"messages": [{**user(), "loss": False}, {**said("a"), **flag}, user(), {**said(), "loss": True}]}, "sft"
    )
    assert [turn.get("weight", 1) for turn in (*found.prompt, *found.completion)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ({**said(), "train": "maybe"}, 'messages[1].train is "maybe", neither true nor false'),
        (
            {**said(), "train": True, "weight": 0},
            "messages[1] is to be learned by one of weight, train and not by another",
        ),
    ],
)
def test_a_flag_that_says_nothing_is_explained(turn: Turn, what: str) -> None:
    assert refusal({"messages": [user(), turn]}, "sft")[0] == what
    what = refusal({"messages": [{**user(), "train": True}, said()]}, "sft")[0]
    assert what == "messages[0].train is true, and the turn is not the assistant's"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user(), {**said(""), "tool_calls": [{"name": "f", "arguments": {"a": "\ud800"}}]}]},
        {"messages": [user(), said()], "tools": [{"name": "\ud800"}]},
        {"messages": [user(), {**said(), "thinking": "\ud800"}]},
        {"system": "\ud800", "messages": [user(), said()]},
    ],
)
def test_half_a_character_is_named_wherever_it_stands(row: dict[str, Any]) -> None:
    assert "holds half a character" in refusal(row, "sft")[0]
    assert "tags holds half" in refusal({"prompt": "a", "tags": ["\udfff"]}, "prompts")[0]


# --- every source says the same ------------------------------------------------------------------

ROWS = [{"system": f"S{n}", "question": f"q{n}", "chosen": "a", "rejected": "b", "id": n} for n in range(4)]
CONTEXT = [{"prompt": "q", "completion": "a", "context": "" if n < 2 else f"c{n}"} for n in range(4)]


def write(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(text.getvalue())
    return file


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("many", [False, True])
def test_every_source_is_read_alike(tmp_path: Path, ending: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if many:
        monkeypatch.setattr("runner.data.load.IN_MEMORY_BYTES", 0)
    file = write(tmp_path, ending, ROWS)
    found = read_dataset(spec(path=str(file), eval_fraction=0), 0, "preference")
    pairs = [Preference([system(f"S{n}"), user(f"q{n}")], [said("a")], [said("b")]) for n in range(4)]
    assert list(found.train) == pairs
    assert found.left_out == ["id"] and found.note == "Columns that were not read: id"
    file = write(tmp_path, ending, CONTEXT)
    for path in ({"path": str(file)}, {"sources": [{"path": str(file)}], "path": None}):
        with pytest.raises(RequestError) as caught:
            read_dataset(spec(**path), 0)
        (problem,) = caught.value.problems  # once, not for every row
        assert problem.what == "column context looks like content, and nothing reads it"
        assert str(problem.source).startswith(str(file)) and str(problem.source)[-1] in "34"
    note = read_dataset(spec(path=str(file), on_error="skip", eval_fraction=0), 0).note
    wanted = f"Skipped 2 rows that are wrong; the first: {problem.source}: {problem.what}"
    assert note == f"Columns that were not read: context\n{wanted}"


def test_the_numbers_of_rows_need_no_name(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text(",prompt,completion\n0,a,b\n1,c,d\n")
    train, _ = load_examples(spec(path=str(tmp_path / "my.csv"), eval_fraction=0), 0)
    assert train == [Example([user("a")], [said("b")]), Example([user("c")], [said("d")])]


def test_a_preview_says_what_is_left_out(here: Path) -> None:
    (here / "my.jsonl").write_text('{"instruction": "Add.", "input": "1+1", "output": "2", "text": "…", "id": 7}\n')
    result = runner("data", "preview", "data.path=my.jsonl", "model=llama3_8b")
    assert "my.jsonl: alpaca, 1 row\n  columns that are not read: text, id" in result.output
    found = json.loads(runner("data", "preview", "data.path=my.jsonl", "model=llama3_8b", "--json").output)
    assert found["files"][0]["left_out"] == ["text", "id"]


def test_a_run_refuses_what_a_preview_refuses(here: Path) -> None:
    (here / "my.jsonl").write_text('{"prompt": "a", "context": "c", "completion": "b"}\n')
    for verb in (("data", "preview"), ("run",)):
        result = runner(*verb, "data=file", "data.path=my.jsonl", "model=smollm2_135m")
        assert result.exit_code == 2 and "column context looks like content" in result.output
        assert "data.instruction_field=prompt data.input_field=context" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("flag", "what", "remedy"),
    [
        ({"mask": 1}, "mask may mean that the turn is learned or that it is not", "write loss: true or false"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail leaves out parts of a turn", "write train: true or"),
        *[
            ({key: False}, f"{key} may say that the turn is not learned", f"write data.weight_field={key} where 0 or")
            for key in ("is_trainable", "train_on_turn", "ignore_loss")
        ],
        ({"masked": "yes"}, 'masked is "yes", neither true nor false', "write true to learn nothing of it"),
        ({"trainable": "no"}, 'trainable is "no", neither true nor false', "write false to learn nothing of it"),
    ],
)
def test_a_flag_of_a_turn_that_is_not_clear_is_refused(flag: dict[str, Any], what: str, remedy: str) -> None:
    told = refusal({"messages": [user(), {**said(), **flag}]}, "sft")
    assert told[0] == f"messages[1].{what}" and told[1].startswith(remedy)


@pytest.mark.parametrize(
    ("row", "odd"),
    [
        (
            {"question": "Wer?", "context": "…", "answers": {"text": ["er"], "answer_start": [0]}},
            "answers is an object",
        ),
        ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, "answer is a number"),
        ({"question": {"stem": "Why?"}, "answerKey": "B"}, "question is an object"),
    ],
)
def test_a_prompt_or_an_answer_that_is_no_text_is_named(row: dict[str, Any], odd: str) -> None:
    told = refusal(row, "sft")[1]
    assert told.startswith(f"{odd}, and prompt and answer have to be text or turns: write data.")
    assert told.count(
        'no column is such, write rows as {"prompt": "…", "completion": "…"} first, or data.format=FILE.py:CLASS'
    )
