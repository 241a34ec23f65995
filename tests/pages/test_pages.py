"""Pages, configuration and texts name only modules and files that are there; README's commands print what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures

NAME = re.compile(r"(?<![\w./-])runner(?:\.[A-Za-z_]\w*)+")
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


def _is_there(dotted: str) -> bool:
    """A module, or what a module without heavy imports has under this name, or has in its text."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if file.is_file():
            rest = parts[length:]
            return not rest or bool(re.search(rf"\b{rest[0]}\b", file.read_text("utf-8")))
    return False


def test_dotted_names_lead_to_a_module() -> None:
    """Also where nothing imports them: start commands, `code:` of YAML, monkeypatched names, pages."""
    found = {(file, name) for file, text in _texts() for name in NAME.findall(text)}
    assert len(found) > 1000
    lost = {(file, name) for file, name in found if name not in EXAMPLES and name != "runner.__file__"}
    assert sorted((file, name) for file, name in lost if not _is_there(name)) == []


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
        command, output = re.fullmatch(r"\$ ((?:.*\\\n)*.*)\n((?s:.*))", block).groups()  # type: ignore[union-attr]
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
