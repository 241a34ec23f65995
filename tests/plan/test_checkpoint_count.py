"""How many checkpoints a plan counts: what a run of that length would write."""

from __future__ import annotations

from typing import Any

import pytest

from runner.config.command_line import Request
from runner.errors import RequestError
from runner.plan.cost import Checkpoints, checkpoints_of
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.runs import resume
from runner.spec import RunSpec, TrainSpec
from tests.conftest import spec_of


def count(seconds: float = 1.0, step_seconds: float | None = 10.0, num_steps: int | None = 1000, **train: Any) -> Any:
    return checkpoints_of(TrainSpec(**train), seconds=seconds, step_seconds=step_seconds, num_steps=num_steps)


def test_a_run_shorter_than_the_interval_writes_the_last_one_alone() -> None:
    assert count(num_steps=90) == Checkpoints(1, 1, 15.0)
    assert count(num_steps=91) == Checkpoints(2, 2, 15.0)


def test_a_longer_one_has_one_more_than_it_keeps_for_a_while() -> None:
    assert count() == Checkpoints(12, 3, 15.0)  # 10,000 s: eleven by the clock, and the last one
    assert count(keep_checkpoints=4).at_once == 5
    assert count(keep_checkpoints=0).at_once == 2


def test_steps_longer_than_the_interval_are_all_followed_by_one() -> None:
    assert count(step_seconds=2000.0, num_steps=5).written == 5


def test_steps_and_minutes_count_both() -> None:
    assert count(save_every_minutes=None) == Checkpoints(1, 1, None)
    assert count(save_every_minutes=None, save_every_steps=100) == Checkpoints(10, 3, None)
    assert count(save_every_steps=10).written == 100
    assert count(save_every_steps=500).written == 12


def test_a_large_one_comes_seldom() -> None:
    assert count(seconds=1655).minutes == pytest.approx(1655 * 20 / 60)
    assert count(seconds=1655).written == 1


def test_what_is_not_known_counts_as_a_long_run() -> None:
    for unknown in ({"num_steps": None}, {"step_seconds": None}):
        assert count(**unknown) == Checkpoints(None, 3, 15.0)
    assert count(step_seconds=None, save_every_minutes=None, save_every_steps=100).written == 10


# ── resume, before anything starts ─────────────────────────────────────────────────────────────


@pytest.fixture
def done(tmp_path: Any) -> RunDir:
    """A run of four steps that is done, with its last checkpoint."""
    spec: RunSpec = spec_of("hw=cpu", "train.max_steps=4", f"run.output_dir={tmp_path}")
    run = RunDir.create(spec)
    folder = checkpoints.folder(run, 4)
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"state")
    checkpoints.seal(folder, {"step": 4})
    run.set_status("done", step=4, exit_code=0)
    return run


def check(run: RunDir, *words: str) -> RunSpec:
    return resume.compose_resumed(run, resume.resume_request(run, words, ()))


def test_a_finished_run_can_be_made_longer_and_nothing_else(done: RunDir) -> None:
    assert check(done, "train.max_steps=8").train.max_steps == 8
    for words in ((), ("train.max_steps=4",), ("train.max_steps=2",), ("eval.num_prompts=1",)):
        with pytest.raises(RequestError, match="is done: all 4 steps"):
            check(done, *words)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_finished_run_without_a_whole_checkpoint_is_never_begun_anew(done: RunDir, damage: str) -> None:
    if damage == "gone":
        checkpoints.discard(done, [4])
    else:
        (checkpoints.folder(done, 4) / "optimizer.pt").write_bytes(b"State")
    with pytest.raises(RequestError, match="no whole checkpoint") as caught:
        check(done, "train.max_steps=8")
    assert "train.keep_checkpoints=0" in str(caught.value.problems[0].remedy)


def test_a_new_run_of_one_that_could_go_on_says_so(done: RunDir) -> None:
    asked = Request(spec_file=done.spec_file)
    assert resume.unfinished_note(asked) == [] == resume.unfinished_note(Request())
    done.set_status("failed")
    (note,) = resume.unfinished_note(asked)
    assert f"resume {done.path}" in note and "after step 4" in note
    checkpoints.discard(done, [4])
    assert resume.unfinished_note(asked) == []


def test_what_a_signal_ended_says_what_there_is(done: RunDir) -> None:
    (problem,) = checkpoints.interrupted(done).problems
    assert "until step 4" in problem.what and problem.remedy == f"python -m runner resume {done.path}"
    checkpoints.discard(done, [4])
    assert checkpoints.interrupted(done).problems[0].what == "interrupted before there was anything to save"
