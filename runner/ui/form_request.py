"""What the form asks for → a request, as if it had been typed; every value is judged before Hydra sees it."""

from __future__ import annotations

import re
import shlex
from typing import Any

from runner.config import conf_files
from runner.config.command_line import Request
from runner.config.schema_keys import accepts_list, quoted
from runner.errors import Problem, RequestError
from runner.ui import confined

_KEY = re.compile(r"[a-z_]+(\.[A-Za-z0-9_]+)+")
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_PLAIN = re.compile(r"[\w./\\:@+%-]+", re.ASCII)
"""Values that Hydra's grammar reads as written."""


def words_of(asked: dict[str, Any]) -> list[str]:
    """The words of a form: `{"recipe": name or null, "choices": {group: name}, "values": {key: text}}`.

    RequestError with everything in it that is no choice, no key or no value.
    """
    words: list[str] = []
    problems: list[Problem] = []
    recipe, choices, values = asked.get("recipe"), texts_of(asked, "choices"), texts_of(asked, "values")
    try:
        words += [f"recipe={confined.recipe_of(recipe)}"] if isinstance(recipe, str) and recipe else []
    except RequestError as error:
        problems += error.problems
    for group, name in choices.items():
        if group not in conf_files.GROUPS or not _NAME.fullmatch(name):
            problems.append(Problem(f"{group}={name!r} is no choice", "page"))
        else:
            words.append(f"{group}={name}")
    for key, text in values.items():
        if not _KEY.fullmatch(key):
            problems.append(Problem(f"{key!r} is no key", "page"))
            continue
        try:
            confined.check_value(key, text)
            words.append(word_of(key, text))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)
    return words


def texts_of(asked: dict[str, Any], name: str) -> dict[str, str]:
    """A mapping of texts; RequestError for anything else."""
    found = asked.get(name) or {}
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in found.items()):
        raise RequestError(Problem(f"{name} is to be an object of texts", "page"))
    return found


def names_of(asked: dict[str, Any], name: str) -> list[str]:
    """A list of texts; RequestError for anything else."""
    found = asked.get(name) or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise RequestError(Problem(f"{name} is to be a list of texts", "page"))
    return found


def word_of(key: str, text: str) -> str:
    """`key=value` as Hydra reads it: anything but a plain value or a list is quoted."""
    if _PLAIN.fullmatch(text) or (text[:1] in "[{" and (accepts_list(key) or text[:1] == "{")):
        return f"{key}={text}"
    return f"{key}={quoted(text)}"


def request_of(words: list[str]) -> Request:
    """The request of such words."""
    return Request(None, tuple(words), (), None, (), ("where", "track"))


def command_line(words: list[str], verb: str = "") -> str:
    """The command that does the same in a shell."""
    return " ".join(["python -m runner", *([verb] if verb else []), *map(shlex.quote, words)])
