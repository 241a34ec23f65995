"""Pages, configuration and texts name only modules and files that are there; README's commands print what it shows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures

NAME = re.compile(r"(?<![\w./-])runner(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(
    r"\bfrom ((?:runner|tests|benchmarks|docs)(?:\.\w+)*) import \(?\s*(\w+(?: as \w+)?(?:,\s*\w+(?: as \w+)?)*)"
)
FILE = re.compile(r"(?<![\w./-])(?:runner|tests|benchmarks|docs)(?:/[\w-]+)+\.(?:py|md|sh|json|yaml)\b")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ""}
EXAMPLES = {
    "runner.cloud.mycloud.provider", "runner/cloud/mycloud/provider.py",  # what CONTRIBUTING.md asks others to write
    "docs/performance.md",  # torchtitan's
    "runner/assets/conf/config.yaml",  # a wheel's
}  # fmt: skip


def _texts() -> Iterator[tuple[str, str]]:
    folders = ("runner", "conf", "recipes", "docs", "benchmarks", "tests", ".github", ".ci", ".devcontainer")
    below = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    for file in sorted({*ROOT.glob("*"), *ROOT.glob(".*.yaml"), *below}):
        if file.is_file() and file.suffix in SUFFIXES and "mutants" not in file.name:
            yield str(file.relative_to(ROOT)), file.read_text("utf-8", "replace")


@cache
def _file(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py", path) if each.exists()), None)


@cache
def _names(module: str) -> set[str]:
    """Every name that a module defines, imports or assigns, and the modules in a package."""
    path = ROOT.joinpath(*module.split("."))
    found = {each.stem for each in path.glob("*") if each.suffix in ("", ".py")}
    file = _file(module)
    if file is None or file.is_dir():
        return found
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(each.asname or each.name).split(".")[0] for each in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def _is_there(dotted: str) -> bool:
    """A module, or a name that a module has; what follows that name is not looked at."""
    parts = dotted.split(".")
    length = next((n for n in range(len(parts), 0, -1) if _file(".".join(parts[:n]))), 0)
    rest = parts[length:]
    return bool(length) and (not rest or rest[0].startswith("__") or rest[0] in _names(".".join(parts[:length])))


def _imported(text: str) -> Iterator[str]:
    """Names of this project that a text imports, also in programs in quotes and in examples of pages."""
    for module, names in IMPORT.findall(text):
        yield from (f"{module}.{name.split()[0]}" for name in names.split(","))


def _attributes(tree: ast.Module) -> Iterator[str]:
    """What a Python file takes from modules that it imports, or sets in them with `monkeypatch.setattr`."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    dotted = {each.asname or each.name: f"{node.module}.{each.name}" for node in imports for each in node.names}
    modules = {name: module for name, module in dotted.items() if _file(module)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name(name), attribute) if name in modules:
                yield f"{modules[name]}.{attribute}"
            case ast.Call(ast.Attribute(_, "setattr"), [ast.Name(name), ast.Constant(attribute), _]) if name in modules:
                yield f"{modules[name]}.{attribute}"


def test_dotted_names_lead_to_a_module() -> None:
    """Also where nothing imports them: start commands, `code:` of YAML, monkeypatched names, pages."""
    found = {(file, name) for file, text in _texts() for name in NAME.findall(text)}
    assert len(found) > 1000
    lost = {(file, name) for file, name in found if name not in EXAMPLES and name != "runner.__file__"}
    assert sorted((file, name) for file, name in lost if not _is_there(name)) == []


def test_imported_names_are_there() -> None:
    """Also in slow tests, which mypy does not read: a name that is gone is found without running what uses it."""
    found = {(file, name) for file, text in _texts() for name in _imported(text)}
    used = [(file, text) for file, text in _texts() if file.endswith(".py") and not file.startswith("runner/")]
    found |= {(file, name) for file, text in used for name in _attributes(ast.parse(text))}
    assert len(found) > 4000
    assert sorted((file, name) for file, name in found if name not in EXAMPLES and not _is_there(name)) == []


def test_paths_lead_to_a_file() -> None:
    found = {(file, path) for file, text in _texts() for path in FILE.findall(text)}
    assert len(found) > 200
    assert sorted(each for each in found if each[1] not in EXAMPLES and not (ROOT / each[1]).is_file()) == []


# ── README.md ──────────────────────────────────────────────────────────────────────────────────────


def _shown() -> list[tuple[str, list[str]]]:
    """What README.md shows of commands that only look: the words, and the lines under them but `…`."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    found = []
    for block in blocks:
        command, output = re.fullmatch(r"\$ ((?:.*\\\n)*.*)\n((?s:.*))", block).groups()  # type: ignore[union-attr]  # it fits
        words = command.replace("\\\n", " ").split()
        if words[:3] == ["python", "-m", "runner"] and words[3] != "chat":
            found.append((" ".join(words[3:]), [line for line in output.splitlines() if line.strip() not in ("", "…")]))
    return found


@pytest.mark.parametrize(("command", "lines"), _shown(), ids=lambda value: str(value)[:12])
def test_readme_shows_what_its_commands_print(
    command: str, lines: list[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    printed = [line.rstrip() for line in runner(*command.split()).output.splitlines()]
    assert [line for line in lines if line.rstrip() not in printed] == [], f"README.md: {command}"
    places = [printed.index(line.rstrip()) for line in lines]
    assert places == sorted(places) and len(lines) > 5
