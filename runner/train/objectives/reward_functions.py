"""Reward functions for `objective=grpo`, by name or from a user's file.

Each is called as TRL calls one: lists of prompts and completions of one length, and every other field of the rows as a
list under its name; it answers with one number each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from runner.data import user_code
from runner.data.examples import Turn
from runner.errors import RequestError
from runner.spec import Grpo

Completion = str | Sequence[Turn]
"""Text, or turns of which the last is the answer."""
Reward = Callable[..., list[float]]


def text_of(completion: Completion) -> str:
    """The answer as text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact_match(completions: Sequence[Completion], answer: Sequence[str | list[str] | None], **_: Any) -> list[float]:
    """1 where the answer is the row's, or one of the row's list, but for white space around it."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(said).strip() in _rights(right)) for said, right in pairs]


def _rights(right: str | list[str] | None) -> list[str]:
    rights = right if isinstance(right, list) else [] if right is None else [right]
    return [str(one).strip() for one in rights]


def regex(pattern: str) -> Reward:
    """1 where the pattern is found; RequestError for one that cannot be read."""
    if problem := user_code.regex_problem(pattern):
        raise RequestError(problem)
    wanted = re.compile(pattern, re.DOTALL)

    def reward(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [float(wanted.search(text_of(said)) is not None) for said in completions]

    return reward


def length(target: int) -> Reward:
    """1 up to `target` characters, 0 from twice as many on, in between a straight line."""

    def reward(completions: Sequence[Completion], **_: Any) -> list[float]:
        return [max(0.0, min(1.0, 2 - len(text_of(said)) / target)) for said in completions]

    return reward


def json_validity(completions: Sequence[Completion], **_: Any) -> list[float]:
    """1 where the whole answer is JSON."""
    return [float(_is_json(text_of(said))) for said in completions]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def functions(objective: Grpo) -> list[Reward]:
    """The functions that `objective.rewards` names, each under that name; RequestError for one that is not there."""
    return [_named(_function(name, objective), name) for name in objective.rewards]


def _function(name: str, objective: Grpo) -> Reward:
    if name == "regex":
        return regex(str(objective.reward_regex))
    if name == "length":
        return length(objective.reward_length)
    known: dict[str, Reward] = {"exact_match": exact_match, "json": json_validity}
    return known[name] if name in known else user_code.load(name, "objective.rewards", "function")


def _named(function: Reward, name: str) -> Reward:
    """The function under a name of its own: TRL logs `__name__`."""

    def reward(**columns: Any) -> list[float]:
        return function(**columns)

    reward.__name__ = name.rpartition(":")[2]
    return reward
