"""Chat templates: where they come from, and conversations rendered with them.

They are compiled as transformers compiles them (template_sandbox.py), without importing it: a preview takes a moment,
and a process that tokenises stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.config.suggestions import nearest
from runner.data.examples import Tool, ToolCall, Turn
from runner.data.template_sandbox import BEGIN, END, compiled, to_json
from runner.errors import Problem, RequestError
from runner.paths import CONF

FOLDER = CONF / "chat_template"

Message = dict[str, object]
"""A turn in the form that a template reads."""
MARK = "\ue000\ue001\ue000"
"""Of Unicode's private use: neither trimmed nor a beginning or end of anybody's words."""
CALL_OF_MARKS: ToolCall = {"type": "function", "function": {"name": MARK, "arguments": {MARK: MARK}}}
"""A call of which each part is to be found in the text."""


@dataclass(frozen=True)
class Form:
    """How a template reads what only some turns have; transformers documents one way, published templates know more."""

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


def named() -> dict[str, Path]:
    """The templates one can call by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.jinja"))}


def template_source(choice: str, adds_bos: bool = False) -> str:
    """The Jinja source of `data.chat_template`: a name, or a file; RequestError where it is neither.

    `adds_bos`: the tokenizer begins every text with BOS, and its model has seen no other. A template does it itself
    (nothing is added to what it renders), so one of ours does then; a user's own file stays as it is.
    """
    ours = named().get(choice)
    file = ours or Path(choice).expanduser()
    try:
        source = file.read_text("utf-8")
        return "{{- bos_token -}}" + source if ours and adds_bos and "bos_token" not in source else source
    except (OSError, UnicodeDecodeError) as error:
        near = nearest(choice, list(named()))
        remedy = f"did you mean {near}?" if near else f"name a Jinja file, or one of {', '.join(named())}"
        reason = getattr(error, "strerror", None) or "is not text"
        raise RequestError(Problem(f"data.chat_template={choice}: {reason}", None, remedy)) from None


def with_tools(default: str, tool_use: str | None) -> str:
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
        """Form of a conversation, with the number of a turn in it → whether that is shown (rendered_text_checks.py)."""

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
