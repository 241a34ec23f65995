"""docs/origin.md claims nothing that is not there: its commands work, its tests, files, headings and keys exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from tests.conftest import ROOT
from tests.support.emulated import Emulator, emulator
from tests.support.front import here, laptop, runner, write

__all__ = ["emulator", "here", "laptop"]  # fixtures

TEXT = (ROOT / "docs" / "origin.md").read_text("utf-8")
ROWS = [tuple(line.strip("| ").split(" | ")) for line in TEXT.splitlines() if re.match(r"\| \d+ \|", line)]
CELLS = [row[2] for row in ROWS]
CODE = sorted({code for cell in CELLS for code in re.findall(r"`([^`]+)`", cell)})
COMMANDS = [code for code in CODE if code.startswith("runner ")]
FILE = re.compile(r"(runner|tests|docs|conf|recipes|benchmarks)/[\w/.]+|constraints\.txt")
FILES = [code for code in CODE if FILE.fullmatch(code.partition("::")[0])]
KEYS = [code for code in CODE if re.fullmatch(r"(?!.*\.(json|jsonl|txt)$)[a-z]+\.[a-z_]+", code)]
DRY = {"plan", "show", "fit", "table", "list", "gpus", "runs"}
"""Verbs that rent, train and write nothing: typed as they stand."""


def test_there_is_a_row_for_every_statement() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert f"their {len(ROWS)} statements" in TEXT and TEXT.count("\n## ") == 5
    assert all(len(row) == 3 and row[2].strip() for row in ROWS)


def test_every_row_has_something_to_look_at_or_a_reason() -> None:
    links = re.compile(r"\]\(")
    bare = [row for row in ROWS if not (re.search("`", row[2]) or links.search(row[2]) or "therwise: " in row[2])]
    assert not bare


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A laptop without a GPU and with a key, in an empty folder."""
    monkeypatch.setenv("RUNNER_STATE", str(here / "state"))
    monkeypatch.setenv("RUNNER_CACHE", str(here / "cache"))
    write(here / "my.jsonl", '{"prompt": "2+2?", "completion": "4"}\n' * 40)
    return here


def test_the_commands_work(home: Path, emulator: Emulator) -> None:
    """Those that only look are typed; the first word of another is a verb, and its options are in its help."""
    failed = []
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        done = runner(*words) if words[0] in DRY or words in (["pods"], ["doctor"]) else _by_help(words)
        allowed = (0, 1) if words[0] == "doctor" else (0,)  # a machine without GPUs is not ready for all
        if done.exit_code not in allowed:
            failed.append(f"{command}: {done.exit_code}\n{done.output}")
    assert not failed, "\n\n".join(failed)
    assert emulator.pods() == {} and not any(e.method == "POST" for e in emulator.exchanges)


def _by_help(words: list[str]) -> Result:
    """The help of the verb, and every option of the words in it; keys are composed by `show`."""
    verbs = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
    if not verbs:  # a recipe
        return runner("show", *words)
    done = runner(*verbs, "--help")
    for option in (word for word in words if word.startswith("-")):
        assert option in done.output, (words, option)
    choices = [word for word in words if "=" in word and not word.startswith("-")]
    return runner("show", *choices) if choices and done.exit_code == 0 else done


@pytest.mark.parametrize("named", FILES)
def test_files_and_tests_exist(named: str) -> None:
    file, _, test = named.partition("::")
    assert (ROOT / file).is_file()
    assert not test or f"def {test}(" in (ROOT / file).read_text("utf-8")


def test_keys_are_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text("utf-8")
    assert [key for key in KEYS if f"| `{key}` |" not in reference] == []
    assert len(KEYS) > 30


def test_links_lead_to_headings() -> None:
    for place, anchor in _links():
        file = ROOT / "docs" / place
        assert file.is_file(), place
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings}, anchor


def _links() -> Iterator[tuple[str, str]]:
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        place, _, anchor = link.partition("#")
        yield place, anchor
