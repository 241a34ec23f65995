"""What the tests of the front share: the command line in this process, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from runner.cli.main import cli
from runner.cli.options import request_of
from runner.errors import Problem, RequestError
from runner.launcher import local
from runner.machine import detect
from runner.machine.detect import Machine
from runner.resolve.steps import resolved
from runner.rundir.directory import Outcome, RunDir
from runner.spec import RunSpec

LAPTOP = Machine(gpus=(), visible_devices=None, num_hidden_gpus=0, num_cpus=8, memory_gib=16.0, cpu_bf16=True)


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the tests, it looks like a laptop without a GPU."""
    monkeypatch.setattr(detect, "detect", lambda: LAPTOP)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, laptop: None) -> Path:
    """An empty working directory on such a laptop."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runner(*words: str) -> Result:
    """`python -m runner …` in this process."""
    return CliRunner().invoke(cli, list(words), prog_name="python -m runner")


def spec_of(*words: str, config_dirs: tuple[Path, ...] = ()) -> RunSpec:
    """What the words resolve to."""
    return resolved(request_of(words, config_dirs))[0]


def problems_of(*words: str, config_dirs: tuple[Path, ...] = ()) -> dict[str, Problem]:
    """What is wrong with the words, by the text of the problem."""
    with pytest.raises(RequestError) as caught:
        resolved(request_of(words, config_dirs))
    return {problem.what: problem for problem in caught.value.problems}


def only_problem(*words: str, **options: Any) -> Problem:
    """The one thing that is wrong with the words."""
    (problem,) = problems_of(*words, **options).values()
    return problem


def write(file: Path, text: str) -> Path:
    """A file with its folders."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[RunDir]:
    """The runs that got as far as their worker, which does nothing."""
    found: list[RunDir] = []

    def execute(run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: object = None) -> Outcome:
        found.append(run)
        return Outcome(run, 0)

    monkeypatch.setattr(local, "execute", execute)
    return found


def refused(here: Path, *words: str) -> str:
    """What is said of a run that is refused before anything is made, in one line."""
    before = sorted(here.iterdir())
    result = runner(*words)
    assert result.exit_code == 2, result.output
    assert sorted(here.iterdir()) == before
    assert "nothing was started" in result.stderr and "Loading" not in result.output
    return " ".join(result.stderr.split())
