"""Mutates valid documents: values swapped, keys dropped or renamed, deep nesting, huge numbers, broken text, cut bytes.

Structure-aware mutations reach code that random bytes do not: a document of which one part is wrong passes every check
that comes before that part.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

NESTED_TEXT = "[" * 100_000
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324, float("nan"),
    float("inf"), float("-inf"), "", " ", "0", "1e400", "NaN", "null", "true", "\0", "a\0b", "\ud800", "x\udfff", "\ufeff",
    "\u2028", "\x1b[2J", "\n", "\r\n", "../../etc/passwd", "/", ".", "~", "${x}", "{{ x }}", "{% x %}", "%s%n", "[", "{", "}]",
    "[{", '[{"role": "user"}]', '[{"role": "user", "content": "a"}, 1]', '"', "'", "\\", "é", "𝔘", "²", "٣", "a" * 10_000,
    NESTED_TEXT, "[{" + '"a":[{' * 1000 + "}]", "1" * 5000, "-", "--help", "1" * 50, "\ue0f0\ue0f1", "0x10", "1_000", "..", "<s>",
)  # fmt: skip
"""Values that are at the edge of something: a range, a format, an encoding, a path."""


def scalar(rng: Random) -> Any:
    return rng.choice(SCALARS)


def value(rng: Random, depth: int = 3) -> Any:
    """A value of any JSON type."""
    match rng.randrange(8) if depth else 0:
        case 1:
            return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
        case 2:
            return {key(rng): value(rng, depth - 1) for _ in range(rng.randrange(4))}
        case 3:
            return nested(rng)
        case _:
            return scalar(rng)


def key(rng: Random) -> str:
    """A name: mostly one that some reader knows."""
    return rng.choice(("role", "content", "from", "value", "name", "type", "function", "arguments", "text", "weight",
                       "id", "", "a", "\ud800", "\0", "é", "__class__", "x" * 300, "size", "sha256"))  # fmt: skip


def nested(rng: Random) -> Any:
    """A list or mapping within itself, to a depth that may still be meant; `deepened` goes further."""
    found: Any = scalar(rng)
    name = rng.choice((None, "a", "content", "text"))
    for _ in range(rng.choice((3, 30, 60))):
        found = [found] if name is None else {name: found}
    return found


def mutated(rng: Random, document: Any, times: int | None = None) -> Any:
    """The document (JSON values) with some of its parts changed; it stays as it was."""
    found = copied(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6)) if times is None else times):
        found = _once(rng, found)
    return found


def copied(document: Any) -> Any:
    """As deepcopy, without its memory of what was copied."""
    if isinstance(document, dict):
        return {name: copied(inner) for name, inner in document.items()}
    return [copied(inner) for inner in document] if isinstance(document, list) else copy.copy(document)


def _once(rng: Random, document: Any) -> Any:
    places = _places(document)
    if not places or rng.random() < 0.02:
        return value(rng)
    parent, at = rng.choice(places)
    match rng.randrange(12):
        case 0 | 1 | 2:
            parent[at] = scalar(rng)
        case 3:
            parent[at] = value(rng)
        case 4:
            del parent[at]
        case 5 if isinstance(parent, dict):
            parent[key(rng)] = parent.pop(at)
        case 5 | 6:
            parent[at] = [parent[at]]
        case 7:
            parent[at] = {key(rng): parent[at]}
        case 8:
            parent[at] = text_of(parent[at])
        case 9:
            other, there = rng.choice(places)
            with_other = other[there] if _has(other, there) else None
            parent[at] = copied(with_other)
        case 10 if isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copied(rng.choice(parent)))
        case 10 | 11:
            if isinstance(parent, dict):
                parent[key(rng)] = value(rng)
            else:
                parent[at] = None
    return document


def _has(parent: Any, at: Any) -> bool:
    return at in parent if isinstance(parent, dict) else at < len(parent)


def _places(document: Any, depth: int = 8) -> list[tuple[Any, Any]]:
    """Where values are in the document: container, and key or index."""
    if not depth or not isinstance(document, (dict, list)):
        return []
    items = list(document.items() if isinstance(document, dict) else enumerate(document))
    return [place for at, inner in items for place in ((document, at), *_places(inner, depth - 1))]


def text_of(document: Any) -> str:
    """As JSON, NaN and Infinity included; what is nested deeper than JSON's own writer goes is written by hand."""
    try:
        return json.dumps(document)
    except (RecursionError, ValueError):
        return NESTED_TEXT


def duplicated(rng: Random, text: str) -> str:
    """JSON text in which a key stands twice."""
    begin = text.find("{")
    if begin < 0 or not (name := text[begin + 1 :].split(":", 1)[0].strip()).startswith('"'):
        return text
    return f"{text[: begin + 1]}{name}: {text_of(scalar(rng))}, {text[begin + 1 :]}"


def broken(rng: Random, text: str) -> str:
    """Text that was changed as text: cut, doubled, a piece elsewhere, an odd piece put in."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, end = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        end = min(end, at + rng.choice((1, 3, 10, 1000)))
        match rng.randrange(6):
            case 0:
                text = text[:at]
            case 1:
                text = text[:at] + text[end:]
            case 2:
                text = text[:end] + text[at:end] * rng.choice((1, 2, 50)) + text[end:]
            case 3:
                text = text[:at] + str(scalar_text(rng)) + text[at:]
            case 4:
                text = text[:at] + rng.choice('"{}[]:,\\\n\t#&*!|>%@`-?') + text[end:]
            case 5:
                to = rng.randrange(len(text) + 1)
                text = text[:to] + text[at:end] + text[to:]
    return text[:400_000]


def deepened(rng: Random, text: str) -> str:
    """JSON text with nesting that a parser takes and a recursive walk may not, or that neither takes."""
    many = rng.choice((101, 200, 400, 900, 1100, 5000, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"content":', "}]")))
    at = rng.choice([place for place in ("null", "1", '"', "[") if place in text] or [text])
    return text.replace(at, f"{opening * many}1{closing * many}", 1)


def scalar_text(rng: Random) -> str:
    found = scalar(rng)
    return found if isinstance(found, str) else repr(found)


def garbled(rng: Random, data: bytes) -> bytes:
    """Bytes that were cut, flipped, or put in."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0:
                del content[at:]
            case 1:
                del content[at : at + rng.choice((1, 4, 100))]
            case 2 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 3:
                content[at:at] = rng.choice(
                    (b"\xff", b"\xfe\xff", b"\0", b"\xed\xa0\x80", b"\n", b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf")
                )
            case 4:
                content[at : at + 4] = rng.randbytes(4)
    return bytes(content)


def json_text(rng: Random, document: Any) -> str:
    """JSON text of a mutated document, at times broken as text, too."""
    text = text_of(mutated(rng, document))
    match rng.randrange(16):
        case 0 | 1:
            return broken(rng, text)
        case 2:
            return duplicated(rng, text)
        case 3:
            return deepened(rng, text)
        case 4:
            return text.encode("utf-8", "replace").decode()
        case _:
            return text
