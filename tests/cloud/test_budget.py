"""The rules of `where.max_usd`: one module has them all, and each refuses what it says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from runner.cloud import budget, clock
from runner.cloud.budget import Meter
from runner.cloud.ledger import Ledger
from runner.cloud.provider_errors import TooDearError
from runner.errors import CannotRunError
from runner.spec import RunPodPlace
from tests.conftest import ROOT

CAPPED = RunPodPlace(name="runpod", max_usd=2)
FREE = RunPodPlace(name="runpod")


def test_no_other_module_holds_a_price_against_the_cap() -> None:
    found = []
    for file in (ROOT / "runner" / "cloud").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn)):
                names = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                found += [f"{file.name}:{node.lineno}"] if names & {"max_usd", "cap_usd"} else []
    assert {place.partition(":")[0] for place in found} == {"budget.py"}


def test_an_offer_must_be_within_the_cap_for_an_hour_and_for_the_plan() -> None:
    plan = {"hours": 4.0, "usd_per_hour": 0.4}
    assert "first hour costs $2.50" in budget.over_plan(CAPPED, plan, 2.5, named=True, most_times=3)
    assert "for 4.00 hours is more than" in budget.over_plan(CAPPED, plan, 0.6, named=True, most_times=3)
    assert budget.over_plan(CAPPED, plan, 0.4, named=False, most_times=3) == ""
    assert "where the plan says $0.40" in budget.over_plan(FREE, plan, 1.3, named=False, most_times=3)
    assert budget.over_plan(FREE, plan, 1.3, named=True, most_times=3) == ""


def test_what_earlier_pods_have_cost_counts() -> None:
    budget.check_left(CAPPED, 1.0, 1.85)
    with pytest.raises(TooDearError, match=r"\$1.95 of where.max_usd=2 are spent"):
        budget.check_left(CAPPED, 1.0, 1.95)
    with pytest.raises(TooDearError):  # 5.7 minutes are left, and six are the least
        budget.check_left(CAPPED, 1.0, 1.905)
    budget.check_left(FREE, 1.0, 1000.0)
    with pytest.raises(TooDearError, match=r"costs \$1.50 an hour, where \$0.90 was offered"):
        budget.check_real_price(CAPPED, "pod", 1.5, 0.9, 0.6)
    with pytest.raises(TooDearError, match=r"more than where.max_usd allows"):
        budget.check_taken(CAPPED, "pod", 1.5, 0.6)
    budget.check_taken(CAPPED, "pod", 1.5, 0.5)


def test_hours_that_are_asked_for_are_within_the_cap() -> None:
    budget.check_hours(CAPPED, 0.5, 4)
    with pytest.raises(CannotRunError, match=r"5 hours cost \$2.50"):
        budget.check_hours(CAPPED, 0.5, 5)


def test_the_cap_brings_the_deadline_forward() -> None:
    place = RunPodPlace(name="runpod", max_usd=2, deadline_hours=10)
    meter = Meter(1.0, 1000.0, 0.0, 2.0, 0.5)
    assert budget.deadline_of(place, meter) == pytest.approx(1000 + 1.5 * 3600)
    assert budget.cap_sets_deadline(budget.deadline_of(place, meter), meter)
    assert budget.deadline_of(place, Meter(0.1, 1000.0, 0.0, 2.0)) == 1000 + 10 * 3600
    assert budget.paid_minutes(place, 1.0, 0.0, 0.5) == pytest.approx(90) and budget.paid_minutes(FREE, 1, 0, 0) is None


def test_a_price_that_is_the_cap_is_within_it() -> None:
    budget.check_left(CAPPED, 10.0, 1.0)  # exactly a tenth of an hour is left
    budget.check_real_price(CAPPED, "pod", 1.5, 1.5, 0.5)
    budget.check_real_price(FREE, "pod", 9.0, 0.9, 0.6)
    budget.check_hours(CAPPED, 0.5, 4)
    assert budget.over_first_hour(CAPPED, 2.0) == ""
    assert budget.over_plan(CAPPED, {"hours": 4.0}, 0.5, named=False, most_times=3) == ""
    assert budget.over_plan(FREE, {"usd_per_hour": 0.25}, 0.75, named=False, most_times=3) == ""


def test_refusals_name_the_key_and_what_to_write() -> None:
    for call, source, remedy in (
        (lambda: budget.check_hours(CAPPED, 0.5, 5), "where.max_usd", "write --hours 4.0, or less"),
        (lambda: budget.check_left(CAPPED, 1.0, 1.95), None, "raise where.max_usd, and resume the run"),
        (lambda: budget.check_real_price(CAPPED, "p", 3.0, 1.0, 0.0), "where.max_usd",
         "raise where.max_usd, or take cheaper hardware"),
        (lambda: budget.check_taken(CAPPED, "p", 3.0, 0.0), "where.max_usd",
         "raise where.max_usd, or take cheaper hardware"),
    ):  # fmt: skip
        with pytest.raises((CannotRunError, TooDearError)) as error:
            call()
        (problem,) = error.value.problems
        assert (problem.source, problem.remedy) == (source, remedy)


def test_an_open_deadline_is_a_day_and_a_written_one_itself() -> None:
    assert budget.hours_of(FREE) == 24.0
    assert budget.hours_of(RunPodPlace(name="runpod", deadline_hours=3)) == 3


def test_a_cap_sets_the_deadline_where_both_are_less_than_a_second_apart() -> None:
    meter = Meter(1.0, 0.0, cap_usd=1.0)  # the cap is reached after 3600 s
    assert [budget.cap_sets_deadline(at, meter) for at in (3598.5, 3599.0, 3600.0)] == [False, True, True]
    assert not budget.cap_sets_deadline(3600.0, Meter(1.0, 0.0))


def test_a_pod_that_is_not_a_second_old_has_cost_nothing_yet() -> None:
    meter = Meter(3600.0, 100.0, cap_usd=7200.0, before_usd=5.0)
    assert meter.usd(100.0) == meter.usd(99.0) == 5.0 and meter.usd(100.5) == pytest.approx(5.5)


def test_all_pods_of_the_run_have_cost_by_their_disks_and_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is gone, one stopped, one runs; a fourth was never created, and a fifth is of another run."""
    ledger = Ledger(tmp_path / "ledger.db")
    monkeypatch.setattr(clock, "now", lambda: 10 * 3600.0)

    def pod(name: str, run: str, id: str | None, state: str, **facts: float) -> None:
        ledger.plan(
            name, run_id=run, run_dir=str(tmp_path), gpu=None, cloud="secure", usd_per_hour=1.0, disk_gb=730.0,
            keep=False, volume=None, base="", account="", heartbeat_s=None,
        )  # fmt: skip
        ledger.move(name, "CREATING", "asking")
        ledger.move(name, state, state, pod_id=id, created=7 * 3600.0)  # type: ignore[arg-type]  # a text is a state
        if facts:
            ledger.set(name, **facts)

    pod("a", "run", "p1", "GONE", ended=8 * 3600.0)
    pod("b", "run", "p2", "STOPPED", updated=9 * 3600.0)
    pod("c", "run", "p3", "RUNNING", updated=9 * 3600.0)  # its launcher was last heard of an hour ago
    pod("d", "run", None, "CREATE_UNKNOWN")
    pod("e", "other", "p5", "RUNNING")
    an_hour = 1.0 + budget.storage_usd_per_hour(730.0)
    assert budget.spent(ledger, "run") == pytest.approx((1 + 2 + 3) * an_hour)
    assert budget.spent(ledger, "run", but="c") == pytest.approx((1 + 2) * an_hour)
