"""CONTRIBUTING.md's way to add choices, followed to the letter, passes the tests that look at choices."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
FILES = dict(re.findall(r"`(conf/\w+/\w+\.yaml)`.*?```yaml\n(.*?)```", TEXT, re.DOTALL))
TESTS = (
    "plan/test_models.py",
    "machine/test_hardware.py",
    "config/test_recipes.py",
    "config/test_reference.py",
    "data/test_commands.py",
    "config/test_suggestions.py",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree with the files of the page in it."""
    copy = tmp_path_factory.mktemp("checkout") / "runner"
    ignored = shutil.ignore_patterns(".*", "dist", "build", "__pycache__")
    shutil.copytree(
        ROOT, copy, ignore=lambda folder, names: {*ignored(folder, names), *["runs"] * (folder == str(ROOT))}
    )
    for name, content in FILES.items():
        assert not (ROOT / name).exists(), f"{name} is there already: the page needs another example"
        (copy / name).write_text(content, "utf-8")
    return copy


def typed(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python command in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True)


def test_there_is_a_file_of_every_kind() -> None:
    assert [name.split("/")[1] for name in FILES] == ["model", "hw", "method", "data", "method"]


def test_the_new_choices_compose_and_plan(checkout: Path) -> None:
    words = re.findall(r"python -m runner show (.*)", TEXT)[0].split()
    shown = typed(checkout, "-m", "runner", "show", *words)
    assert shown.returncode == 0, shown.stderr
    assert "id: TinyLlama/TinyLlama-1.1B-Chat-v1.0" in shown.stdout and "rank: 64" in shown.stdout
    assert "learning_rate: 0.0002\n" in shown.stdout  # the schema's: the model's file sets none
    planned = typed(checkout, "-m", "runner", "plan", *words)
    assert planned.returncode == 0 and "Fits" in planned.stdout, planned.stderr


def test_a_name_and_an_id_make_a_model(checkout: Path) -> None:
    folder = checkout / "mine" / "model"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text("name: small\nid: org/small\n")
    shown = typed(checkout, "-m", "runner", "show", "--config-dir", "mine", "model=small")
    assert shown.returncode == 0, shown.stderr


def test_the_tests_of_choices_pass_once_the_pages_are_made(checkout: Path) -> None:
    made = typed(checkout, "-m", "docs.generate")
    assert made.returncode == 0, made.stderr
    assert "tinyllama" in (checkout / "docs" / "choices.md").read_text("utf-8")
    done = typed(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in TESTS))
    assert done.returncode == 0, done.stdout[-3000:]
