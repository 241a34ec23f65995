"""Problems for the form: the keys that each is about, and remedies that one click applies."""

from __future__ import annotations

import re
from typing import TypedDict

from runner.config import conf_files
from runner.config.schema_keys import known_keys
from runner.errors import Problem, RunnerError

_WORD = re.compile(r"(?<![\w./])([a-z_]+(?:\.[A-Za-z0-9_]+)*)=(\"[^\"]*\"|'[^']*'|\[[^\]]*\]|[^\s,;?()]+)")
_KEY = re.compile(r"(?<![\w./])[a-z_]+(?:\.[A-Za-z0-9_]+)+")
_OPEN = re.compile(r"[A-Z]+(\.[A-Z]+)?")
"""Stands for what the user has to fill in: FILE, NAME, N."""
_BARE = re.compile(r"^did you mean ([\w.+-]+)\?$")


class Fix(TypedDict):
    """A button: what it says, and the values that it sets."""

    label: str
    set: dict[str, str]


class FormProblem(TypedDict):
    """A problem as the form shows it."""

    what: str
    source: str | None
    remedy: str | None
    keys: list[str]
    fixes: list[Fix]


def for_form(error: RunnerError) -> list[FormProblem]:
    """Every problem of an error, placed."""
    return [placed(problem) for problem in error.problems]


def placed(problem: Problem) -> FormProblem:
    """A problem beside its fields, with the changes that its remedy names."""
    keys = keys_in(problem.what)
    fixes = fixes_in(problem.remedy or "", keys)
    return {"what": problem.what, "source": problem.source, "remedy": problem.remedy, "keys": keys, "fixes": fixes}


def keys_in(text: str) -> list[str]:
    """Keys and groups that a text is about, in order."""
    typed = [match[1] for match in _WORD.finditer(text) if _settable(match[1])]
    named = [key for key in _KEY.findall(text) if key in known_keys()]
    choice = re.match(r"there is no (\w+) '", text)
    group = [choice[1]] if choice and choice[1] in (*conf_files.GROUPS, "recipe") else []
    return list(dict.fromkeys([*group, *typed, *named]))


def fixes_in(remedy: str, keys: list[str]) -> list[Fix]:
    """The changes that a remedy names: words side by side go together, those joined by `or` are alternatives."""
    fixes: list[Fix] = []
    for part in re.split(r",? or |; ", remedy):
        words = {
            m[1]: m[2].strip("'\"").rstrip(".") for m in _WORD.finditer(part) if _settable(m[1]) and "…" not in m[2]
        }
        words = {key: value for key, value in words.items() if not _OPEN.fullmatch(value)}
        if words and all(fix["set"] != words for fix in fixes):
            fixes.append({"label": " ".join(f"{key}={value}" for key, value in words.items()), "set": words})
    if not fixes and keys and (bare := _BARE.match(remedy)):
        fixes.append({"label": f"{keys[0]}={bare[1]}", "set": {keys[0]: bare[1]}})
    return fixes


def _settable(key: str) -> bool:
    return key in conf_files.GROUPS or key in known_keys() or key == "recipe"
