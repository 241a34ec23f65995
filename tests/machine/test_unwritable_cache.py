"""A cache that cannot be written to is found before anything is loaded, and a plan says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.machine import writable
from tests.support.front import runner, spec_of, write

pytestmark = pytest.mark.usefixtures("here")

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(params=["a file in the way", "a file system that takes nothing"])
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place in which no folder can be made, by root neither."""
    return str(write(tmp_path / "file", "") / "sub") if request.param.startswith("a file in") else "/proc/runner"


@pytest.mark.parametrize("verb", [(), ("data", "prepare")])
def test_a_run_is_refused_before_it_starts(
    here: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str, verb: tuple[str, ...]
) -> None:
    monkeypatch.setenv("RUNNER_CACHE", nowhere)
    write(here / "x.jsonl", ROW * 40)
    result = runner(*verb, "data.path=x.jsonl", "train.max_steps=1")
    assert result.exit_code == 3
    assert f"the cache ({nowhere}) cannot be written to: " in result.stderr
    assert "→ name another folder: export RUNNER_CACHE=…" in result.stderr
    assert not (here / "runs").exists()


def test_a_plan_is_made_and_says_that_a_run_would_not_be(monkeypatch: pytest.MonkeyPatch, nowhere: str) -> None:
    monkeypatch.setenv("RUNNER_CACHE", nowhere)
    result = runner("plan", "--json")
    assert result.exit_code == 0
    (note,) = [note for note in json.loads(result.stdout)["notes"] if nowhere in note]
    assert "a run is refused; name another folder: export RUNNER_CACHE=…" in note


def test_the_hubs_cache_counts_where_something_is_to_be_downloaded(
    here: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", nowhere)
    (problem,) = writable.problems(spec_of("model=llama3_8b"))
    assert problem.what.startswith(f"the Hugging Face cache ({nowhere}) cannot be written to: ")
    assert [p.source for p in writable.problems(spec_of("data=hub", "data.id=a/b"))] == ["HF_HOME"]
    assert not list(writable.problems(spec_of()))  # the model comes with a package, the data with this project
    (here / "tiny").mkdir()
    assert not list(writable.problems(spec_of("model=hub", "model.id=./tiny")))


def test_rows_that_memory_does_not_hold_are_counted_all_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    monkeypatch.setenv("RUNNER_CACHE", nowhere)
    write(here / "x.jsonl", ROW * 40)
    monkeypatch.setattr("runner.data.load.IN_MEMORY_BYTES", 0)
    result = runner("data", "stats", "data.path=x.jsonl", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_rows"] + json.loads(result.stdout)["num_held_out"] == 40
