"""The rules of `where.max_usd`: one module has them all, and each refuses what it says."""

from __future__ import annotations

import ast

import pytest

from runner.cloud import budget
from runner.cloud.budget import Meter
from runner.cloud.errors import TooDearError
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
