"""Chat templates: a stranger's Jinja with our conversations, and a stranger's conversations with published templates."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

from runner.data import chat_template
from runner.data.chat_template import render_checked
from runner.data.chat_tokenizer import template_of
from runner.data.loss_mask import TurnFinder, learned_spans
from runner.errors import Problem, RequestError
from runner.spec import DataSpec
from tests.fuzz import mutate
from tests.fuzz.fuzzing import Target, fuzz
from tests.fuzz.test_rows import ROWS, SPECS, TOOLS

SOURCES = [file.read_text("utf-8") for file in chat_template.named_templates().values()]
CALL: Any = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CONVERSATIONS: list[list[Any]] = [
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2 + 2?"},
     {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [CALL]},
     {"role": "tool", "name": "add", "tool_call_id": "1", "content": "4"}, {"role": "assistant", "content": "4"}],
]  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if m.role == 'user' %}", "{% elif tools %}", "{% else %}", "{% endif %}",
    "{{ m.content }}", "{{ m['content'] | trim }}", "{{ messages[0].__class__.__mro__ }}", "{{ ''.__class__ }}",
    "{{ cycler.__init__.__globals__ }}", "{{ lipsum.__globals__['os'].popen('id').read() }}", "{{ self }}",
    "{% generation %}", "{% endgeneration %}", "{% set x = 'a' * 9999999999 %}", "{% set x = [0] * 9999999999 %}",
    "{% for i in range(99999) %}", "{% for i in range(999999999) %}", "{{ 9 ** (9 ** 9) }}", "{{ 'a' * (9 ** 12) }}",
    "{% set ns = namespace(x='aaaaaaaa') %}", "{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}", "{{ f(1) }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%d %b %Y') }}", "{{ strftime_now('%' * 999) }}", "{{ m | tojson }}",
    "{{ tools | tojson(indent=999999999) }}", "{{ '%9999999999d' % 1 }}", "{{ '{:9999999999}'.format(1) }}", "{{ 'a'.ljust(9999999999) }}",
    "{{ 'a' | center(9999999999) }}", "{{ 'a' | indent(999999999) }}", "{{ messages | sort }}", "{{ messages | map('first') | list }}",
    "{% while true %}", "{% do 1 %}", "{% call f(1) %}", "{% endcall %}", "{{ m.x.y.z }}", "{{ 1 / 0 }}", "{{ bos_token }}",
    "{{ 'x' | replace('', 'aaaaaaaaaa') }}", "{% break %}", "{% continue %}", "{% filter upper %}", "{% endfilter %}",
    "{{ messages | batch(1) | list }}", "{{ 'a' | wordwrap(0) }}", "{{ dict(a=1).update(b=2) }}", "{{ messages.append(1) }}",
    "{{ namespace().x }}", "{{ joiner()() }}", "{{ lipsum(n=9999999) }}", "{{ range(99999) | list | string }}",
)  # fmt: skip


EXPRESSIONS = tuple(piece for piece in PIECES if piece.startswith("{{"))
BLOCKS = (
    ("{% for m in messages %}", "{% endfor %}"), ("{% if tools %}", "{% endif %}"), ("{% filter upper %}", "{% endfilter %}"),
    ("{% if m.role == 'user' %}", "{% endif %}"), ("{% generation %}", "{% endgeneration %}"),
    ("{% for i in range(99999) %}", "{% endfor %}"), ("{% for i in range(999999999) %}", "{% endfor %}"),
    ("{% set x %}", "{% endset %}{{ x ~ x ~ x }}"), ("{% macro f(n) %}", "{{ f(n) }}{% endmacro %}{{ f(1) }}"),
    ("{% for m in messages recursive %}", "{{ loop(messages) }}{% endfor %}"),
    ("{% for m in messages %}<{{ m.role }}>{{ m.content }}", "</s>{% endfor %}"),
)  # fmt: skip
_EXPRESSION = re.compile(r"\{\{.*?\}\}", re.DOTALL)
_LITERAL = re.compile(r"'[^'{}%]*'|\b\d+\b")


def source(rng: Random) -> str:
    """A template, published or an enemy's; two of three can be parsed."""
    return rng.choice((altered, grown, spoiled))(rng)


def altered(rng: Random) -> str:
    """A published one of which expressions or literals are others: its blocks stay as they are."""
    text = rng.choice(SOURCES)
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = [*rng.choice((_EXPRESSION, _LITERAL)).finditer(text)]
        if not found:
            continue
        old = rng.choice(found)
        if old[0].startswith("{{"):
            new = rng.choice((rng.choice(found)[0], rng.choice(EXPRESSIONS), "", old[0] * 2))
        else:
            new = rng.choice((rng.choice(found)[0], "''", "'assistant'", "-1", "none", "messages", "m.content"))
        text = text[: old.start()] + new + text[old.end() :]
    return text


def grown(rng: Random, depth: int = 3) -> str:
    """One of whole blocks, each within others."""
    parts = []
    for _ in range(rng.randrange(1, 4)):
        begin, end = rng.choice(BLOCKS)
        inner = grown(rng, depth - 1) if depth else rng.choice(EXPRESSIONS)
        parts.append(rng.choice((rng.choice(EXPRESSIONS), begin + inner + end, begin + inner + end, "text\n")))
    return "".join(parts)


def spoiled(rng: Random) -> str:
    """Pieces of templates without regard to where a block ends."""
    text = rng.choice(SOURCES)
    if rng.random() < 0.4:
        return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 7)))
    for _ in range(rng.choice((1, 2))):
        parts = text.split("{%")
        at = rng.randrange(len(parts))
        parts[at] = rng.choice((rng.choice(PIECES), "", parts[rng.randrange(len(parts))], mutate.scalar_text(rng)))
        text = rng.choice(("{%", "{%", "{%-", rng.choice(PIECES))).join(parts)
    return mutate.broken(rng, text) if rng.random() < 0.3 else text


def read_source(text: str) -> None:
    """As training and previews use one: compiled, tried out, rendered."""
    template = chat_template.Template(text, SPECIAL)
    assert template.form
    for turns in CONVERSATIONS:
        _render(template, turns, TOOLS if len(turns) > 2 else [])


def _render(template: chat_template.Template, turns: list[Any], tools: list[Any]) -> None:
    asked, answer = turns[:-1], turns[-1:]
    try:
        shown = template.render([*asked, *answer], tools=tools)
        render_checked(template, asked, answer, tools)
        assert len(shown.text) < 10_000_000
    except RequestError:
        raise
    except Exception as error:  # a template may refuse in any way: all who render catch it (`_refusals`)
        if isinstance(error, (AssertionError, MemoryError)):
            raise
        raise RequestError(Problem(f"refused: {type(error).__name__}")) from None


TEMPLATES = [chat_template.Template(text, SPECIAL) for text in SOURCES]


def conversation(rng: Random) -> tuple[int, Any]:
    return rng.randrange(len(TEMPLATES)), mutate.mutated(rng, rng.choice(ROWS[:4]))


def read_conversation(given: tuple[int, Any]) -> None:
    """As `check_rows` and training: read, rendered, masked."""
    from runner.data.row_formats import detect_format, read_row

    number, row = given
    row = row if isinstance(row, dict) else {"messages": row}
    found = read_row(row, "x", SPECS[0], detect_format(row, SPECS[0], "sft"), "sft")
    template = TEMPLATES[number]
    try:
        shown = template.render([*found.prompt, *found.completion], tools=found.tools)
    except Exception as error:
        raise RequestError(Problem(f"refused: {type(error).__name__}")) from None
    learned_spans(found, "all", shown.text, shown.marks, TurnFinder(template))


SETTINGS = {
    "chat_template": SOURCES[0], "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None,
    "added_tokens_decoder": {"0": {"content": "<s>"}}, "additional_special_tokens": ["<a>"],
}  # fmt: skip
NAMED = SETTINGS | {
    "chat_template": [{"name": "default", "template": SOURCES[0]}, {"name": "tool_use", "template": SOURCES[1]}]
}


def settings(rng: Random) -> str:
    return mutate.json_text(rng, rng.choice((SETTINGS, NAMED)))


def test_a_template_renders_or_refuses_within_seconds() -> None:
    fuzz(Target("chat templates", source, read_source))


def test_a_conversation_renders_or_is_refused() -> None:
    fuzz(Target("conversations", conversation, read_conversation))


def test_a_tokenizers_settings_are_read_or_refused(tmp_path: Path) -> None:
    def read(text: str) -> None:
        (tmp_path / "tokenizer_config.json").write_text(text, "utf-8", "surrogatepass")
        found = template_of(tmp_path / "tokenizer.json", DataSpec(name="x", source="file", path="x.jsonl"))
        assert found is not None

    fuzz(Target("tokenizer_config.json", settings, read))
