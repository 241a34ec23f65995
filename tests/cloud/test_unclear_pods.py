"""Requests that were lost or carried out twice, lists that fail, pods of odd shape: nothing runs on unseen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.cloud import fleet
from runner.cloud.lease import Lease
from runner.cloud.ledger import Ledger
from runner.cloud.provider import PodRequest
from runner.cloud.provider_errors import NoBalanceError, NoPodError, StillThereError
from runner.cloud.reconcile import reconcile
from runner.cloud.runpod import json_types
from runner.cloud.runpod.account_key import BILLING_PAGE
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.runpod_provider import RunPod
from runner.emulator.pods_api import listed
from tests.support.emulated import IMAGE, Emulator
from tests.support.front import runner
from tests.support.rented import impatient, rent

pytestmark = pytest.mark.usefixtures("state", "here", "hello", "quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.cloud.runpod.transport.PAUSE_S", 0.05)
    monkeypatch.setattr("runner.cloud.readiness.LEAST_LOOK_S", 0.5)
    monkeypatch.setattr("runner.cloud.readiness.LOOK_S", 0.5)


# ── lost ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [500, 502, 503, 401])
def test_a_lost_create_and_an_api_that_is_down_is_not_nothing(emulator: Emulator, tmp_path: Path, status: int) -> None:
    emulator.inject("lost", on="create")
    emulator.inject("answer", on="list", status=status, times=0)
    with pytest.raises(StillThereError) as error:
        rent(tmp_path)
    assert len(emulator.pods()) == 1
    (pod,) = emulator.pods().values()
    (problem,) = error.value.problems
    assert error.value.exit_code == 1 and "MAY STILL BE RUNNING AND COST MONEY" in problem.what
    assert pod.name in problem.what and f"python -m runner pods terminate {pod.name}" in str(problem.remedy)
    assert "nothing" not in problem.what
    result = runner("pods", "terminate", pod.name)  # while it is still down
    assert result.exit_code != 0 and len(emulator.pods()) == 1
    emulator.clear()
    result = runner("pods", "terminate", pod.name)  # as it was said
    assert result.exit_code == 0 and emulator.pods() == {}, result.output


def test_a_create_that_is_never_seen_is_said_with_the_failure(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("late_listing", seconds=30, times=0)
    emulator.inject("lost", on="create", times=0)
    with pytest.raises(NoPodError) as error:
        rent(tmp_path, "where.gpu_types=[NVIDIA L4]")
    said = [p for p in error.value.problems if "MAY STILL BE RUNNING" in p.what]
    assert {p.what.split()[1] for p in said} == {pod.name for pod in emulator.pods().values()} and len(said) == 2


def test_a_create_that_is_never_seen_is_said_with_whatever_ends_the_search(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("late_listing", seconds=30, times=0)
    emulator.inject("lost", on="create")
    emulator.inject("answer", on="create", status=402, skip=1)
    with pytest.raises(NoBalanceError) as error:
        rent(tmp_path)
    balance, unseen = error.value.problems
    assert BILLING_PAGE in str(balance.remedy) and "MAY STILL BE RUNNING" in unseen.what


# ── twice ──────────────────────────────────────────────────────────────────────────────────────


def test_a_create_that_was_carried_out_twice_leaves_one_pod(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("double", on="create")
    rented = rent(tmp_path)
    assert list(emulator.pods()) == [rented.pod.id]
    rented.release()
    assert emulator.pods() == {}


def test_a_double_that_is_listed_late_goes_with_the_run(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("late_listing", times=0, seconds=3)
    emulator.inject("double", on="create")
    rented = rent(tmp_path)
    assert len(emulator.pods()) == 2
    while len(listed(emulator.world)) < 2:
        pass
    rented.release()
    assert emulator.pods() == {}


@pytest.mark.slow
def test_a_double_goes_with_a_pod_that_is_given_back(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("double", on="create", times=0)
    emulator.inject("bad_host", times=0)
    with pytest.raises(NoPodError):
        rent(tmp_path, "where.gpu_types=[NVIDIA L4]")
    assert emulator.pods() == {}


@pytest.mark.parametrize("left_in", ["PROVISIONING", "RUNNING"])
def test_a_double_of_a_launcher_that_was_killed_is_found_by_the_next_command(
    emulator: Emulator, tmp_path: Path, left_in: Any
) -> None:
    rented = rent(tmp_path)
    rented.ledger.move(rented.name, left_in, "and then it was killed")
    rented.ledger.leave(rented.name)
    double = RunPod().create_pod(PodRequest(rented.name, IMAGE, "secure", gpu_id="NVIDIA L4"))
    reconcile(RunPod(), Ledger())
    assert double.id not in emulator.pods() and (rented.pod.id in emulator.pods()) == (left_in == "RUNNING")


# ── terminate ──────────────────────────────────────────────────────────────────────────────────


def two(tmp_path: Path) -> Lease:
    """A run with two pods: its own, and one that came of something else."""
    rented = rent(tmp_path)
    RunPod().create_pod(PodRequest(f"runner-{rented.run_id}-beef", IMAGE, "secure", gpu_id="NVIDIA L4"))
    return rented


@pytest.mark.parametrize("how", ["run", "folder", "name"])
def test_terminate_ends_all_pods_of_a_run(emulator: Emulator, tmp_path: Path, how: str) -> None:
    rented = two(tmp_path)
    words = {"run": rented.run_id, "folder": f"runs/{rented.run_id}", "name": rented.run_id}
    result = runner("pods", "terminate", words[how], "--json")
    assert result.exit_code == 0, result.output
    assert emulator.pods() == {} and len(json.loads(result.stdout)["pod_ids"]) == 2


def test_terminate_of_one_pod_leaves_the_other(emulator: Emulator, tmp_path: Path) -> None:
    rented = two(tmp_path)
    assert runner("pods", "terminate", rented.pod.id).exit_code == 0
    assert len(emulator.pods()) == 1 and rented.pod.id not in emulator.pods()


def test_terminate_of_several_confirms_each(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, 0.5)
    rented = two(tmp_path)
    emulator.inject("undead", times=0, pod=rented.pod.id)
    result = runner("pods", "terminate", rented.run_id)
    assert result.exit_code == 1 and "MAY STILL BE RUNNING" in result.output
    assert list(emulator.pods()) == [rented.pod.id]  # the other one is gone all the same


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 502, 429])
@pytest.mark.parametrize("word", ["run", "pod"])
def test_terminate_needs_no_list(emulator: Emulator, tmp_path: Path, status: int, word: str) -> None:
    rented = rent(tmp_path)
    emulator.inject("answer", on="list", status=status, times=0)
    result = runner("pods", "terminate", rented.run_id if word == "run" else rented.pod.id)
    assert emulator.pods() == {}, result.output
    assert result.exit_code == 0


def test_terminate_needs_neither_list_nor_ledger_for_an_id(emulator: Emulator, tmp_path: Path, state: Path) -> None:
    rented = rent(tmp_path)
    (state / "ledger.db").unlink()
    emulator.inject("answer", on="list", status=500, times=0)
    result = runner("pods", "terminate", rented.pod.id)
    assert result.exit_code == 0 and emulator.pods() == {}, result.output


def test_terminate_by_id_never_touches_a_foreign_pod(emulator: Emulator) -> None:
    foreign = RunPod().create_pod(PodRequest("somebody-else", IMAGE, "secure", gpu_id="NVIDIA L4"))
    for fault in (False, True):
        if fault:
            emulator.inject("answer", on="list", status=500, times=0)
        result = runner("pods", "terminate", foreign.id)
        assert result.exit_code == 2, result.output
        assert ("not this project's" if fault else "this project has no pod") in result.output
    assert list(emulator.pods()) == [foreign.id]


def test_terminate_of_a_run_with_three_pods_beside_an_odd_foreign_one(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is refused at first, one cannot be looked at for a while, one is another machine's."""
    monkeypatch.setattr("runner.cloud.termination.GAP_S", 0.05)
    rented = two(tmp_path)
    third = RunPod().create_pod(PodRequest("runner-x-0001", IMAGE, "secure", gpu_id="NVIDIA L4",
                                        env={"RUNNER_RUN_ID": rented.run_id}))  # fmt: skip
    foreign = RunPod().create_pod(PodRequest(rented.run_id, IMAGE, "secure", gpu_id="NVIDIA L4"))  # named as the run
    everything = Api._all
    odd = {"id": foreign.id, "name": ["x"], "env": [rented.run_id], "status": {}, "cost": None}
    monkeypatch.setattr(
        Api, "_all",
        lambda self, path, name: [odd, *(raw for raw in everything(self, path, name) if raw["id"] != foreign.id)],
    )  # fmt: skip
    emulator.inject("answer", on="terminate", status=500, pod=rented.pod.id, times=7)
    emulator.inject("answer", on="get", status=502, pod=third.id, times=7)
    result = runner("pods", "terminate", rented.run_id, "--json")
    assert result.exit_code == 0, result.output
    assert list(emulator.pods()) == [foreign.id] and len(json.loads(result.stdout)["pod_ids"]) == 3


def test_terminate_without_a_list_says_that_there_may_be_more_pods(emulator: Emulator, tmp_path: Path) -> None:
    rented = two(tmp_path)
    emulator.inject("answer", on="list", status=500, times=0)
    result = runner("pods", "terminate", rented.run_id, "--json")
    assert json.loads(result.stdout) == {"pod_id": rented.pod.id, "state": "gone"}
    (left,) = emulator.pods()
    assert left != rented.pod.id and "RunPod's list could not be had" in result.stderr
    emulator.clear()
    assert runner("pods", "terminate", rented.run_id).exit_code == 0 and emulator.pods() == {}  # as it was said


ODD: list[Any] = [
    {"id": "odd"}, {"id": "odd", "name": None, "status": None}, {"id": "odd", "name": 7, "cost": "much"}, {"name": "x"},
    {"id": "odd", "name": "x", "status": "RUNNING", "gpu": [], "ssh": "no", "mounts": [1], "env": ["A=1"]},
    {"id": "odd", "name": "x", "status": "R", "mounts": {"network": [None]}, "createdAt": 7, "cost": float("inf")},
    {"id": "odd", "name": "x", "ssh": {"direct": [], "proxy": 1}, "gpu": {"count": "two"}}, None, "odd", 7, [],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD, ids=map(str, range(len(ODD))))
def test_a_foreign_pod_of_odd_shape_blocks_nothing(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: Any
) -> None:
    rented = rent(tmp_path)
    everything = Api._all
    monkeypatch.setattr(Api, "_all", lambda self, path, name: [odd, *everything(self, path, name), odd])
    assert rented.pod.id in runner("pods", "--json").output
    result = runner("pods", "terminate", rented.run_id)
    assert result.exit_code == 0 and emulator.pods() == {}, result.output


def test_a_pod_of_odd_shape_is_still_a_pod() -> None:
    found = json_types.pod({"id": "a", "name": "runner-x-1", "status": "RUNNING", "gpu": 7, "cost": None})
    assert (found.id, found.name, found.status, found.usd_per_hour) == ("a", "runner-x-1", "RUNNING", 0.0)


def test_terminate_without_a_list_ends_every_pod_that_the_ledger_knows(emulator: Emulator, tmp_path: Path) -> None:
    rented = two(tmp_path)
    (other,) = set(emulator.pods()) - {rented.pod.id}
    fleet.adopt(RunPod(), rented.ledger, other, rented.run_id)
    emulator.inject("answer", on="list", status=500, times=0)
    result = runner("pods", "terminate", rented.run_id, "--json")
    assert result.exit_code == 0 and emulator.pods() == {}, result.output
    assert set(json.loads(result.stdout)["pod_ids"]) == {rented.pod.id, other}


def test_a_lost_create_and_nobody_who_answers_is_not_nothing(emulator: Emulator, tmp_path: Path) -> None:
    emulator.inject("lost", on="create")
    emulator.inject("lost", on="list", times=0)  # the connection breaks, every time
    with pytest.raises(StillThereError, match="MAY STILL BE RUNNING AND COST MONEY") as error:
        rent(tmp_path)
    (pod,) = emulator.pods().values()
    assert f"python -m runner pods terminate {pod.name}" in str(error.value.problems[0].remedy)
