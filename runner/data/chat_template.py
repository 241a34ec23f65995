"""Chat templates: where they come from, conversations rendered with them, and a check that nothing was left out.

They are compiled as transformers compiles them (template_sandbox.py), without importing it: a preview takes a moment,
and a process that tokenises stays small.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from runner.config.did_you_mean import nearest
from runner.data.examples import Tool, ToolCall, Turn
from runner.data.template_sandbox import BEGIN, END, compiled, to_json
from runner.errors import Problem, RequestError
from runner.paths import CONF

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
    """Return the part of an assistant turn that is missing in `text`: `content`, `reasoning`, `tool calls`; None if
    nothing is.

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
            raise left_out_problem(lacks, index)
    return text


def left_out_problem(what: str, index: int) -> RequestError:
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


FOLDER = CONF / "chat_template"

Message = dict[str, object]
"""A turn in the form that a template reads."""
MARK = "\ue000\ue001\ue000"
"""Of Unicode's private use: neither trimmed nor a beginning or end of anybody's words."""
CALL_OF_MARKS: ToolCall = {"type": "function", "function": {"name": MARK, "arguments": {MARK: MARK}}}
"""A call of which each part is to be found in the text."""


@dataclass(frozen=True)
class Form:
    """Field names by which a template reads optional parts of a turn."""

    reasoning: str = "reasoning_content"
    """gpt-oss reads `thinking`."""
    text_arguments: bool = False
    """DeepSeek's join the arguments of a call to text, which an object cannot be."""
    null_content: bool = False
    """Of a turn that only calls: DeepSeek-R1's show calls only then."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the text that is tokenised."""

    text: str
    marks: list[tuple[int, int]]
    """Where the template says, by `{% generation %}`, that the assistant speaks: [begin, end) in characters."""


def named_templates() -> dict[str, Path]:
    """The templates one can call by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}


def template_source(choice: str, adds_bos: bool = False) -> str:
    """The Jinja source of `data.chat_template`: a name, or a file; RequestError where it is neither.

    `adds_bos`: the tokenizer begins every text with BOS, and its model has seen no other. A template does it itself
    (nothing is added to what it renders), so one of ours does then; a user's own file stays as it is.
    """
    ours = named_templates().get(choice)
    file = ours or Path(choice).expanduser()
    try:
        source = file.read_text("utf-8")
        return "{{- bos_token -}}" + source if ours and adds_bos and "bos_token" not in source else source
    except (OSError, UnicodeDecodeError) as error:
        near = nearest(choice, list(named_templates()))
        remedy = f"did you mean {near}?" if near else f"name a Jinja file, or one of {', '.join(named_templates())}"
        reason = getattr(error, "strerror", None) or "is not text"
        raise RequestError(Problem(f"data.chat_template={choice}: {reason}", None, remedy)) from None


def with_tool_template(default: str, tool_use: str | None) -> str:
    """One template for a model that has two: transformers takes the one named `tool_use` where there are tools."""
    if tool_use is None or tool_use == default:
        return default
    kept = "{{ '' }}"  # blocks trim the white space next to them
    parts = [f"{kept}{source.removesuffix(chr(10))}{kept}" for source in (tool_use, default)]
    return f"{{% if tools %}}{parts[0]}{{% else %}}{parts[1]}{{% endif %}}"


class Template:
    """One compiled template, with the special tokens it may name."""

    def __init__(self, source: str, special: dict[str, str]) -> None:
        """`special` as in tokenizer_config.json: `bos_token`, `eos_token`, …; RequestError for one that is no Jinja."""
        self.source, self.special = source, special
        self._render = compiled(source)
        self.places: dict[Any, bool] = {}
        """Form of a conversation, with the number of a turn in it → whether that is shown (`_has_place`)."""

    def render(self, turns: Sequence[Turn], ask: bool = False, tools: Sequence[Tool] = ()) -> Rendered:
        """The conversation as text; `ask` ends it where the assistant is to speak.

        Raises jinja2.TemplateError, or whatever else the template does, where it refuses the conversation.
        """
        return self.render_messages(self.messages(turns), ask, tools)

    def render_messages(self, messages: Sequence[Message], ask: bool = False, tools: Sequence[Tool] = ()) -> Rendered:
        """The same, of turns that are in the template's form already (`messages`)."""
        text = self._render(
            messages=list(messages), add_generation_prompt=ask, tools=list(tools) or None, documents=None,
            **self.special,
        )  # fmt: skip
        if BEGIN not in text:
            return Rendered(text, [])
        return _unmarked(text)

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Turns in the form that the template reads."""
        return [self._message(turn) for turn in turns]

    def _message(self, turn: Turn) -> Message:
        message: Message = {key: value for key, value in turn.items() if key != "weight"}
        return _in_form(message, self.form) if "reasoning_content" in turn or turn.get("tool_calls") else message

    @cached_property
    def form(self) -> Form:
        """Tried out with one turn that thinks and one that calls, as nothing in a template states it."""
        names = ("reasoning_content", "thinking", "reasoning")
        calls = [Form(text_arguments=text, null_content=null) for null in (False, True) for text in (False, True)]
        calling = next((form for form in calls if self._shows({"tool_calls": [CALL_OF_MARKS]}, form, 3)), Form())
        thoughts = [replace(calling, reasoning=name) for name in names]
        said: list[dict[str, Any]] = [{"content": "!"}, {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
        tries = [(form, turn) for turn in said for form in thoughts]
        return next((form for form, turn in tries if self._shows(turn | {"reasoning_content": MARK}, form, 1)), calling)

    def _shows(self, turn: Message, form: Form, marks: int) -> bool:
        """Whether all marks of the turn are in the text."""
        asked = {"role": "user", "content": "?"}
        message = _in_form({"role": "assistant", "content": "", **turn}, form)
        try:
            text = self._render(messages=[asked, message], add_generation_prompt=False, tools=None, documents=None,
                                **self.special)  # fmt: skip
        except Exception:  # a template may refuse in any way
            return False
        return text.count(MARK) >= marks


def _in_form(message: dict[str, Any], form: Form) -> dict[str, Any]:
    if "reasoning_content" in message:
        message[form.reasoning] = message.pop("reasoning_content")
    if calls := message.get("tool_calls"):
        if form.text_arguments:
            message["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": to_json(call["function"]["arguments"])}}
                for call in calls
            ]
        message["content"] = message["content"] or (None if form.null_content else "")
    return message


def _unmarked(text: str) -> Rendered:
    parts: list[str] = []
    marks: list[tuple[int, int]] = []
    length = 0
    for number, part in enumerate(text.split(BEGIN)):
        inside, _, outside = part.partition(END) if number else ("", "", part)
        marks += [(length, length + len(inside))] if number else []
        parts += [inside, outside]
        length += len(inside) + len(outside)
    return Rendered("".join(parts), marks)
