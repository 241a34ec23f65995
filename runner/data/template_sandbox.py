"""A stranger's Jinja: compiled in a sandbox, and refused where it would never end or fill the memory.

Jinja's sandbox keeps a template from Python's insides, and from a `range` of over 100,000; it does not bound the time
nor what `*`, `~`, `{% set %}` in a loop, `center` or `'%9999999999d'` make. Every operation that can make much is
bounded here, and every pass of a loop and every call looks at the clock; so what is left to one operation is short.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime
from functools import cache, lru_cache, wraps
from importlib import import_module
from typing import Any

from runner.errors import Problem, RequestError

BEGIN, END = "\ue0f0\ue0f1", "\ue0f1\ue0f0"
"""Around what a template marks as {% generation %}; of Unicode's private use: no text one learns from holds the two."""
SECONDS = 2.0
"""CPU time of one conversation: a thousand turns in a template of ours take 0.016 at most."""
SLOW, LEAST = 0.25, 0.5
"""After every conversation of over `SLOW` seconds a template has half of its time left for each, but no less than
`LEAST`: a check renders a dozen, and one template is not to hold it up for a dozen times two seconds."""
LARGEST = 1 << 24
"""Characters of a text: some million tokens."""
ELEMENT = 16
"""Characters that an element of a list counts as."""
LARGEST_ARGUMENT = 100_000
"""Of widths, counts, indents; Jinja's own limit of `range`."""
_WIDTH = re.compile(r"\d{6}|[%{][^%}]*\*")
_deadline: ContextVar[float] = ContextVar("deadline")


@lru_cache(maxsize=16)
def compiled(source: str) -> Callable[..., str]:
    """A template's function: conversation → text. RequestError for one that is no Jinja.

    As transformers compiles it: trimmed blocks, `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`. The
    function raises jinja2.TemplateError, or whatever else the template does, where it refuses a conversation.
    """
    environment = _environment()
    try:
        render: Callable[..., str] = environment.from_string(source).render
    except Exception as error:  # Jinja leaves `{% break %}` outside of a loop to Python's compiler
        line = getattr(error, "lineno", None)
        why = getattr(error, "message", None) or getattr(error, "msg", None) or f"{type(error).__name__}: {error}"
        what = f"the chat template is no Jinja: {f'line {line}: ' if line else ''}{why}"
        raise RequestError(Problem(what, None, "set data.chat_template to another file")) from None

    left = SECONDS

    def bounded(**given: object) -> str:
        nonlocal left
        began = time.thread_time()
        token = _deadline.set(began + left)
        try:
            return render(**given)
        finally:
            _deadline.reset(token)
            if time.thread_time() - began > SLOW:
                left = max(left / 2, min(left, LEAST))

    return bounded


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: Jinja's own would escape < and >."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@cache
def _environment() -> Any:
    """The one environment; its classes are made here, as Jinja takes 40 ms to read."""
    try:
        jinja2: Any = import_module("jinja2")
        sandbox, ext, visitor = (import_module(f"jinja2.{name}") for name in ("sandbox", "ext", "visitor"))
    except ImportError:
        raise RequestError(Problem("chat templates need jinja2", None, "pip install jinja2")) from None
    nodes = jinja2.nodes

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def look_at_the_clock() -> str:
        if time.thread_time() > _deadline.get(float("inf")):
            refuse("it takes seconds of CPU time for one conversation")
        return ""

    def check_size(size: int) -> None:
        if size > LARGEST:
            refuse(f"it makes more than {LARGEST:,} characters")

    def check_value(value: object) -> object:
        """The value. A list of two lists of two lists … is small, and its text is not: all that is in it counts."""
        size, level = 0, [value]
        while level:
            size += sum(len(one) if isinstance(one, str) else ELEMENT for one in level)
            check_size(size)
            parts = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, _CONTAINERS))
            level = [inner for part in parts for inner in part]
        return value

    def concat(parts: Iterable[str]) -> str:
        found, size = [], 0
        for part in parts:
            found.append(part)
            size += len(part)
            check_size(size)
        return "".join(found)

    def check_call(name: str, value: object, given: Iterable[object]) -> None:
        """Widths and counts, and what each character of a text becomes."""
        look_at_the_clock()
        for one in given:
            if isinstance(one, int) and abs(one) > LARGEST_ARGUMENT:
                refuse(f"{name} is given {one if abs(one) < 10**20 else 'a very large number'}")
            elif isinstance(one, str) and isinstance(value, (str, list, tuple)) and name in ("replace", "join"):
                check_size(len(value) * len(one))

    class Bound(visitor.NodeTransformer):  # type: ignore[misc, name-defined]  # jinja2 is read when it is needed
        """Puts a look at the clock before every pass of a loop and body of a macro, and bounds `~`."""

        def generic_visit(self, node: object, *args: object, **kwargs: object) -> object:
            node = super().generic_visit(node, *args, **kwargs)
            if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)):
                clock = nodes.Call(nodes.EnvironmentAttribute("look_at_the_clock"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(clock).set_lineno(node.lineno))
            if isinstance(node, nodes.Concat):
                joined = nodes.EnvironmentAttribute("joined")
                return nodes.Call(joined, list(node.nodes), [], None, None).set_lineno(node.lineno)
            return node

    class Environment(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc, name-defined]  # as `Bound`
        intercepted_binops = frozenset({"*", "**", "%", "+"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> object:
            return Bound().visit(super()._parse(source, name, filename))

        def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
            sizes = [len(one) if isinstance(one, (str, list, tuple)) else None for one in (left, right)]
            if operator == "+" and None not in sizes:
                check_size(sum(sizes))  # type: ignore[arg-type]  # none is None
            elif operator == "*":
                count = next((one for one in (left, right) if isinstance(one, int)), 0)
                check_size(max(sizes[0] or 0, sizes[1] or 0) * max(0, count))
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                check_size(left.bit_length() * abs(right) * 100)
            elif operator == "%" and isinstance(left, str) and _WIDTH.search(left):
                refuse("it formats to a width of a million, or to one that is not written there")
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value: Any) -> Any:
            found = super().wrap_str_format(value)
            if found is not None and _WIDTH.search(value.__self__):
                refuse("it formats to a width of a million")
            return found

        def call(__self, __context: object, __obj: object, *args: object, **kwargs: object) -> Any:  # noqa: N805  # as Jinja's own
            if __obj is not look_at_the_clock:
                name = str(getattr(__obj, "__name__", ""))
                check_call(name, getattr(__obj, "__self__", None), (*args, *kwargs.values()))
            return super().call(__context, __obj, *args, **kwargs)

    def checked(name: str, own: Callable[..., object]) -> Callable[..., object]:
        @wraps(own)  # with the mark of a filter that wants the environment
        def run(*args: object, **kwargs: object) -> Any:
            values = [one for one in args if not isinstance(one, (jinja2.Environment, nodes.EvalContext))]
            values = [one for one in values if not isinstance(one, jinja2.runtime.Context)]
            check_value(values[0]) if values else None
            check_call(name, values[0] if values else None, (*values[1:], *kwargs.values()))
            return own(*args, **kwargs)

        return run

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(jinja2, ext), "jinja2.ext.loopcontrols"],
        finalize=lambda value: check_value(value) if isinstance(value, _CONTAINERS) else value,
    )  # fmt: skip
    environment.filters["tojson"] = to_json
    environment.filters = {name: checked(name, own) for name, own in environment.filters.items()}
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del environment.globals["lipsum"]
    environment.concat = concat
    environment.look_at_the_clock = look_at_the_clock
    environment.joined = lambda *parts: concat(map(str, map(check_value, parts)))
    return environment


_CONTAINERS = (list, tuple, dict)


def _generation(jinja2: Any, ext: Any) -> type:
    """transformers' `{% generation %}` tag: here it puts marks around what it encloses."""

    class Generation(ext.Extension):  # type: ignore[misc]  # jinja2 is read when it is needed
        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            return f"{BEGIN}{caller()}{END}"

    return Generation
