"""Rows as they are tokenised, packed, counted and found again, with a tokenizer of so few words that they are told by
hand; `tests/train/test_token_dataset.py` has the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from runner.data.examples import Example, Turn
from runner.errors import RequestError
from runner.train.tokens import token_dataset
from runner.train.tokens.token_cache import Tokenised
from tests.conftest import spec_of

WORDS = ["<unk>", "</s>", "user:", "assistant:", *(f"w{n}" for n in range(4, 64))]
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'w13' %}{{ raise_exception('unlucky') }}{% endif %}"
    "{{ m.role }}: {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
END, USER, ASSISTANT = 1, 2, 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def chat(question: int, *answer: int, where: str = "") -> Example:
    """`user: w<question> </s> assistant: w<answer> … </s>`: five tokens and the answer's."""
    asked: Turn = {"role": "user", "content": f"w{question}"}
    said: Turn = {"role": "assistant", "content": " ".join(f"w{n}" for n in answer)}
    return Example([asked], [said], where=where)


def row(question: int, *answer: int) -> list[int]:
    return [USER, question, END, ASSISTANT, *answer, END]


def labels(*answer: int) -> list[int]:
    return [*[-100] * 4, *answer, END]


def tokenised(examples: list[Example], *words: str, **more: Any) -> Tokenised:
    return token_dataset.tokenise(examples, tokenizer(), spec_of("train.max_length=16", *words), **more)


def columns(found: Tokenised) -> dict[str, list[Any]]:
    return {name: [*found.rows[name]] for name in found.rows.column_names}


def facts(found: Tokenised) -> dict[str, Any]:
    names = ("examples", "truncated", "dropped", "split", "refused", "unlearned", "prompt_differs", "conversations",
             "tokens")  # fmt: skip
    counts = {name: getattr(found, f"num_{name}") for name in names}
    return {name: count for name, count in counts.items() if count}


def test_rows_are_ids_and_labels_in_their_order() -> None:
    found = tokenised([chat(4, 5), chat(6, 7, 8)], "train.packing=false")
    assert columns(found) == {"input_ids": [row(4, 5), row(6, 7, 8)], "labels": [labels(5), labels(7, 8)]}
    assert facts(found) == {"examples": 2, "conversations": 2, "tokens": 13}
    assert found.packing_efficiency is None and found.from_cache is False


def test_packed_rows_share_sequences_and_each_keeps_its_length() -> None:
    """6, 7 and 12 tokens into 16: the longest alone, the others together."""
    found = tokenised([chat(4, 5), chat(6, 7, 8), chat(9, *range(14, 21))], "train.packing=true")
    long = row(9, *range(14, 21))
    assert columns(found) == {
        "input_ids": [long, [*row(6, 7, 8), *row(4, 5)]],
        "labels": [labels(*range(14, 21)), [*labels(7, 8), *labels(5)]],
        "seq_lengths": [[12], [7, 6]],
    }
    assert found.packing_efficiency == 25 / 32 and found.num_tokens == 25


def test_loss_on_all_is_taken_and_other_objectives_have_it_so() -> None:
    found = tokenised([chat(4, 5)], "train.packing=false", "objective.loss_on=all")
    assert columns(found)["labels"] == [row(4, 5)]
    assert token_dataset._loss_on(spec_of("objective=pretrain", "data=file", "data.path=x.txt")) == "all"
    assert token_dataset._loss_on(spec_of("objective.loss_on=last")) == "last"


@pytest.mark.parametrize(
    ("on_long", "ids", "counts"),
    [
        ("truncate", [row(4, 5), row(6, *range(14, 40))[:16]], {"truncated": 1, "tokens": 22}),
        ("drop", [row(4, 5)], {"dropped": 1, "tokens": 6}),
        ("split", [row(4, 5), row(6, *range(14, 40))[:16], row(6, *range(14, 40))[16:]], {"split": 1, "tokens": 37}),
    ],
)
def test_long_rows_are_cut_dropped_or_split_and_counted(
    on_long: str, ids: list[list[int]], counts: dict[str, int]
) -> None:
    examples = [chat(4, 5), chat(6, *range(14, 40))]
    found = tokenised(examples, "train.packing=false", f"data.on_long={on_long}")
    assert columns(found)["input_ids"] == ids
    assert facts(found) == {"examples": 2, "conversations": 2, **counts}


def test_what_the_template_refuses_stops_or_is_skipped_and_counted() -> None:
    examples = [chat(4, 5, where="row 1"), chat(13, 5, where="row 2"), chat(6, 7, where="row 3")]
    with pytest.raises(RequestError) as caught:
        tokenised(examples)
    (problem,) = caught.value.problems
    assert "unlucky" in problem.what and problem.source == "row 2"
    found = tokenised(examples, "data.on_error=skip", "train.packing=false")
    assert columns(found)["input_ids"] == [row(4, 5), row(6, 7)]
    assert facts(found) == {"examples": 3, "conversations": 3, "refused": 1, "tokens": 12}
    with pytest.raises(RequestError, match="unlucky"):  # and where nothing else is left
        tokenised(examples[1:2], "data.on_error=skip")


def test_of_many_problems_a_thousand_are_kept_and_all_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.data.tokenize_rows.CHUNK", 600)
    refused = [chat(13, 5, where=f"row {n}") for n in range(1300)]
    with pytest.raises(RequestError) as caught:
        tokenised(refused)
    problems = caught.value.problems
    assert [problem.source for problem in problems[:20]] == [f"row {n}" for n in range(20)]
    assert problems[20].what == "and 980 more"
    found = tokenised([*refused, chat(4, 5)], "data.on_error=skip")
    assert facts(found) == {"examples": 1301, "conversations": 1301, "refused": 1300, "tokens": 6}


@pytest.mark.parametrize(("count", "words"), [(1, "1 example"), (2, "2 examples")])
def test_rows_with_nothing_to_learn_are_an_error(count: int, words: str) -> None:
    silent = [Example(chat(4, 5).prompt, [{**chat(4, 5).completion[0], "weight": 0}]) for _ in range(count)]
    with pytest.raises(RequestError) as caught:
        tokenised(silent)
    (problem,) = caught.value.problems
    assert problem.what == f"no token to learn within 16 tokens, in {words}"
    assert problem.remedy == "raise train.max_length, or check the field names of the data"


def test_progress_is_told_after_every_chunk_and_counts_refused_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.data.tokenize_rows.CHUNK", 3)
    examples = [chat(13 if n == 4 else 4, 5, where=f"row {n}") for n in range(8)]
    told: list[tuple[int, int]] = []
    tokenised(examples, "data.on_error=skip", on_progress=lambda done, of: told.append((done, of)))
    assert told == [(3, 8), (6, 8), (8, 8)]


def test_as_many_processes_tokenise_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    own = token_dataset.in_chunks

    def noted(work: Any, words: Any, rows: Any, num_proc: int | None) -> Any:
        asked.append(num_proc)
        return own(work, words, rows, 1)

    monkeypatch.setattr(token_dataset, "in_chunks", noted)
    tokenised([chat(4, 5)], "data.num_proc=3")
    assert asked == [3]


def test_nothing_but_rows_and_facts_stays_in_the_cache(tmp_path: Path) -> None:
    found = tokenised([chat(4, 5)])
    assert sorted(file.name for file in found.folder.iterdir()) == ["facts.json", "rows.arrow"]


@pytest.mark.parametrize(
    "change",
    ["train.max_length=17", "train.packing=false", "objective.loss_on=all", "data.on_long=drop", "data.on_error=skip"],
)
def test_every_setting_that_shapes_the_tokens_is_part_of_what_is_looked_for(change: str) -> None:
    assert tokenised([chat(4, 5)]).from_cache is False
    again = tokenised([chat(4, 5)])
    assert again.from_cache and columns(again)["input_ids"] == [row(4, 5)] and again.num_tokens == 6
    assert tokenised([chat(4, 5)], change).from_cache is False
    assert tokenised([chat(4, 6)]).from_cache is False


def test_other_words_or_another_template_are_another_tokenizer() -> None:
    spec = spec_of("train.max_length=16")
    token_dataset.tokenise([chat(4, 5)], tokenizer(), spec)
    for change in ({"chat_template": TEMPLATE + " "}, {"unk_token": "w63"}):
        other = tokenizer()
        for name, value in change.items():
            setattr(other, name, value)
        assert not token_dataset.tokenise([chat(4, 5)], other, spec).from_cache
