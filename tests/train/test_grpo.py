"""GRPO: a model that says either of two words comes to say the one that is rewarded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders

from runner.errors import RequestError
from tests.conftest import spec_of
from tests.support import preferences

QUESTIONS = [f"What is the {thing} like, number {i}?" for thing in preferences.THINGS for i in range(4)]
GRPO = (
    "objective=grpo", "train.batch_size=16", "train.micro_batch_size=8", "objective.num_generations=8",
    "objective.max_new_tokens=6", "train.max_length=96", "data.eval_fraction=0.2", "eval.num_prompts=6",
    "eval.max_new_tokens=6", "train.learning_rate=2e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny model that has learned to answer red as often as blue, and the questions, whose answer is red."""
    folder = tmp_path_factory.mktemp("grpo")
    preferences.words(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tiny" / "tokenizer.json"))
    tokenizer.decoder = decoders.ByteLevel()  # answers are compared as text
    tokenizer.save(str(folder / "tiny" / "tokenizer.json"))
    both = ({"prompt": text, "completion": word} for text in QUESTIONS for word in ("red", "blue"))
    rows = preferences.write(folder / "both.jsonl", both)
    preferences.write(folder / "red.jsonl", ({"prompt": text, "answer": "red", "level": 2} for text in QUESTIONS))
    _, run = preferences.train(
        folder, "method=full", f"data.path={rows}", "train.max_steps=120", "train.batch_size=8", "train.packing=false",
        "train.micro_batch_size=8", "train.learning_rate=3e-3", "train.max_length=64",
    )  # fmt: skip
    (run.path / "model").rename(folder / "both")
    return folder


def trained(folder: Path, *more: str) -> tuple[Any, Any]:
    """Go on with that model by reward."""
    return preferences.train(folder, *GRPO, f"model.id={folder / 'both'}", f"data.path={folder / 'red.jsonl'}", *more)


@pytest.mark.parametrize(
    "words", [("method=full", "objective.beta=0.01"), ("method=full", "objective.loss=grpo")], ids=" ".join
)
def test_the_exact_match_reward_rises(words: tuple[str, ...], folder: Path) -> None:
    finished, run = trained(folder, *words, "train.max_steps=16")
    lines = list(run.metrics())
    assert len(lines) == 16
    first, last = (sum(line["reward_exact_match"] for line in some) / 5 for some in (lines[:5], lines[-5:]))
    assert first < 0.8 and last > first + 0.15
    assert ("kl" in lines[-1]) == ("objective.beta=0.01" in words)
    after = finished.summary["eval"]["after"]
    assert after["exact_match"] == 1.0 == after["reward"] == after["reward_exact_match"]
    assert {"reward", "reward_std", "completion_tokens"} <= lines[0].keys()
    answers = [json.loads(line) for line in (run.path / "answers_after.jsonl").open(encoding="utf-8")]
    assert [row["answer"] for row in answers] == ["red"] * 6


def test_functions_are_weighted_and_a_users_own_one_gets_the_rows_fields(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def level(completions, level, **rest):\n    return [float(n) for n in level]\n")
    rewards = f"objective.rewards=[exact_match,'{file}:level']"
    _, run = trained(folder, "method=lora", "train.max_steps=1", rewards, "objective.reward_weights=[1,0.5]")
    (line,) = run.metrics()
    assert line["reward_level"] == 2
    assert line["reward"] == pytest.approx(line["reward_exact_match"] + 1.0)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("train.batch_size=12",), "train.batch_size=12 has no whole groups"),
        (("objective.max_new_tokens=96",), "leaves no room for a prompt"),
        (("eval.every_steps=2",), "eval.every_steps: objective=grpo"),
        (("train.on_loss_spike=skip",), "train.on_loss_spike=skip: the loss of objective=grpo"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], what: str, folder: Path) -> None:
    with pytest.raises(RequestError) as caught:
        spec_of(*preferences.words(folder, *GRPO, *words))
    (problem,) = [problem for problem in caught.value.problems if what in problem.what]
    assert problem.remedy


def test_too_few_prompts_are_an_error(folder: Path, tmp_path: Path) -> None:
    rows = preferences.write(tmp_path / "few.jsonl", [{"prompt": "What?", "answer": "red"}] * 2)
    with pytest.raises(RequestError, match="prompts, and a step takes 2"):
        preferences.train(folder, *GRPO, "method=lora", f"data.path={rows}")
