"""Reward functions, called as TRL calls them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runner.errors import RequestError
from runner.spec import Grpo
from runner.train.objectives import reward_functions


def said(*texts: str) -> list[list[dict[str, str]]]:
    """Answers as TRL hands them over."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def of(name: str, *texts: str, answer: str | None = None, **knobs: object) -> list[float]:
    """What one function says of some answers to the same question."""
    (function,) = reward_functions.functions(Grpo.model_validate({"rewards": [name], **knobs}))
    columns = {"prompts": [[]] * len(texts), "completion_ids": [[]] * len(texts), "answer": [answer] * len(texts)}
    return function(completions=said(*texts), **columns)


def test_exact_match_is_exact_but_for_white_space_around() -> None:
    assert of("exact_match", "42", " 42\n", "42.", "", answer="42") == [1, 1, 0, 0]
    assert of("exact_match", "42") == [0]  # a row without an answer


def test_regex_finds_anywhere_and_over_lines() -> None:
    assert of("regex", "a\n#### 7", "#### x", reward_regex=r"####\s*\d+$") == [1, 0]


def test_length_falls_from_one_to_zero() -> None:
    assert of("length", "", "a" * 10, "a" * 15, "a" * 20, "a" * 99, reward_length=10) == [1, 1, 0.5, 0, 0]


def test_json_is_the_whole_answer() -> None:
    assert of("json", '{"a": [1]}', "3", "{a: 1}", 'so: {"a": 1}', "") == [1, 1, 0, 0, 0]


def test_a_function_of_ones_own_gets_the_rows_fields(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def level(completions, level, **rest):\n"
        "    return [len(c[-1]['content']) * n for c, n in zip(completions, level)]\n"
    )
    (function,) = reward_functions.functions(Grpo(rewards=[f"{file}:level"]))
    assert function.__name__ == "level"
    assert function(prompts=[[]], completions=said("abc"), completion_ids=[[]], level=[2]) == [6]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("gone.py:f", None, "there is no"),
        ("mine.py:g", "def f(): pass", "has no function g"),
        ("mine.py:f", "import nothing_like_it", "cannot be read: ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_a_users_file(name: str, content: str | None, what: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(RequestError, match=what):
        reward_functions.functions(Grpo(rewards=[f"{tmp_path}/{name}"]))


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(RequestError, match="reward_regex"):
        of("regex", "a", reward_regex="(")


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        ({"rewards": ["exact"]}, "objective.rewards=exact is none of"),
        ({"rewards": []}, "objective.rewards is empty"),
        ({"rewards": ["regex"]}, "needs a pattern"),
        ({"reward_weights": [1.0, 2.0]}, "2 numbers for 1 rewards"),
    ],
)
def test_the_schema_refuses(knobs: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what.replace("[", r"\[")):
        Grpo.model_validate(knobs)


def test_a_users_own_function_imports_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python FILE` does, whatever folder the run was started in."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_the_reward.py").write_text("def one(said):\n    return [1.0 for _ in said]\n")
    (tmp_path / "mine.py").write_text(
        "from beside_the_reward import one\ndef score(completions, **_):\n    return one(completions)\n"
    )
    assert of(f"{tmp_path / 'mine.py'}:score", "a", "b") == [1.0, 1.0]
