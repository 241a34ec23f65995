"""Checks that the rendered text of a conversation holds what its turns say.

Templates leave out what they were not made for, and say nothing: tool calls, thoughts, system prompts. They may trim a
value, indent it, write it as JSON, Python or XML: so texts are compared without white space, in each of these
spellings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from itertools import pairwise
from typing import Any

from runner.data.chat_template import MARK, Template
from runner.data.examples import Tool, Turn
from runner.errors import Problem, RequestError

THOUGHTS_END = "</think>"
"""Where thoughts that stand inside the content end; some templates take them from there."""
CHANCE = 24
"""Characters up to which words may be in a text by chance: in other turns, or in what the template says itself."""
_REMEDY = {
    "content": "set data.chat_template to one that shows it, or leave it out of the row",
    "reasoning": "set data.chat_template to one that shows it (such as deepseek), or leave it out of the row",
    "tool calls": "set data.chat_template to one that shows them (such as qwen), or leave them out of the row",
}


def refused(turns: Sequence[Mapping[str, Any]], error: Exception, where: str | None = None) -> Problem:
    """The problem with a conversation that a template refuses, and what is unusual in it to change."""
    roles = [str(turn.get("role")) for turn in turns]
    same = next((n for n, (one, next_one) in enumerate(pairwise(roles), 1) if one == next_one != "system"), None)
    if "tool" in roles or any(turn.get("tool_calls") for turn in turns):
        remedy = _REMEDY["tool calls"]
    elif same:
        both = f"join turns {same} and {same + 1}, both of the role {roles[same]}"
        remedy = f"{both}, or set data.chat_template to one that takes them apart (such as chatml)"
    elif "system" in roles:
        takes = "one that takes a system turn (such as chatml, or gemma, which puts it before the question)"
        remedy = f"set data.chat_template to {takes}, or leave it out: of the row, or data.system_prompt=null"
    else:
        remedy = "set data.chat_template to one that takes it (such as chatml), or leave the row out"
    return Problem(f"the model's chat template refuses a conversation: {error}", where, remedy)


def missing_part(turn: Turn, text: str) -> str | None:
    """What of an assistant's turn is not in `text`: `content`, `reasoning`, `tool calls`; None where all is.

    Each value takes up its place: two equal calls have to be there twice.
    """
    thoughts, _, content = turn["content"].rpartition(THOUGHTS_END)
    reasoning, calls = turn.get("reasoning_content", ""), turn.get("tool_calls") or []
    if not (thoughts or reasoning or calls) and content.strip() in text:
        return None
    parts: list[tuple[str, Any]] = [("content", content), ("reasoning", reasoning)]
    parts += [("reasoning", thought) for thought in thoughts.split("<think>")]
    for function in (call["function"] for call in calls):
        parts += [("tool calls", leaf) for leaf in (function["name"], *_leaves(function["arguments"]))]
    left = _bare(text)
    for what, value in sorted(parts, key=lambda part: -len(str(part[1]))):
        found = next((one for one in _spellings(value) if one in left), None)
        if found is None:
            return what
        left = left.replace(found, "\0", 1) if found else left
    return None


def check_given(template: Template, turns: Sequence[Turn], tools: Sequence[Tool], text: str, ask: bool = False) -> None:
    """RequestError where `text` leaves out what the model is given: system, user and tool turns, schemas of tools."""
    bare: str | None = None
    for index, turn in enumerate(turns):
        content = turn["content"].strip()
        if turn["role"] == "assistant" or not content:
            continue
        if found := content in text or any(one in (bare := bare or _bare(text)) for one in _spellings(content)):
            found = len(content) > CHANCE or _has_place(template, turns, index, tools, ask)
        if not found:
            what = f"the chat template does not show turn {index + 1}, of the role {turn['role']}"
            raise RequestError(Problem(what, None, _REMEDY["content"]))
    if tools and template.render(turns, ask).text == text:
        raise RequestError(Problem("the chat template does not show the row's tools", None, _REMEDY["tool calls"]))
    for part in dict.fromkeys(part for tool in tools for part in _described(tool)):
        bare = bare or _bare(text)
        if not any(one in bare for one in _spellings(part)):
            what = f"the chat template does not show {part[:60]!r} of the row's tools"
            remedy = 'describe their parameters as {"type": "object", "properties": {…}}, or ' + _REMEDY["tool calls"]
            raise RequestError(Problem(what, None, remedy))


def _has_place(template: Template, turns: Sequence[Turn], index: int, tools: Sequence[Tool], ask: bool) -> bool:
    """Whether other words in the place of a turn would be shown; of conversations with the same roles tried once."""
    form = (index, ask, bool(tools), *((turn["role"], bool(turn.get("tool_calls"))) for turn in turns))
    if form not in template.places:
        other: list[Turn] = [*turns[:index], {**turns[index], "content": MARK}, *turns[index + 1 :]]
        template.places[form] = True
        with suppress(Exception):  # a template may refuse in any way
            template.places[form] = MARK in template.render(other, ask, tools).text
    return template.places[form]


def _described(tool: Tool) -> Iterator[str]:
    """What every template that shows tools says of one: its name, what it does, the names of its parameters."""
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        return
    yield from (text for text in (function.get("name"), function.get("description")) if isinstance(text, str))
    parameters = function.get("parameters")
    if isinstance(parameters, dict):
        named = parameters.get("properties", {} if "type" in parameters else parameters)
        yield from map(str, named if isinstance(named, dict) else ())


def render_checked(
    template: Template, prompt: Sequence[Turn], answer: Sequence[Turn], tools: Sequence[Tool] = ()
) -> str:
    """A prompt with its answer as text; without one, up to where the assistant is to speak. RequestError where the
    text leaves something out, or as `Template.render` where the template refuses them."""
    said = [*prompt, *answer]
    text = template.render(said, not answer, tools).text
    check_given(template, said, tools, text, ask=not answer)
    for index, turn in enumerate(said):
        if index >= len(prompt) and turn["role"] == "assistant" and (lacks := missing_part(turn, text)):
            raise refusal(lacks, index)
    return text


def refusal(what: str, index: int) -> RequestError:
    """The error for what of turn `index` is missing."""
    return RequestError(Problem(f"the chat template does not show the {what} of turn {index + 1}", None, _REMEDY[what]))


def _leaves(value: object) -> Iterator[object]:
    """Names and values, whatever they are nested in."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _spellings(value: object) -> Iterator[str]:
    """How templates write a value, without white space."""
    if not isinstance(value, str):
        yield from dict.fromkeys(map(_bare, (json.dumps(value), str(value))))
        return
    yield _bare(value)
    for ascii_only in (False, True):
        written = json.dumps(value, ensure_ascii=ascii_only)[1:-1]
        yield _bare(written)
        yield _bare(json.dumps(written)[1:-1])  # JSON inside JSON
    yield _bare(repr(value)[1:-1])
    yield _bare(escape(value))


def _bare(text: str) -> str:
    return "".join(text.split())
