"""The sentence under each field of a class, read from its source.

pydantic's `use_attribute_docstrings` would parse that source again at every start of the runner.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel

from runner import spec


def meaning(part: type[BaseModel], name: str) -> str:
    """The sentence under a field of the schema, from the class that declares it; empty if there is none."""
    declared = (_of_schema().get(base.__name__, {}) for base in part.__mro__)
    return next((sentences[name] for sentences in declared if name in sentences), "")


@cache
def _of_schema() -> dict[str, dict[str, str]]:
    return sentences_in(sorted(Path(spec.__path__[0]).glob("*.py")))


def sentences_in(files: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Class → field → the string literal that stands under it, or under that of a base in the same module."""
    found: dict[str, dict[str, str]] = {}
    for file in files:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                above = [base.id for base in node.bases if isinstance(base, ast.Name)]
                inherited = {key: text for base in above for key, text in found.get(base, {}).items()}
                found[node.name] = inherited | dict(_documented(node.body))
    return found


def _documented(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, below in pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())
