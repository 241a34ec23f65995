"""Typed values out of a row, and the problems with them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from runner.config import json_text
from runner.config.did_you_mean import nearest
from runner.data.examples import FunctionCall, Tool, ToolCall, Turn
from runner.data.readers.files import Row, kind_of
from runner.errors import Problem

ROLES = ("system", "user", "assistant", "tool")
# ShareGPT's, LLaMA-Factory's and OpenAI's names, common on the Hub.
OTHER_ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "ai": "assistant", "function_call": "assistant", "developer": "system",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # as transformers reads them
_OTHER_THOUGHTS = ("thought", "thoughts", "think", "cot", "chain_of_thought", "analysis")
# ms-swift's, Axolotl's and others' names for a turn that is learned or not; torchtune's for one that is not.
_LEARN = ("loss", "train", "training", "trainable", "learn", "loss_mask")
_HIDE = ("masked",)
_UNCLEAR = {
    "mask": ("may mean that the turn is learned or that it is not", "write loss: true or false in its place"),
    "train_detail": ("leaves out parts of a turn", "write train: true or false for the whole turn"),
    "training_detail": ("leaves out parts of a turn", "write train: true or false for the whole turn"),
}
_PERHAPS = re.compile(r"train|loss|learn|mask|ignore")
"""Others that may be meant so: `train_on_turn`, `is_trainable`, `ignore_loss`."""
_TURN = 'write {"role": "user", "content": "…"}'
_TURNS = 'write [{"role": "user", "content": "…"}, …]'
_ONCE = "leave one of them out"
_TRUTH = {"true": True, "false": False, "1": True, "0": False, "+1": True, "-1": False}


class RowReader:
    """Takes values out of one row and notes what is wrong with them."""

    def __init__(self, row: Row, where: str, roles: Mapping[str, str] | None = None, weight: str = "weight") -> None:
        self.row = row
        self.read: set[str] = set()
        """Columns that were looked at: what is not among them was left out."""
        self.where = where
        self.roles = OTHER_ROLES | dict(roles or {})
        self.weight = weight
        self.problems: list[Problem] = []

    def wrong(self, what: str, remedy: str | None = None) -> None:
        self.problems.append(Problem(what, self.where, remedy))

    def value(self, name: str) -> Any:
        """Return the field, or None if it is missing."""
        self.read.add(name)
        return self.row.get(name)

    def has(self, name: str) -> bool:
        """Return True if the field exists, and note a problem otherwise."""
        if name not in self.row:
            near = nearest(name, [str(key) for key in self.row])
            self.wrong(f"has no field {name}", f"is {near} misspelt?" if near else f"add {name}")
        return name in self.row

    def text(self, name: str, may_be_empty: bool = False) -> str:
        """Text that is there; `""` where it is not (and a problem)."""
        return self.content(name, self.value(name), may_be_empty) if self.has(name) else ""

    def optional(self, name: str) -> str:
        """Text that may be missing, null or empty."""
        value = self.value(name)
        absent = value is None or value != value  # NaN is what pandas has for a cell without a value
        return "" if absent else self.content(name, value, may_be_empty=True)

    def content(self, name: str, value: object, may_be_empty: bool = False) -> str:
        """`value` if it is text one can learn."""
        if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
            value = "".join(part["text"] for part in value)  # OpenAI's, Anthropic's and Bedrock's content in parts
        elif kinds := _other_parts(value):
            media = _MEDIA_PARTS.search(kinds[0])
            what = "only text is learned" if media else "parts of content are text"
            remedy = "leave the part out, or the row with data.on_error=skip" if media else _PARTS
            self.wrong(f"{name} has a part of the type {kinds[0]}, and {what}", remedy)
            return ""
        if not isinstance(value, str):
            self.wrong(f"{name} is {kind_of(value)}, not text", "write it as text in quotes")
            return ""
        if not value.strip() and not may_be_empty:
            self.wrong(f"{name} is empty", "fill it in, or delete the row")
        self.check_characters(name, value)
        return value

    def check_characters(self, name: str, value: object) -> None:
        """A problem where text, wherever in `value` it is, holds half of a surrogate pair."""
        try:  # JSON can spell it, and a tokenizer raises on it
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
        except UnicodeEncodeError:
            self.wrong(f"{name} holds half a character (\\ud800 to \\udfff)", "write the character itself")

    def truth(self, name: str) -> bool:
        """True or false, as JSON, CSV and LLaMA-Factory write it."""
        value = self.value(name) if self.has(name) else True
        said = str(value).strip().lower().removesuffix(".0")  # pandas makes a column of floats where a value is missing
        if isinstance(value, (bool, int, float, str)) and said in _TRUTH:
            return _TRUTH[said]
        self.wrong(f"{name} is {_short(value)}, neither true nor false", "write true or false, 1 or 0")
        return True

    def ids(self, name: str) -> list[int]:
        """A list of token ids or labels."""
        value = self.value(name) if self.has(name) else [0]
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            self.wrong(f"{name} is not a list of whole numbers", "write token ids such as [1, 15043, 2]")
            return []
        if not value:
            self.wrong(f"{name} is an empty list", "fill it in, or delete the row")
        return value

    def parsed(self, name: str, text: str, remedy: str) -> Any:
        """The JSON text of a field; None, and a problem, where it is broken or has a key twice in one object."""
        try:
            return json_text.loads(text, object_pairs_hook=json_text.once)
        except json.JSONDecodeError as error:
            self.wrong(f"{name} is broken JSON: {error.msg} (column {error.colno})", remedy)
        except json_text.RepeatedKeyError as error:
            self.wrong(f"{name}: {error} in one object", _ONCE)
        return None

    def tools(self, name: str) -> list[Tool]:
        """Tools as a list of schemas or as JSON text of one; none where there are none."""
        value = self.value(name)
        if isinstance(value, str) and value.strip():
            value = self.parsed(name, value, "write a list of JSON schemas")
        if not value:
            return []
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            self.wrong(f"{name} is {kind_of(value)}, not a list of tools", "write a list of JSON schemas")
            return []
        self.check_characters(name, value)
        return [_tool(tool) for tool in value]

    def turns(self, name: str, whole: bool = True) -> list[Turn]:
        """The turns of a conversation that are right; one that is not `whole` goes on after another field's."""
        if not self.has(name):
            return []
        value = self.value(name)
        if isinstance(value, str) and value.lstrip().startswith("["):  # CSV cannot hold a list
            value = self.parsed(name, value, _TURNS)
            if value is None:
                return []
        if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
            columns = zip(*value.values(), strict=False)  # of datasets' Sequence({…})
            value = [dict(zip(value, said, strict=True)) for said in columns]
        if not isinstance(value, list) or not value:
            what = "is an empty list" if value == [] else f"is {kind_of(value)}, not a list of turns"
            self.wrong(f"{name} {what}", _TURNS)
            return []
        if whole and len(value) > 1 and all(isinstance(said, str) for said in value):  # LIMA: questions and answers
            value = [{"role": ("user", "assistant")[index % 2], "content": said} for index, said in enumerate(value)]
        turns = [self._turn(f"{name}[{index}]", turn) for index, turn in enumerate(value)]
        if all(turns):
            self._check_order(name, [turn for turn in turns if turn], whole)
        return [turn for turn in turns if turn]

    def _turn(self, name: str, turn: object) -> Turn | None:
        if not isinstance(turn, dict):
            self.wrong(f"{name} is {kind_of(turn)}, not a turn", _TURN)
            return None
        role_key = next((key for key in ROLE_KEYS if key in turn), "role")
        content_key = next((key for key in CONTENT_KEYS if key in turn), "value" if role_key == "from" else "content")
        said = turn.get(role_key)
        calls = turn.get("tool_calls") or turn.get("function_call") or None
        silent = bool(calls) or self._role(said) == "tool"
        missing = [key for key in (role_key, content_key) if key not in turn and not (silent and key == content_key)]
        for key in missing:
            self.wrong(f"{name} has no {key}", _TURN)
        if missing:
            return None
        role = self._role(said)
        if role not in ROLES:
            near = nearest(str(role), ROLES)
            remedy = f"did you mean {near}?" if near else _as_role(role, name) if isinstance(role, str) else None
            self.wrong(f"{name} has the unknown role {role!r}", remedy)
            return None
        content = turn.get(content_key)
        if said == "function_call" and content:
            calls, content = content, ""
        content = "" if content is None and (calls or role == "tool") else content
        # An empty question happens in collected chats and does no harm; an empty answer teaches silence.
        empty_is_fine = role != "assistant" or bool(calls)
        found: Turn = {"role": role, "content": self.content(f"{name}.{content_key}", content, empty_is_fine)}
        self._add_rest(name, turn, calls, found)
        return found

    def _role(self, said: object) -> Any:
        """The role that a name means, however its letters are cased."""
        if not isinstance(said, str) or said in self.roles or said in ROLES:
            return self.roles.get(said, said) if isinstance(said, str) else said
        lower = said.strip().lower()
        return self.roles.get(lower, lower if lower in ROLES else said)

    def _add_rest(self, name: str, turn: Row, calls: object, found: Turn) -> None:
        """What only some turns have: weight, tool calls, thoughts, names."""
        self._add_weight(name, turn, found)
        if calls is not None:
            found["tool_calls"] = self._calls(f"{name}.tool_calls", calls)
        thought = next((turn[key] for key in (*THOUGHTS, *_OTHER_THOUGHTS) if turn.get(key)), None)
        if thought is not None:
            found["reasoning_content"] = self.content(f"{name}.reasoning_content", thought)
        if isinstance(turn.get("name"), str):
            found["name"] = turn["name"]
        if isinstance(turn.get("tool_call_id"), str):
            found["tool_call_id"] = turn["tool_call_id"]

    def _add_weight(self, name: str, turn: Row, found: Turn) -> None:
        """Weight 0 where any of the keys says that nothing of the turn is learned."""
        said: dict[str, bool] = {}
        for key in (self.weight, *_LEARN, *_HIDE):
            value = turn.get(key)
            weight = value.strip().lower() if isinstance(value, str) else value
            if isinstance(weight, (int, float, str)) and weight in (0, 1, "true", "false"):
                said[key] = (weight in (1, "true")) != (key in _HIDE)
            elif value is not None:
                no, yes = ("0", "1") if key == self.weight else ("true", "false")
                none = "0" if key == self.weight else "true" if key in _HIDE else "false"
                remedy = f"write {none} to learn nothing of it"
                self.wrong(f"{name}.{key} is {_short(value)}, neither {no} nor {yes}", remedy)
        unknown = [key for key in turn if key not in (self.weight, *_LEARN, *_HIDE) and turn[key] is not None]
        for key in unknown if found["role"] == "assistant" else ():
            if key in _UNCLEAR:
                self.wrong(f"{name}.{key} {_UNCLEAR[key][0]}", _UNCLEAR[key][1])
            elif _PERHAPS.search(str(key).lower()):
                remedy = f"write data.weight_field={key} where 0 or false says so, or loss: false in its place"
                self.wrong(f"{name}.{key} may say that the turn is not learned", remedy)
        if len(set(said.values())) > 1:
            self.wrong(f"{name} is to be learned by one of {', '.join(said)} and not by another", "write one of them")
        flag = next((key for key in _LEARN if said.get(key)), None)
        if flag and found["role"] != "assistant":
            what = f"{name}.{flag} is true, and the turn is not the assistant's"
            self.wrong(what, f"write {flag}: false, or nothing: objective.loss_on=all learns every turn")
        if not all(said.values()):
            found["weight"] = 0

    def _calls(self, name: str, calls: object) -> list[ToolCall]:
        """Calls in the one form that templates know, their arguments as an object."""
        found: list[ToolCall] = []
        for index, item in enumerate(_items(calls)):
            try:
                call: Any = _object(item)
                function = call.get("function", call)
                arguments = function.get("arguments", function.get("parameters", {}))
                if isinstance(arguments, str) and arguments.strip():
                    arguments = _object(arguments)
                known: FunctionCall = {"name": str(function["name"]), "arguments": {**(arguments or {})}}
            except json_text.RepeatedKeyError as error:
                self.wrong(f"{name}[{index}]: {error} in one object", _ONCE)
                continue
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
                remedy = 'write {"function": {"name": "…", "arguments": {…}}}'
                self.wrong(f"{name}[{index}] is no call of a function with its arguments in JSON", remedy)
                continue
            self.check_characters(f"{name}[{index}]", known)
            made: ToolCall = {"type": "function", "function": known}
            found.append({"id": call["id"], **made} if isinstance(call.get("id"), str) else made)
        return found

    def _check_order(self, name: str, turns: list[Turn], whole: bool) -> None:
        """A system prompt comes first, a tool answers a call, and the assistant does not speak before it is asked."""
        before = "" if whole else "assistant"
        for index, turn in enumerate(turns):
            role = turn["role"]
            if role == "system" and index and before != "system":
                self.wrong(f"{name}[{index}] is a system turn after the first turn", "put it first")
            if role == "tool" and before not in ("assistant", "tool"):
                self.wrong(f"{name}[{index}] is a tool's answer that nothing called for", "put the call before it")
            before = role
        first = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), None)
        asked = any(turn["role"] == "user" for turn in turns)
        if whole and first is not None and turns[first]["role"] == "assistant" and asked:
            self.wrong(f"{name}[{first}] is the assistant's, before any user turn", "put the question first")


def _as_role(said: str, name: str) -> str:
    """What to write for a role of another name, by the turn's number; Hydra reads ASCII alone in a mapping."""
    first, second = ("assistant", "user") if re.search(r"[13579]\]$", name) else ("user", "assistant")
    if said.isascii() and said.isidentifier():
        return f"write data.roles={{{said}:{first}}}, or {second}, system, tool"
    named = json.dumps(said, ensure_ascii=False)
    return f"write roles: {{{named}: {first}}}, or {second}, system, tool, below data in a recipe (docs/recipes.md)"


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


_MEDIA_PARTS = re.compile(r"image|video|audio|file|document")
_PARTS = "write text; thoughts as reasoning_content, calls as tool_calls, what a tool says as a turn of the role tool"


def _other_parts(value: object) -> list[str]:
    """Types of the parts of content that are no text; none where the value is no such list."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return []
    types = [str(part.get("type") or next(iter(part), "")) for part in value if not _is_text_part(part)]
    return [kind for kind in types if kind not in ("", "text")]


def _tool(tool: Tool) -> Tool:
    """A tool as templates know it; ShareGPT, xLAM and OpenAI's newer interface leave the function around it out."""
    if "function" in tool or "name" not in tool or tool.get("type", "function") != "function":
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _object(value: object) -> Any:
    """What JSON text says; what is no text stays. RepeatedKeyError for a key that occurs twice in one object."""
    return json_text.loads(value, object_pairs_hook=json_text.once) if isinstance(value, str) else value


def _items(calls: object) -> list[object]:
    """The calls of a turn: a list, one call, or the JSON text of either."""
    with suppress(json.JSONDecodeError, json_text.RepeatedKeyError):  # which the call itself is told
        calls = _object(calls)
    return calls if isinstance(calls, list) else [calls]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:39] + "…"
