"""Ending and stopping a pod: asked for until two looks in a row say so, some seconds apart, and loud otherwise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud import ssh, termination
from runner.cloud.ledger import Ledger, LedgerError
from runner.cloud.provider import Pod
from runner.cloud.provider_errors import ApiDownError, StillThereError, WrongKeyError
from runner.errors import Problem
from tests.cloud.test_ledger import FACTS
from tests.support.memory_cloud import MemoryAccount, MemoryCloud

NAME = "runner-a-1"


class Waiting:
    """Time that passes by waiting alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, list[float]()
        monkeypatch.delenv("RUNNER_CLOUD_PACE", raising=False)
        for module in ("termination", "readiness", "lease"):
            monkeypatch.setattr(
                f"runner.cloud.{module}.time", SimpleNamespace(monotonic=self.monotonic, sleep=self.sleep)
            )

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Waiting:
    return Waiting(monkeypatch)


class Account(MemoryAccount):
    """One elsewhere, whose `pod` answers by a script: present, absent, an error, a refused key, TERMINATED, EXITED."""

    base = "https://api.cloud.example"

    def __init__(self) -> None:
        self.cloud, self.looks, self.asked = MemoryCloud(), "", list[str]()

    def add(self, pod_id: str = "pod1", name: str = NAME, status: str = "RUNNING", **facts: Any) -> Pod:
        made = Pod(pod_id, name, status, 0.5, "GPU", 1, "floating", None, "debian", "host", 22, 1000.0, "m", None)
        self.cloud.rented[pod_id] = replace(made, **facts)
        return self.cloud.rented[pod_id]

    def pod(self, pod_id: str) -> Pod | None:
        look, self.looks = self.looks[:1], self.looks[1:]
        self.asked.append(f"look {look}".strip())
        if look == "e":
            raise ApiDownError(Problem("the cloud does not answer"))
        if look == "k":
            raise WrongKeyError(Problem("the key is refused"))
        found = self.cloud.rented.get(pod_id) if look != "a" else None
        if found and look in ("t", "x"):
            found = replace(found, status="TERMINATED" if look == "t" else "EXITED")
        return found

    def terminate(self, pod_id: str) -> None:
        self.asked.append(f"terminate {pod_id}")
        super().terminate(pod_id)

    def stop(self, pod_id: str) -> None:
        self.asked.append(f"stop {pod_id}")
        if self.cloud.fault("stop") != "ignored" and pod_id in self.cloud.rented:
            self.cloud.rented[pod_id] = replace(self.cloud.rented[pod_id], status="EXITED")

    def times(self, what: str) -> int:
        return sum(one.startswith(what) for one in self.asked)


@pytest.fixture
def api(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> Account:
    found = Account()
    found.add()
    monkeypatch.setattr(ssh, "forget_host_key", lambda pod_id: found.asked.append(f"forget {pod_id}"))
    return found


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(tmp_path / "ledger.db")
    found.plan(NAME, run_id="a", **FACTS)
    found.move(NAME, "RUNNING", "training", pod_id="pod1")
    return found


def told(ledger: Ledger, name: str = NAME) -> list[tuple[str, str]]:
    """States after it trained, and why."""
    return [(new, why) for _, new, why in ledger.transitions(name)][2:]


# ── gone ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("looks", "asked"), [("aa", 1), ("tt", 1), ("apaa", 2), ("aeaa", 2), ("akaa", 2), ("ppaa", 3), ("apapaa", 3)]
)
def test_an_end_is_confirmed_by_two_absences_in_a_row_five_seconds_apart(
    api: Account, waiting: Waiting, monkeypatch: pytest.MonkeyPatch, looks: str, asked: int
) -> None:
    api.looks = looks
    monkeypatch.setattr(api.cloud, "rented", {})
    api.pods = lambda: []  # type: ignore[method-assign]  # for this test
    if "p" in looks:
        api.add()
        api.cloud.faults["terminate"] = ["ignored"] * 9
    termination.confirm_gone(api, NAME, "pod1")
    assert api.looks == "" and waiting.waits == [5.0] * (len(looks) - 1)
    assert api.times("terminate pod1") == api.times("forget pod1") == asked


def test_a_pod_that_stays_is_asked_to_end_for_three_minutes_and_then_said(api: Account, waiting: Waiting) -> None:
    api.cloud.faults["terminate"] = ["ignored"] * 999
    with pytest.raises(StillThereError) as error:
        termination.confirm_gone(api, NAME, "pod1")
    (problem,) = error.value.problems
    assert problem.what == f"POD pod1 ({NAME}) MAY STILL BE RUNNING AND COST MONEY: it is still listed"
    assert "python -m runner pods terminate pod1 " in str(problem.remedy)
    assert waiting.now == 185 and api.times("terminate") == 38
    api.looks = "e" * 99
    with pytest.raises(StillThereError, match="the cloud does not answer"):
        termination.confirm_gone(api, NAME, "pod1")
    api.looks = "eppp" + "p" * 99
    with pytest.raises(StillThereError, match="it is still listed"):
        termination.confirm_gone(api, NAME, "pod1")


def test_near_at_hand_there_is_less_patience_and_never_none(
    api: Account, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.cloud.faults["terminate"] = ["ignored"] * 9999
    for pace, lasted in (("0.05", 10), ("0.1", 18), ("0.5", 90)):
        monkeypatch.setenv("RUNNER_CLOUD_PACE", pace)
        began = waiting.now
        with pytest.raises(StillThereError):
            termination.confirm_gone(api, NAME, "pod1")
        assert lasted <= waiting.now - began <= lasted + 5 * float(pace) + 1e-6


def test_a_key_is_refused_three_times_before_it_is_believed(api: Account, waiting: Waiting) -> None:
    api.looks = "kpk"
    api.cloud.faults["terminate"] = ["ignored"] * 3
    termination.confirm_gone(api, NAME, "pod1")
    api.looks = "kkk"
    api.add()
    waiting.waits.clear()
    with pytest.raises(StillThereError, match="the key is refused"):
        termination.confirm_gone(api, NAME, "pod1")
    assert waiting.waits == [5.0, 5.0]


def test_a_pod_is_absent_where_neither_its_address_nor_the_list_has_it(api: Account) -> None:
    other = api.add("pod2")
    for look, status, absent in (
        ("p", "RUNNING", False), ("a", "RUNNING", False), ("t", "RUNNING", False), ("a", "EXITED", False),
        ("a", "TERMINATED", True), ("t", "TERMINATED", True),
    ):  # fmt: skip
        api.add(status=status)
        api.looks = look
        assert termination.is_absent(api, "pod1") is absent
    del api.cloud.rented["pod1"]
    assert termination.is_absent(api, "pod1") and not termination.is_absent(api, other.id)
    api.cloud.faults["list"] = ["down"]
    assert termination.is_absent(api, "pod1")  # its own address answers
    api.cloud.calls.clear()
    assert not termination.is_absent(api, other.id) and "list" not in api.cloud.calls


def test_one_absence_is_no_end(api: Account, waiting: Waiting) -> None:
    api.pods = lambda: []  # type: ignore[method-assign]  # for this test
    for looks, gone, waits in (("aa", True, [5.0]), ("ap", False, [5.0]), ("p", False, [])):
        api.looks = looks
        waiting.waits.clear()
        assert termination.is_gone(api, "pod1") is gone
        assert waiting.waits == waits and api.looks == ""


def test_near_at_hand_the_looks_are_closer_together(api: Account, ledger: Ledger, waiting: Waiting) -> None:
    api.base = "http://127.0.0.1:1"
    api.cloud.faults["stop"] = ["ignored", "ignored"]
    termination.stop(api, ledger, NAME, "pod1", "enough")
    api.cloud.rented.clear()
    assert termination.is_gone(api, "pod1")
    termination.confirm_gone(api, NAME, "pod1")
    assert waiting.waits == pytest.approx([0.25] * len(waiting.waits)) and len(waiting.waits) == 3


def test_pods_of_the_same_name_are_ended_but_for_one(api: Account) -> None:
    api.add("pod2")
    api.add("pod3", status="TERMINATED")
    api.add("pod4", name="runner-a-12")
    api.add("pod5", status="EXITED")
    assert termination.terminate_duplicates(api, "pod1", NAME) == ["pod2", "pod5"]
    assert sorted(api.cloud.rented) == ["pod1", "pod3", "pod4"]


def test_a_pod_is_asked_to_end_before_that_is_recorded_and_gone_when_it_is_confirmed(
    api: Account, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.set(NAME, keep=1, pod_id=None)
    move = Ledger.move

    def moved(self: Ledger, *words: Any, **facts: Any) -> None:
        api.asked.append(f"record {words[1]} {facts}")
        move(self, *words, **facts)

    monkeypatch.setattr(Ledger, "move", moved)
    termination.terminate(api, ledger, NAME, "pod1", "enough")
    assert [one for one in api.asked if not one.startswith("forget")] == [
        "terminate pod1", "record TERMINATING {'keep': 0, 'pod_id': 'pod1'}", "terminate pod1", "look", "look",
        "record GONE {}",
    ]  # fmt: skip
    assert told(ledger) == [("TERMINATING", "enough"), ("GONE", "enough; confirmed")]


def test_a_pod_is_ended_though_it_cannot_be_asked_at_first_or_recorded_at_all(
    api: Account, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.cloud.faults["terminate"] = ["down", "down"]
    termination.terminate(api, ledger, NAME, "pod1", "enough")
    assert api.cloud.rented == {} and told(ledger)[-1][0] == "GONE"
    api.add()
    api.cloud.faults["terminate"] = ["ignored"] * 999
    with pytest.raises(StillThereError, match=rf"POD pod1 \({NAME}\) MAY STILL BE RUNNING"):
        termination.terminate(api, ledger, NAME, "pod1", "enough")
    assert told(ledger)[-1] == ("TERMINATING", "enough")  # the next command tries again
    api.cloud.faults.clear()
    monkeypatch.setattr(Ledger, "move", _full)
    termination.terminate(api, ledger, NAME, "pod1", "enough")
    assert api.cloud.rented == {}


def _full(*_: object, **__: object) -> None:
    raise LedgerError(Problem("the disk is full"))


# ── stopped ────────────────────────────────────────────────────────────────────────────────────


def test_a_pod_is_stopped_when_the_provider_says_exited_and_nothing_else(
    api: Account, ledger: Ledger, waiting: Waiting
) -> None:
    api.cloud.faults["stop"] = ["down", "ignored", "ignored", "down"]
    termination.stop(api, ledger, NAME, "pod1", "enough")
    assert api.cloud.rented["pod1"].status == "EXITED"
    assert waiting.waits == [5.0] * 3 and api.times("stop pod1") == 5 and api.times("forget pod1") == 1
    assert told(ledger) == [("TERMINATING", "enough: to be stopped and kept"), ("STOPPED", "enough; kept")]
    entry = ledger.entry(NAME)
    assert entry is not None and entry.keep


@pytest.mark.parametrize("status", ["RUNNING", "STARTING", "PROVISIONING", "ERROR", "TERMINATED"])
def test_a_pod_of_any_other_status_is_not_stopped(api: Account, ledger: Ledger, waiting: Waiting, status: str) -> None:
    api.add(status=status)
    api.cloud.faults["stop"] = ["ignored"] * 99
    with pytest.raises(StillThereError, match=f"POD pod1 .*: it was to be stopped, and it is {status}"):
        termination.stop(api, ledger, NAME, "pod1", "enough")
    assert waiting.now == 185 and told(ledger)[-1][0] == "TERMINATING"


def test_why_a_pod_could_not_be_stopped_is_said(api: Account, ledger: Ledger) -> None:
    api.cloud.faults["stop"] = ["down"] * 99
    with pytest.raises(StillThereError, match="it was to be stopped, and the cloud does not answer"):
        termination.stop(api, ledger, NAME, "pod1", "enough")


def test_a_pod_that_is_gone_cannot_be_kept(api: Account, ledger: Ledger) -> None:
    del api.cloud.rented["pod1"]
    termination.stop(api, ledger, NAME, "pod1", "enough")
    assert told(ledger)[-1] == ("GONE", "enough; there was nothing left to keep")


def test_a_stopped_pod_that_is_not_recorded_is_said_for_its_disk_costs_money(
    api: Account, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "move", _full)
    with pytest.raises(StillThereError) as error:
        termination.stop(api, ledger, NAME, "pod1", "enough")
    (problem,) = error.value.problems
    assert problem.what == "pod pod1 is stopped, its disk costs money, and that is not recorded: the disk is full"
    assert problem.remedy == "python -m runner pods terminate pod1"
