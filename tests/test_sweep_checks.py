"""What is wrong with a sweep is said before its first run."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.report.metrics import MEASURED, unknown_metric
from tests.front import here, laptop, runner

__all__ = ["here", "laptop"]


def test_a_bare_m_starts_nothing(here: Path) -> None:
    told = runner("-m")
    assert told.exit_code == 2 and "-m sweeps over values, and none is named" in told.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("eval.after.los", "did you mean run.metric=eval.after.loss?"),
        ("train.loss", "did you mean run.metric=train.loss_last?"),
        ("eval_loss", "did you mean run.metric=eval.after.loss?"),
        ("accuracy", "write run.metric=eval.after.loss, or train.loss_last"),
    ],
)
def test_a_metric_that_no_run_writes_is_refused(metric: str, remedy: str) -> None:
    problem = unknown_metric(metric)
    assert problem is not None and problem.what == f"run.metric={metric}: no run writes such a number"
    assert problem.remedy is not None and problem.remedy.startswith(remedy.partition("=")[0])
    told = runner("-m", "train.max_steps=1,2", f"run.metric={metric}")
    assert told.exit_code == 2 and f"run.metric={metric}: no run writes such a number" in told.stderr


@pytest.mark.parametrize(
    "metric", ["eval.after.loss", "eval.before.exact_match", "train.tokens_per_second", "seconds", "cost.usd",
               "plan.peak_gib.measured", "eval.after.reward_of_my_own"],
)  # fmt: skip
def test_a_metric_that_some_run_writes_is_taken(metric: str) -> None:
    assert unknown_metric(metric) is None


def test_every_metric_of_every_trainer_is_known() -> None:
    from runner.train import grpo, keeping, pairs, preference  # torch: it is asked only here

    for module in (grpo, keeping, pairs, preference):
        for trainer in vars(module).values():
            assert set(getattr(trainer, "METRICS", {}).values()) <= set(MEASURED)


def test_a_folder_that_cannot_be_written_is_told_in_words(here: Path) -> None:
    (here / "file").write_text("", "utf-8")
    told = runner("-m", "train.max_steps=1,2", f"run.output_dir={here / 'file'}")
    assert (
        told.exit_code == 2 and f"run.output_dir={here / 'file'} cannot be written to: Not a directory" in told.stderr
    )
