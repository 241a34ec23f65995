"""Every judgement of the loss guard by itself: what is learned, noted, written, raised; in one process and in several.

`tests/train/test_loss_guard.py` has it in a trainer, and in two real processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Problem, Rewind, RunFailedError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir, display_path
from runner.spec import TrainSpec
from runner.train.trainers.loss_guard import (
    MAX_REWINDS,
    Finding,
    LossGuard,
    MicroBatch,
    is_spike,
    no_facts,
    step_losses,
)

CALM = [1.0] * 30


class Several:
    """Process `rank` of several, where others have found something."""

    world = 2

    def __init__(self, rank: int = 0, broken: int = 0, spikes: int = 0, found: tuple[Finding, ...] = ()) -> None:
        self.rank, self.main, self.found = rank, rank == 0, found
        self.sums = [float(broken), float(spikes)]
        self.kept: dict[str, Any] | None = None

    def broadcast(self, value: Any) -> Any:
        return value if self.kept is None else self.kept

    def all_reduce_sum(self, numbers: list[float]) -> list[float]:
        assert len(numbers) == 2
        return [mine + others for mine, others in zip(numbers, self.sums, strict=True)]

    def any(self, flag: bool) -> bool:
        return flag or self.sums[0] > 0

    def all_gather(self, mine: Finding | None) -> list[Finding | None]:
        return [mine, None, *self.found]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def guard(run: RunDir, action: str = "ignore", ranks: Any = None, precision: str = "bf16") -> Any:
    train = TrainSpec.model_validate(
        {"on_loss_spike": action, "precision": precision, "save_every_steps": 5, "spike_factor": 4.0}
    )
    notes: list[str] = []
    made: Any = LossGuard(train, run, ranks, notes.append)
    made.notes = notes  # what it told
    return made


def batch(loss: float, step: int = 26, number: int = 2, rows: tuple[int, ...] = (4,)) -> MicroBatch:
    return MicroBatch(step, number, loss, list(rows))


def failed(call: Callable[[], object], error: Any = RunFailedError) -> Problem:
    with pytest.raises(error) as caught:
        call()
    (problem,) = caught.value.problems
    found: Problem = problem
    return found


# --- what a spike is -----------------------------------------------------------------------------


def test_a_spike_is_above_so_many_times_the_median_of_the_last_fifty() -> None:
    losses = [1.0, 2.0] * 10
    assert is_spike(6.01, losses, 4.0) and not is_spike(6.0, losses, 4.0)  # 4 × 1.5
    assert not is_spike(99.0, losses[1:], 4.0)  # 19
    assert is_spike(4.1, [9.0] * 24 + [1.0] * 26, 4.0) and not is_spike(4.1, [9.0] * 26 + [1.0] * 24, 4.0)
    assert is_spike(4.1, [9.0] * 99 + [1.0] * 50, 4.0)
    assert not is_spike(4.1, [1.0] * 24 + [9.0] * 26, 4.0)  # the oldest of fifty counts as the newest does


def test_the_losses_are_those_of_steps_that_were_learned() -> None:
    lines: list[dict[str, Any]] = [{"loss": float(n)} for n in range(60)]
    assert step_losses(lines) == [float(n) for n in range(10, 60)]
    others: list[dict[str, Any]] = [{"eval_loss": 1.0}, {"loss": math.inf}, {"loss": 7.0, "skipped": True}]
    assert step_losses([{"loss": 3.0, "skipped": False}, *others, {"loss": 4.0}]) == [3.0, 4.0]
    assert step_losses([]) == []


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["ignore", "skip", "rewind"])
def test_a_loss_like_the_others_is_learned(run: RunDir, action: str) -> None:
    one = guard(run, action)
    assert one.learns(batch(4.0), CALM) is True
    assert one.learns(batch(99.0), CALM[:19]) is True  # too early to say
    assert one.skipped == set() and one.notes == []
    assert list(run.path.iterdir()) == []


def test_a_spike_is_learned_where_it_is_ignored(run: RunDir) -> None:
    assert guard(run).learns(batch(99.0), CALM) is True


def test_a_spike_is_not_learned_where_it_is_skipped_and_the_row_is_named(run: RunDir) -> None:
    one = guard(run, "skip")
    assert one.learns(batch(12.3456, rows=(4, 5)), CALM) is False
    place = "the loss jumped to 12.35 at step 26, 12.3 × the median of the last steps"
    assert one.notes == [f"  {place}, in rows 4, 5 of the tokenised training set: not learned from"]
    assert one.skipped == {26} and not (run.path / "rewinds.json").exists()
    assert one.learns(batch(1.0, step=27), CALM) is True


def test_the_median_of_the_message_is_that_of_the_last_fifty(run: RunDir) -> None:
    one = guard(run, "skip")
    one.learns(batch(30.0), [9.0] * 60 + [2.0] * 50)
    assert "jumped to 30 at step 26, 15.0 × the median" in one.notes[0]


def test_by_default_notes_are_printed(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    LossGuard(TrainSpec(on_loss_spike="skip"), run).learns(batch(9.0), CALM)
    assert "not learned from" in capsys.readouterr().out


# --- a loss that is no number --------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("action", ["ignore", "skip"])
def test_a_loss_that_is_no_number_stops_the_run_with_its_rows_in_a_file(run: RunDir, action: str, value: float) -> None:
    facts = {"learning_rate": 0.5, "scale": math.inf, "rows": [{"row": 4}]}
    problem = failed(
        lambda: guard(run, action).learns(batch(value, rows=(4, 7)), [float(n) for n in range(30)], lambda rows: facts)
    )
    assert problem.what == (
        f"the loss became {value} at step 26, micro batch 2, in rows 4, 7 of the tokenised training set"
    )
    assert problem.source == display_path(run.path / "nan" / "step-26-rank0.json")
    assert run.read("nan/step-26-rank0.json") == {
        "step": 26, "rank": 0, "row_ids": [4, 7], "last_losses": [float(n) for n in range(10, 30)], "micro_batch": 2,
        "loss": str(value), "learning_rate": 0.5, "scale": "inf", "rows": [{"row": 4}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "advice"), [("fp32", " or raise train.warmup_ratio"), ("bf16", ", or use train.precision=fp32")]
)
def test_what_to_do_depends_on_the_precision(run: RunDir, precision: str, advice: str) -> None:
    problem = failed(lambda: guard(run, precision=precision).learns(batch(math.nan), CALM))
    assert problem.remedy == (f"look at these rows in that file; if they are sound, lower train.learning_rate{advice}")


def test_a_second_broken_step_finds_the_folder_of_the_first(run: RunDir) -> None:
    for step in (3, 4):
        failed(lambda step=step: guard(run).learns(batch(math.nan, step=step), []))
    assert sorted(file.name for file in (run.path / "nan").iterdir()) == ["step-3-rank0.json", "step-4-rank0.json"]


def test_a_left_out_step_that_is_no_number_stops_all_the_same(run: RunDir) -> None:
    run.write("rewinds.json", {"skipped_steps": [26], "count": 1})
    failed(lambda: guard(run, "rewind").learns(batch(math.nan), CALM))


def test_what_another_process_found_stops_this_one_and_names_that_ones_rows(run: RunDir) -> None:
    many = Finding(2, math.inf, list(range(11)), 2)
    ranks = Several(rank=1, broken=1, found=(many,))
    problem = failed(lambda: guard(run, ranks=ranks).learns(batch(1.0), CALM))
    rows = "rows 0, 1, 2, 3, 4, 5, 6, 7 and 3 more (rank 2)"
    assert problem.what == f"the loss became inf at step 26, micro batch 2, in {rows} of the tokenised training set"
    assert problem.source == display_path(run.path / "nan" / "step-26-rank2.json")
    assert not (run.path / "nan").exists()  # it writes its own


def test_two_processes_with_broken_losses_are_both_named(run: RunDir) -> None:
    ranks = Several(rank=1, broken=1, found=(Finding(2, math.inf, [9], 2),))
    problem = failed(lambda: guard(run, ranks=ranks).learns(batch(math.nan), CALM))
    assert "became nan" in problem.what and problem.what.endswith(
        "in row 4 (rank 1); row 9 (rank 2) of the tokenised training set"
    )
    assert run.read("nan/step-26-rank1.json")["rank"] == 1


def test_exactly_eight_rows_are_all_named(run: RunDir) -> None:
    problem = failed(lambda: guard(run).learns(batch(math.nan, rows=tuple(range(8))), CALM))
    assert problem.what.endswith("in rows 0, 1, 2, 3, 4, 5, 6, 7 of the tokenised training set")


def test_losses_of_a_step_are_judged_together_where_none_is_skipped(run: RunDir) -> None:
    one = guard(run)
    step = [
        batch(1.0, number=1),
        batch(99.0, number=2),
        batch(math.inf, number=3, rows=(8,)),
        batch(math.nan, number=4),
    ]
    assert not one.skips and guard(run, "skip").skips
    one.check_losses(step[:2], CALM)
    problem = failed(lambda: one.check_losses(step, CALM, lambda rows: {"rows": rows}))
    assert problem.what == "the loss became inf at step 26, micro batch 3, in row 8 of the tokenised training set"
    kept = run.read("nan/step-26-rank0.json")
    assert (kept["micro_batch"], kept["loss"], kept["row_ids"], kept["rows"]) == (3, "inf", [8], [8])


def test_a_loss_that_broke_elsewhere_is_named_by_its_own_micro_batch(run: RunDir) -> None:
    ranks = Several(rank=1, broken=1, found=(Finding(2, math.inf, [9], 5),))
    problem = failed(lambda: guard(run, ranks=ranks).check_losses([batch(1.0)], CALM))
    assert problem.what.startswith("the loss became inf at step 26, micro batch 5, in row 9 (rank 2)")


def test_steps_left_out_after_a_rewind_are_judged_one_by_one(run: RunDir) -> None:
    run.write("rewinds.json", {"skipped_steps": [26], "count": 1})
    assert guard(run).skips


# --- a gradient that is no number ----------------------------------------------------------------


def test_a_gradient_that_is_no_number_stops_the_run(run: RunDir) -> None:
    one = guard(run)
    one.check_norm(7, 12.0, [4, 5], CALM, no_facts)
    assert not (run.path / "nan").exists()
    problem = failed(lambda: one.check_norm(7, math.nan, [4, 5], CALM, lambda rows: {"learning_rate": 0.5}))
    assert problem.what == "the gradient norm became nan at step 7, in rows 4, 5 of the tokenised training set"
    assert problem.source == display_path(run.path / "nan" / "step-7-rank0.json")
    assert run.read("nan/step-7-rank0.json") == {
        "step": 7, "rank": 0, "row_ids": [4, 5], "last_losses": CALM[:20], "grad_norm": "nan", "learning_rate": 0.5,
    }  # fmt: skip


def test_a_gradient_that_broke_elsewhere_stops_this_process_too(run: RunDir) -> None:
    ranks = Several(rank=1, broken=1, found=(Finding(2, math.inf, [9]),))
    problem = failed(lambda: guard(run, ranks=ranks).check_norm(7, 1.0, [4], CALM, no_facts))
    assert problem.what == "the gradient norm became inf at step 7, in row 9 (rank 2) of the tokenised training set"
    assert not (run.path / "nan").exists()


# --- going back ----------------------------------------------------------------------------------


def test_a_spike_is_gone_back_from_and_its_steps_are_left_out(run: RunDir) -> None:
    """Its own and the one before, as in PaLM (arXiv 2204.02311 §5.1)."""
    one = guard(run, "rewind")
    problem = failed(lambda: one.learns(batch(9.0), CALM), Rewind)
    what = "the loss jumped to 9 at step 26, 9.0 × the median of the last steps, in row 4 of the tokenised training set"
    assert problem == Problem(what, None, "the worker is started again from the last checkpoint")
    assert one.notes == [f"  {what}: going back to a checkpoint, 1 of 3 times"]
    assert run.read("rewinds.json") == {"skipped_steps": [25, 26], "count": 1}
    status = run.read("status.json")
    assert (status["state"], status["step"], status["rewinds"]) == ("rewinding", 26, 1)
    assert one.rewound_from == 25


def test_a_spike_of_the_first_step_has_none_before_it(run: RunDir) -> None:
    one = guard(run, "rewind")
    failed(lambda: one.learns(batch(9.0, step=1), CALM), Rewind)
    assert run.read("rewinds.json")["skipped_steps"] == [1] and one.rewound_from == 1


def test_steps_that_were_left_out_before_stay_so_and_are_told_once(run: RunDir) -> None:
    run.write("rewinds.json", {"skipped_steps": [7, 25], "count": 2})
    one = guard(run, "rewind")
    assert (one.num_rewinds, one.left_out) == (2, {7, 25})
    for number in (1, 2):
        assert one.learns(batch(99.0, step=25, number=number), CALM) is False
        assert one.notes == ["  step 25: not learned from, its data made the loss jump before"]
    assert one.skipped == {25}
    failed(lambda: one.learns(batch(9.0, step=31), CALM), Rewind)
    assert run.read("rewinds.json") == {"skipped_steps": [7, 25, 30, 31], "count": 3}
    assert one.notes[-1].endswith("going back to a checkpoint, 3 of 3 times")


def test_after_the_last_rewind_the_run_fails_and_says_what_to_do(run: RunDir) -> None:
    run.write("rewinds.json", {"skipped_steps": [], "count": MAX_REWINDS})
    problem = failed(lambda: guard(run, "rewind").learns(batch(9.0), CALM))
    assert problem.what.endswith("in row 4 of the tokenised training set, after 3 rewinds")
    assert problem.remedy == ("lower train.learning_rate, raise train.spike_factor, or use train.on_loss_spike=skip")
    assert MAX_REWINDS == 3 and run.read("rewinds.json")["count"] == 3


def test_what_the_main_process_has_read_holds_for_all(run: RunDir) -> None:
    """Nodes may not share a disk."""
    ranks = Several(rank=1)
    ranks.kept = {"skipped_steps": [26], "count": 2}
    one = guard(run, "rewind", ranks)
    assert (one.num_rewinds, one.left_out) == (2, {26})
    assert one.learns(batch(9.0), CALM) is False
    assert one.skipped == {26} and one.notes == []  # the main process tells it


def test_a_spike_of_another_process_is_acted_on_and_only_the_main_one_writes(run: RunDir) -> None:
    found = (Finding(1, 5.0, [8]), Finding(2, 9.0, [9]))
    for rank in (0, 1):
        one = guard(run, "skip", Several(rank, spikes=2, found=found))
        assert one.learns(batch(1.0), CALM) is False and one.skipped == {26}
        assert len(one.notes) == (rank == 0)
        if rank == 0:
            assert "jumped to 9 at step 26, 9.0 ×" in one.notes[0]  # the worst of them
            assert "row 8 (rank 1); row 9 (rank 2) of" in one.notes[0]
    other = guard(run, "rewind", Several(1, spikes=1, found=found))
    failed(lambda: other.learns(batch(1.0), CALM), Rewind)
    assert other.rewound_from == 25 and other.notes == []
    assert not (run.path / "rewinds.json").exists() and not (run.path / "status.json").exists()


@pytest.mark.parametrize(
    ("kept", "main", "left"),
    [([20, 25, 26], True, [20]), ([25, 26], True, [25, 26]), ([20, 24], True, [20, 24]), ([20, 25], False, [20, 25])],
)
def test_checkpoints_that_hold_what_is_left_out_go_where_there_is_an_older_one(
    run: RunDir, kept: list[int], main: bool, left: list[int]
) -> None:
    for step in kept:
        checkpoints.folder(run, step).mkdir(parents=True)
        checkpoints.seal(checkpoints.folder(run, step), {"step": step})
    one = guard(run, "rewind", Several(0 if main else 1))
    one.rewound_from = 25
    one.step_back()
    assert checkpoints.complete(run) == left


def test_nothing_goes_without_a_rewind(run: RunDir) -> None:
    for step in (5, 10):
        checkpoints.folder(run, step).mkdir(parents=True)
        checkpoints.seal(checkpoints.folder(run, step), {"step": step})
    guard(run, "rewind").step_back()
    assert checkpoints.complete(run) == [5, 10]
