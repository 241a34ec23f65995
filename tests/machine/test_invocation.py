"""A command that a message names works in the shell it was printed in."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import venv
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from runner.report import invocation
from runner.report.summary import print_summary
from runner.rundir.directory import RunDir
from runner.rundir.json_files import TrainSummary
from tests.conftest import ROOT


def outside(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell in which no virtual environment is active."""
    return {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}


def test_closing_words_of_make_run_name_the_interpreter_that_has_the_packages(tmp_path: Path) -> None:
    """As after `make run`: the shell's own `python` has nothing of this, `.venv/bin/python` has."""
    venv.create(tmp_path / ".venv", symlinks=True)
    site = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (own,) = (tmp_path / ".venv" / "lib").glob("python*/site-packages")
    (own / "all.pth").write_text(f"{ROOT}\n{site}\n")
    said = subprocess.run(
        [".venv/bin/python", "-m", "runner", "runs"],
        cwd=tmp_path,
        env=outside(tmp_path),
        capture_output=True,
        text=True,
    )
    assert said.stdout.strip() == "No runs in runs yet. Start one: .venv/bin/python -m runner"
    command = said.stdout.strip().partition("Start one: ")[2]
    again = subprocess.run(
        f"{command} list methods", shell=True, cwd=tmp_path, env=outside(tmp_path), capture_output=True, text=True
    )
    assert again.returncode == 0 and "qlora4" in again.stdout


def test_errors_name_it_too(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "runner", "runs/none/spec.json", "list"], cwd=ROOT, env=outside(tmp_path),
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 2
    assert f"{os.path.relpath(sys.executable, ROOT)} -m runner list …" in said.stderr


def test_an_active_environment_is_called_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert invocation.python() == "python"


def test_a_runs_last_words_are_spelled_for_this_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(invocation.VARIABLE, ".venv/bin/python")
    train = dict.fromkeys((*TrainSummary.__annotations__,), 1)
    said: Any = {
        "model": "m", "method": "lora", "data": "d", "train": train, "eval": {"before": {}, "after": {}},
        "seconds": 2, "peak_memory_gib": 1,
    }  # fmt: skip
    print_summary(console := Console(file=io.StringIO()), said, RunDir(tmp_path / "x"))
    assert isinstance(console.file, io.StringIO)
    assert f"Try it:  .venv/bin/python -m runner chat {tmp_path}/x" in console.file.getvalue()


def test_no_page_or_hint_installs_from_an_index() -> None:
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "runner").rglob("*.py")]
    assert len(files) > 300
    named = re.compile(r"pip install[^`\n]*llm-finetuning-runner")
    assert not [file for file in files if named.search(file.read_text("utf-8"))]
    assert ". .venv/bin/activate" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "as_typed"),
    [
        ("python -m runner list hw shows all", ".venv/bin/python -m runner list hw shows all"),
        ("pip install pyarrow", ".venv/bin/python -m pip install pyarrow"),
        ("run .venv/bin/python -m runner", "run .venv/bin/python -m runner"),  # is so already
        ("python -m runner.train spec.json", ".venv/bin/python -m runner.train spec.json"),
        ("python 3.10 is needed", "python 3.10 is needed"),
        (
            "a python -m runner; then pip install x",
            "a .venv/bin/python -m runner; then .venv/bin/python -m pip install x",
        ),
    ],
)
def test_commands_in_messages_are_spelled_for_this_shell(
    monkeypatch: pytest.MonkeyPatch, text: str, as_typed: str
) -> None:
    monkeypatch.setenv(invocation.VARIABLE, ".venv/bin/python")
    assert invocation.as_invoked(text) == as_typed


def test_a_pod_spells_commands_for_whoever_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker says in a pod is read at home: no path of the pod's interpreter may be in it."""
    monkeypatch.delenv(invocation.VARIABLE, raising=False)
    assert invocation.as_invoked("python -m runner resume runs/x") == "python -m runner resume runs/x"


def test_an_extra_is_installed_from_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert invocation.install("cloud") == "pip install -c constraints.txt -e '.[cloud]'"
    monkeypatch.chdir(tmp_path)
    assert invocation.install("cloud") == f"pip install -c {ROOT}/constraints.txt -e '{ROOT}[cloud]'"


def test_an_installed_wheel_gets_what_the_extra_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The project is on no index, so its name is of no use to pip."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(invocation, "ASSETS", tmp_path)  # as in a wheel: no pyproject.toml beside the choices
    command = invocation.install("cloud")
    assert "llm-finetuning-runner" not in command
    assert "boto3>=1.40" in command and "'runpod<3,>=2.0.0rc2'" in command
    assert not any(Requirement(line).name == "torch" for line in invocation.requirements("cloud"))
    assert "deepspeed" in " ".join(invocation.requirements("train"))  # a marker for Linux holds here
    assert any(line.startswith("moto[s3]") for line in invocation.requirements("emulator"))


def test_the_install_command_satisfies_pip(tmp_path: Path) -> None:
    """Typed literally, it resolves; nothing is installed here."""
    command = invocation.install("cloud").replace("pip install", f"{sys.executable} -m pip install --dry-run --no-deps")
    done = subprocess.run(command.replace("-e '.[", f"-e '{ROOT}[").replace("-c constraints", f"-c {ROOT}/constraints"),
                          shell=True, cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_pin_can_be_installed_on_every_python(python: str) -> None:
    """A package that has left the oldest Python needs a second pin for it."""
    refused = []
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if not line or line[0] == "#":
            continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"}):
            continue
        with suppress(PackageNotFoundError):
            package = distribution(pin.name)
            needed = SpecifierSet(package.metadata.get("Requires-Python") or "")
            if pin.specifier.contains(package.version) and not needed.contains(f"{python}.0"):
                refused.append(f"{line} wants Python {needed}")
    assert not refused
