"""What a command does with the pods that launchers have left: by state, by clock, and whatever the provider does."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cloud import clock, reconcile, termination
from runner.cloud.ledger import NOBODY, Entry, Ledger, LedgerError, State, owner
from runner.cloud.provider_errors import ApiDownError, StillThereError, WrongKeyError
from runner.cloud.reconcile import UNKNOWN_S, end_unanswered_creates, overdue
from runner.errors import Problem, RequestError
from tests.cloud.test_ledger import FACTS
from tests.cloud.test_termination import NAME, Account, Waiting, api, waiting

__all__ = ["api", "waiting"]
NOW = 10_000_000.0
DEAD = {"pid": 2**22 + 1, "host": owner()["host"], "pid_started": 1.0}
"""A launcher that was killed: it has not given its pod up."""


class Left:
    """Pods that launchers have left, and the command that finds them; both clocks say NOW."""

    def __init__(self, api: Account, ledger: Ledger) -> None:
        self.api, self.ledger = api, ledger

    def entry(self, state: State, name: str = NAME, pod_id: str | None = "pod1", **facts: Any) -> None:
        run_id = name.split("-")[1]
        self.ledger.plan(name, run_id=run_id, **{**FACTS, "base": self.api.base, "account": self.api.account})
        self.ledger.move(name, state, "left", **{"pod_id": pod_id, **NOBODY, **facts})

    def settle(self) -> list[str]:
        return reconcile.reconcile(self.api, self.ledger)

    def now(self, name: str = NAME) -> Entry:
        found = self.ledger.entry(name)
        assert found is not None
        return found


@pytest.fixture
def left(api: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Left:
    monkeypatch.setattr(clock, "now", lambda: NOW)
    monkeypatch.setattr(Account, "time", lambda self: NOW)
    api.add(created=NOW)
    return Left(api, Ledger(tmp_path / "ledger.db"))


# ── whose pods ─────────────────────────────────────────────────────────────────────────────────


def test_without_pods_that_nobody_holds_the_provider_is_not_asked(left: Left) -> None:
    assert left.settle() == [] and left.api.cloud.calls == []
    left.entry("SSH_READY", **owner(os.getppid()))
    left.entry("GONE", "runner-b-1")
    assert left.settle() == [] and left.api.cloud.calls == [] and left.now().state == "SSH_READY"


def test_a_ledger_or_a_list_that_cannot_be_had_is_said_and_changes_nothing(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.entry("SSH_READY")
    left.entry("SSH_READY", "runner-b-1", "pod2")
    left.api.cloud.faults["list"] = ["down"]
    said = "2 pods of earlier commands could not be looked after: the cloud does not answer"
    assert left.settle() == [said] and left.now().state == "SSH_READY" and len(left.api.cloud.rented) == 1
    monkeypatch.setattr(left.api, "pods", raising(WrongKeyError(Problem("refused"))))
    with pytest.raises(WrongKeyError):  # with such a key nothing else would work
        left.settle()
    monkeypatch.setattr(left.ledger, "entries", raising(LedgerError(Problem("the ledger is locked"))))
    assert left.settle() == ["the ledger is locked"]


def raising(error: Exception) -> Any:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("facts", "alone"),
    [
        ({"base": "https://elsewhere"}, True), ({"account": "another"}, False), ({}, False),
        ({"account": "another", "pod_id": "pod9"}, True), ({"pod_id": "pod9"}, False),
    ],
)  # fmt: skip
def test_pods_of_another_account_are_left_alone_unless_this_one_has_them(
    left: Left, facts: dict[str, Any], alone: bool
) -> None:
    left.entry("SSH_READY", **facts)
    notes = left.settle()
    assert left.now().state == ("SSH_READY" if alone else "GONE")
    pod = facts.get("pod_id", "pod1")
    assert (notes == [f"pod {pod} was rented with another key or address; left unchanged"]) is alone


@pytest.mark.parametrize(("number", "shown"), [(2, "pod1, pod2"), (3, "pod1, pod2, …")])
def test_several_pods_of_other_accounts_are_one_note(left: Left, number: int, shown: str) -> None:
    for one in range(1, number + 1):
        left.entry("SSH_READY", f"runner-a-{one}", f"pod{one}", created=NOW + one, base="https://elsewhere")
    said = f"{number} pods ({shown}) were rented with another key or address; left unchanged"
    assert left.settle() == [said]


def test_pods_of_an_emulator_that_has_ended_are_gone(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        base = f"http://127.0.0.1:{server.getsockname()[1]}"
        left.entry("RUNNING", base=base)
        assert "left unchanged" in left.settle()[0] and left.now().state == "RUNNING"
    for other in ("https://api.example:9", "http://127.0.0.1", "http://192.0.2.1:9"):
        left.ledger.set(NAME, base=other)
        assert "left unchanged" in left.settle()[0] and left.now().state == "RUNNING"
    left.ledger.set(NAME, base=base)
    with monkeypatch.context() as context:
        context.setattr(socket, "create_connection", raising(TimeoutError()))
        assert "left unchanged" in left.settle()[0]
    for deadline in (NOW + 1, None):  # what was rented at that address may be a pod of RunPod's, through a tunnel
        left.ledger.set(NAME, deadline=deadline)
        assert "left unchanged" in left.settle()[0] and left.now().state == "RUNNING"
    monkeypatch.setattr(clock, "now", lambda: time.time() + reconcile.DAY_S + 1)
    assert left.settle() == [] and left.now().state == "GONE"
    assert left.now().detail == "its emulator has ended, and every pod with it"
    left.entry("RUNNING", "runner-b-1", base=base.replace("127.0.0.1", "localhost"), deadline=1.0)
    assert left.settle() == [] and left.now("runner-b-1").state == "GONE"


def test_what_another_command_takes_or_has_settled_is_left_to_it(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    left.entry("SSH_READY", "runner-a-1", created=NOW - 2)
    left.entry("SSH_READY", "runner-b-1", "pod2", created=NOW - 1)
    left.entry("SSH_READY", "runner-c-1", "pod3")
    left.api.add("pod2", "runner-b-1")
    left.api.add("pod3", "runner-c-1")
    take = Ledger.take

    def taken(self: Ledger, name: str) -> bool:
        if name == "runner-b-1":
            self.move(name, "GONE", "settled")
        return name != "runner-a-1" and take(self, name)

    monkeypatch.setattr(Ledger, "take", taken)
    (note,) = left.settle()
    assert "pod3" in note and sorted(left.api.cloud.rented) == ["pod1", "pod2"]


def test_what_cannot_be_done_with_one_pod_is_said_and_the_others_are_settled(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        left.entry("SSH_READY", f"runner-a-{number}", f"pod{number}", created=NOW + number)
        left.api.add(f"pod{number}", f"runner-a-{number}")
    end = termination.terminate
    errors = {
        "pod1": RequestError(Problem("no such thing")),
        "pod2": StillThereError(Problem("pod2 may run", None, "end it")),
    }

    def terminate(*words: Any) -> None:
        if error := errors.get(words[3]):
            raise error
        end(*words)

    monkeypatch.setattr(termination, "terminate", terminate)
    first, second, third = left.settle()
    assert first == "pod pod1: no such thing" and second == "pod2 may run; end it" and "pod3" in third
    assert [entry.owned for entry in left.ledger.entries()] == [False, False]


# ── by state ───────────────────────────────────────────────────────────────────────────────────


def test_what_was_never_asked_for_is_gone(left: Left) -> None:
    left.entry("PLANNED", pod_id=None)
    assert left.settle() == [] and left.now().state == "GONE"


@pytest.mark.parametrize("state", ["PROVISIONING", "SSH_READY", "SYNCED", "PARKED", "PREEMPTED", "TERMINATING"])
def test_a_pod_that_nobody_holds_and_that_does_not_end_itself_is_ended(left: Left, state: State) -> None:
    left.entry(state)
    assert left.settle() == [f"pod pod1 of run a was left {state} by a launcher that is gone: it is ended"]
    assert left.api.cloud.rented == {} and left.now().state == "GONE"
    assert left.ledger.transitions(NAME)[-1][2].startswith(f"no process follows it any more, {state} since")


@pytest.mark.parametrize(
    ("state", "before", "stopped"),
    [("TERMINATING", None, True), ("SSH_READY", None, False), ("SSH_READY", -50.0, True), ("SSH_READY", 50.0, False)],
)
def test_a_pod_that_was_to_be_kept_is_stopped_once_a_run_was_in_it(
    left: Left, state: State, before: float | None, stopped: bool
) -> None:
    if before is not None:  # an entry of the same pod
        left.entry("GONE", "runner-b-1", created=NOW + before)
    left.entry(state, keep=1)
    (note,) = left.settle()
    assert note == "pod pod1 of run a is stopped, as requested" if stopped else "it is ended" in note
    assert left.now().state == ("STOPPED" if stopped else "GONE")
    assert [pod.status for pod in left.api.cloud.rented.values()] == (["EXITED"] if stopped else [])
    assert not stopped or left.now().detail == "again, after the launcher ended; kept"


def test_a_double_is_ended_and_its_pod_that_trains_is_not(left: Left) -> None:
    left.entry("RUNNING")
    left.api.add("pod2")
    left.api.add("pod3", "runner-b-1")
    assert left.settle() == [] and sorted(left.api.cloud.rented) == ["pod1", "pod3"]
    left.api.cloud.calls.clear()
    assert left.settle() == [] and left.api.cloud.calls == ["list"]  # there is none


# ── a create that was not answered ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["CREATING", "CREATE_UNKNOWN"])
def test_pods_of_a_create_that_was_not_answered_are_ended(left: Left, waiting: Waiting, state: State) -> None:
    left.entry(state, pod_id=None)
    left.api.add("pod2")
    left.api.add("pod3", "runner-b-1")
    assert left.settle() == ["pod pod1 of run a came of a create that was not answered: it is ended"]
    assert sorted(left.api.cloud.rented) == ["pod3"] and left.now().state == "GONE"
    states = [new for _, new, _ in left.ledger.transitions(NAME)]
    assert ("CREATE_UNKNOWN" in states[2:]) is (state == "CREATING")


def test_a_create_is_waited_for_once_and_forgotten_after_a_quarter_of_an_hour_by_both_clocks(
    left: Left, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.api.cloud.rented.clear()
    left.entry("CREATING", pod_id=None, created=NOW - UNKNOWN_S + 1)
    assert left.settle() == [] and left.now().state == "CREATE_UNKNOWN" and waiting.now >= 60
    waited = waiting.now
    later = NOW + 2
    for own, there in ((NOW, NOW), (later, NOW), (NOW, later), (later, None), (later, later)):
        monkeypatch.setattr(clock, "now", lambda own=own: own)
        monkeypatch.setattr(Account, "time", lambda self, there=there: there)
        assert left.settle() == [] and left.now().state == ("GONE" if own == there == later else "CREATE_UNKNOWN")
    assert waiting.now == waited


def test_a_run_ends_what_its_own_lost_creates_bring_forth(
    left: Left, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.entry("CREATE_UNKNOWN", "runner-a-1", None, **owner())
    left.entry("CREATE_UNKNOWN", "runner-a-2", None)
    left.entry("CREATE_UNKNOWN", "runner-a-3", None)
    left.entry("CREATE_UNKNOWN", "runner-b-1", None)
    left.entry("SSH_READY", "runner-a-4", "pod9")
    left.ledger.set("runner-a-3", **owner(os.getppid()))
    for number, name in enumerate(("runner-a-1", "runner-a-2", "runner-a-3", "runner-b-1", "runner-a-4"), 1):
        left.api.add(f"pod{number}", name)
    end_unanswered_creates(left.api, left.ledger, "a")
    assert sorted(left.api.cloud.rented) == ["pod3", "pod4", "pod5"]
    assert [left.now(f"runner-a-{n}").state for n in (1, 2, 3, 4)] == ["GONE", "GONE", "CREATE_UNKNOWN", "SSH_READY"]
    assert waiting.now == 2 * 5  # each end is confirmed by two looks
    monkeypatch.setattr(left.ledger, "entries", raising(LedgerError(Problem("the ledger is locked"))))
    end_unanswered_creates(left.api, left.ledger, "a")


def test_a_lost_create_that_brings_nothing_forth_is_kept_in_mind_for_a_while(left: Left, waiting: Waiting) -> None:
    left.api.cloud.rented.clear()
    left.entry("CREATE_UNKNOWN", pod_id=None)
    left.api.cloud.faults["list"] = ["down"]
    end_unanswered_creates(left.api, left.ledger, "a")
    assert left.now().state == "CREATE_UNKNOWN" and waiting.waits == []
    end_unanswered_creates(left.api, left.ledger, "a", now=True)
    assert left.now().state == "CREATE_UNKNOWN" and waiting.now > 60  # the run is over: looked for once more
    left.entry("CREATE_UNKNOWN", "runner-b-1", None)
    left.api.add("pod2", "runner-b-1")
    end_unanswered_creates(left.api, left.ledger, "b", now=True)
    assert left.api.cloud.rented == {}
    left.ledger.set(NAME, created=NOW - UNKNOWN_S - 1)
    end_unanswered_creates(left.api, left.ledger, "a")
    assert (left.now().state, left.now().detail) == ("GONE", "no pod of that name has appeared")


# ── a pod that ends itself ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["RUNNING", "COLLECTING", "STOPPED"])
def test_a_pod_that_has_ended_itself_is_gone_when_it_is_absent_twice(left: Left, state: State) -> None:
    left.entry(state)
    left.api.cloud.faults["list"] = ["ignored"]  # one list without it
    assert left.settle() == [] and left.now().state == state
    left.api.cloud.rented.clear()
    said = [] if state == "STOPPED" else ["pod pod1 of run a is gone"]
    assert left.settle() == said and left.now().state == "GONE"
    assert left.now().detail == "it has ended itself, or was taken away"


@pytest.mark.parametrize("state", ["RUNNING", "COLLECTING"])
def test_a_pod_that_has_stopped_itself_has_a_result(left: Left, state: State) -> None:
    left.entry(state, deadline=NOW - 9999)
    left.api.add(status="EXITED")
    assert left.settle() == ["pod pod1 has stopped itself with its result: python -m runner fetch a"]
    assert left.now().state == "STOPPED" and left.settle() == [] and len(left.api.cloud.rented) == 1
    assert left.now().detail == "it has stopped itself, with a result that was not downloaded"


def test_a_stopped_pod_is_past_no_deadline(left: Left) -> None:
    left.entry("STOPPED", deadline=NOW - 9999)
    assert left.settle() == [] and left.api.cloud.rented["pod1"].status == "RUNNING"


@pytest.mark.parametrize(
    ("late", "disk", "became"), [(300, 20, "alive"), (301, 20, "EXITED"), (301, 0, "gone"), (300, 0, "alive")]
)
def test_five_minutes_past_its_deadline_a_pod_is_stopped_with_its_disk_or_ended_without_one(
    left: Left, late: float, disk: float, became: str
) -> None:
    left.entry("RUNNING", deadline=NOW - late, heartbeat_s=None)
    left.api.add(created=NOW, volume_gb=disk)
    notes = left.settle()
    pod = left.api.cloud.rented.get("pod1")
    assert (pod.status if pod else "gone") == {"alive": "RUNNING"}.get(became, became)
    late_note = "pod pod1 of run a was past its deadline and still running: "
    expected = {
        "alive": [], "gone": [f"{late_note}it is ended"],
        "EXITED": [f"{late_note}it is stopped, and its disk, which may have the result, costs money until "
                   "python -m runner fetch a, or pods terminate a"],
    }  # fmt: skip
    assert notes == expected[became]
    assert left.ledger.transitions(NAME)[-1][2].startswith("left" if became == "alive" else "it is past its deadline")


def test_a_pod_past_its_deadline_that_cannot_be_stopped_is_ended_and_one_that_is_stopped_is_not(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    left.entry("RUNNING", deadline=NOW - 301)
    left.api.add(created=NOW, volume_gb=20)
    left.api.cloud.faults["stop"] = ["ignored"] * 99
    (note,) = left.settle()
    assert note.endswith("it is ended") and left.api.cloud.rented == {}
    left.entry("RUNNING", "runner-b-1", deadline=NOW - 301)
    left.api.add(name="runner-b-1", created=NOW, volume_gb=20)
    left.api.cloud.faults.clear()
    monkeypatch.setattr(termination, "_kept", raising(StillThereError(Problem("it is not recorded", None, "end it"))))
    assert left.settle() == ["it is not recorded; end it"] and left.api.cloud.rented["pod1"].status == "EXITED"


@pytest.mark.parametrize("created", [None, NOW + 5000])
def test_lateness_is_judged_by_the_clock_that_the_entry_was_written_by(left: Left, created: float | None) -> None:
    """The pod was asked for at NOW by that clock, and made at NOW + 5000 by the provider's, which says NOW + 5301."""
    left.entry("RUNNING", deadline=NOW, created=NOW, heartbeat_s=None)
    left.api.add(created=created)
    left.api.time = lambda: NOW + 5301  # type: ignore[method-assign]  # for this test
    assert len(left.settle()) == 1
    left.entry("RUNNING", "runner-b-1", deadline=NOW + 5000, created=NOW, heartbeat_s=None)
    left.api.add(name="runner-b-1", created=created)
    assert len(left.settle()) == (created is None)
    left.entry("RUNNING", "runner-c-1", deadline=0.0, created=NOW, heartbeat_s=None)
    left.api.add(name="runner-c-1", created=created)
    left.api.time = lambda: None  # type: ignore[method-assign]  # for this test
    assert left.settle() == []  # nobody knows


def test_the_silence_of_a_launcher_that_was_killed_counts_from_when_that_is_found_out(left: Left) -> None:
    left.entry("RUNNING", heartbeat_s=600.0, created=NOW - 99_999, updated=NOW - 9999, **DEAD)
    left.api.add(created=NOW - 99_999)
    assert left.settle() == [] and left.now().updated == NOW and left.now().pid is None
    left.api.time = lambda: NOW + 899  # type: ignore[method-assign]  # for this test
    assert left.settle() == [] and left.now().updated == NOW  # a listing is no word of a launcher
    left.api.time = lambda: NOW + 901  # type: ignore[method-assign]  # for this test
    assert len(left.settle()) == 1 and left.api.cloud.rented == {}


def test_a_launcher_that_was_killed_takes_no_later_word_back_and_moves_no_deadline(left: Left) -> None:
    left.entry("RUNNING", heartbeat_s=600.0, updated=NOW + 50, **DEAD)
    assert left.settle() == [] and left.now().updated == NOW + 50
    left.ledger.set(NAME, deadline=NOW - 301, **DEAD)
    assert len(left.settle()) == 1


def test_late_by_its_deadline_or_by_the_silence_of_its_launcher(left: Left) -> None:
    left.entry("RUNNING")
    entry = replace(left.now(), deadline=5000.0, updated=1000.0, created=0.0, heartbeat_s=600.0)
    assert [overdue(entry, now) for now in (1900.0, 1900.1)] == [False, True]
    alone = replace(entry, heartbeat_s=None)
    assert [overdue(alone, now) for now in (5300.0, 5300.1)] == [False, True]
    assert not overdue(replace(alone, deadline=None), 1e12)


def test_a_pod_was_rented_when_the_first_run_asked_for_it(left: Left) -> None:
    left.entry("GONE", "runner-b-1", created=NOW - 50)
    left.entry("GONE", "runner-c-1", "pod2", created=NOW - 99)
    left.entry("GONE", "runner-d-1", None, created=NOW - 99)
    left.entry("RUNNING")
    assert reconcile.rented_at(left.ledger, left.now()) == NOW - 50
    assert reconcile.rented_at(left.ledger, replace(left.now(), pod_id=None)) == NOW
    assert reconcile.rented_at(left.ledger, replace(left.now(), pod_id="pod9", created=7.0)) == 7.0


def test_a_pod_that_cannot_be_looked_at_stays_in_the_ledger(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    left.entry("RUNNING")
    left.api.cloud.rented.clear()
    monkeypatch.setattr(left.api, "pod", raising(ApiDownError(Problem("the cloud does not answer"))))
    assert left.settle() == ["pod pod1: the cloud does not answer"] and left.now().state == "RUNNING"
