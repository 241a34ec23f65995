"""Renting against an emulated RunPod: whatever goes wrong, and wherever a launcher dies, no pod is left behind."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from runner.cloud import executor, fleet, termination, transfer
from runner.cloud import rent_pod as renting
from runner.cloud.budget import spent
from runner.cloud.clock import ProviderClock, now
from runner.cloud.follow import Display
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Entry, Ledger, LedgerError, owner
from runner.cloud.provider import Pod
from runner.cloud.provider_errors import ApiDownError, NoCapacityError, NoPodError, StillThereError, TooDearError
from runner.cloud.reconcile import UNKNOWN_S, _armed, overdue, reconcile
from runner.cloud.remote_run import _listen
from runner.cloud.rent_pod import acquire
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.runpod_provider import RunPod
from runner.cloud.session import Session, before_its_end
from runner.cloud.ssh import LostError
from runner.cloud.ssh_keys import KeyPair
from runner.errors import Problem, RunFailedError
from runner.rundir.directory import RunDir
from tests.support.emulated import Emulator, until
from tests.support.rented import A6000, KEY, PLAN, RTX4090, creates, impatient, rented_spec, run_of, states
from tests.support.rented import rent as rent_in

pytestmark = pytest.mark.usefixtures("state", "hello")
Rent = Callable[..., Lease]


@pytest.fixture
def rent(tmp_path: Path) -> Rent:
    """Rent a pod for the demo; words are the run's."""
    return partial(rent_in, tmp_path)


def test_from_planned_to_gone(emulator: Emulator, rent: Rent) -> None:
    rented = rent("where.max_usd=5")
    assert list(emulator.pods()) == [rented.pod.id] and rented.usd_per_hour == 0.74
    assert rented.name.startswith(PREFIX) and rented.pod.name == rented.name
    assert rented.pod.env["RUNNER_RUN_ID"] == rented.run_id
    rented.mark("RUNNING", "training")
    rented.release()
    rented.release()  # again is no error
    assert emulator.pods() == {} and Ledger().entries() == []
    assert states(rented.name)[:7] == [
        "PLANNED", "CREATING", "PROVISIONING", "SSH_READY", "RUNNING", "TERMINATING", "GONE",
    ]  # fmt: skip


def test_a_pod_in_another_country_is_given_back(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = Api.create_pod
    monkeypatch.setattr(Api, "create_pod", lambda api, it: plainly(api, replace(it, data_centers=("EU-RO-1",))))
    with pytest.raises(NoPodError, match="is in EU-RO-1, not in US-KS-2 or US-TX-3"):
        rent("where.country=US", f"where.gpu_types=[{RTX4090}]")
    assert emulator.pods() == {} and Ledger().entries() == []


def test_a_template_is_asked_for_by_its_id(emulator: Emulator, rent: Rent) -> None:
    rent("where.template=Runpod Pytorch 2.8.0").release()
    (asked,) = [e.body for e in emulator.exchanges if (e.method, e.path) == ("POST", "/v2/pods")]
    assert asked["templateId"] == "runpod-torch-v280" and "image" not in asked


def test_keep_leaves_it_stopped_and_says_so(emulator: Emulator, rent: Rent) -> None:
    rented = rent("where.volume_gb=50")
    rented.release(keep=True)
    (pod,) = emulator.pods().values()
    assert pod.status == "EXITED" and states(rented.name)[-1] == "STOPPED"
    assert rented.kept_usd_per_day() == pytest.approx(50 * 0.20 / 730 * 24)
    assert reconcile(RunPod(), Ledger()) == [] and len(emulator.pods()) == 1  # kept on purpose


@pytest.mark.parametrize("fault", ["lost", "timeout"])
def test_a_create_whose_answer_is_lost_is_found_by_its_name(
    emulator: Emulator, rent: Rent, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.cloud.runpod.transport.TIMEOUT_S", 1.0)
    emulator.inject(fault, on="create", seconds=3)
    rented = rent()
    assert list(emulator.pods()) == [rented.pod.id]
    assert "CREATE_UNKNOWN" in states(rented.name)
    rented.release()
    assert emulator.pods() == {}
    assert until(lambda: creates(emulator)) == 1  # one that is late is counted when it was answered


def test_a_pod_that_appears_long_after_its_create_is_ended_too(emulator: Emulator, rent: Rent) -> None:
    emulator.inject("late_listing", seconds=6)  # longer than it is looked for here: 3 s
    emulator.inject("lost", on="create")
    rented = rent()  # another one, under another name
    assert creates(emulator) == 2 and len(emulator.pods()) == 2
    until(lambda: len(RunPod().pods()) == 2, 20)
    assert rented.refresh() is not None
    assert list(emulator.pods()) == [rented.pod.id]
    rented.release()
    assert emulator.pods() == {}


def test_no_capacity_moves_on_and_nothing_else_does(emulator: Emulator, rent: Rent) -> None:
    emulator.inject("no_capacity", gpu=RTX4090, times=0)
    said: list[str] = []
    rented = rent("where.max_usd=5", say=said.append)
    assert rented.pod.gpu_id == A6000 and any("none is free" in line for line in said)
    rented.release()
    emulator.inject("no_capacity", times=0)
    with pytest.raises(NoCapacityError, match="none of these is free now") as error:
        rent("where.max_usd=5")
    assert error.value.exit_code == 3 and Ledger().entries() == []


@pytest.mark.slow
def test_a_bad_host_is_given_back_and_another_one_tried(emulator: Emulator, rent: Rent) -> None:
    emulator.inject("bad_host")
    rented = rent()
    assert creates(emulator) == 2 and list(emulator.pods()) == [rented.pod.id]
    rented.release()
    emulator.inject("bad_host", times=0)
    with pytest.raises(NoPodError, match="no machine after"):
        rent("where.gpu_types=[NVIDIA L4]")
    assert emulator.pods() == {}


def test_the_real_price_is_held_against_the_cap(emulator: Emulator, rent: Rent) -> None:
    emulator.inject("price", factor=2.0, times=0)
    with pytest.raises(TooDearError, match=r"costs \$1.48 an hour, where \$0.74 was offered"):
        rent("where.max_usd=1")
    assert emulator.pods() == {} and Ledger().entries() == []
    rented = rent("where.max_usd=2")
    assert rented.usd_per_hour == 1.48
    assert rented.deadline - rented.meter.started == pytest.approx(2 / rented.meter.rate * 3600, rel=0.01)
    rented.release()


def test_an_end_that_is_accepted_and_not_done_is_asked_for_again(emulator: Emulator, rent: Rent) -> None:
    rented = rent()
    emulator.inject("undead")
    rented.release()
    assert emulator.pods() == {}
    assert sum(e.method == "DELETE" for e in emulator.exchanges) >= 2


def test_an_end_that_cannot_be_confirmed_is_loud_and_tried_again_by_the_next_command(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, 0.5)
    rented = rent()
    emulator.inject("undead", times=0)
    with pytest.raises(StillThereError) as error:
        rented.release()
    (problem,) = error.value.problems
    assert error.value.exit_code == 1 and rented.pod.id in problem.what and "MAY STILL BE RUNNING" in problem.what
    assert f"python -m runner pods terminate {rented.pod.id}" in str(problem.remedy)
    assert "https://console.runpod.io/pods" in str(problem.remedy)
    assert states(rented.name)[-1] == "TERMINATING"
    emulator.clear()
    Ledger().leave(rented.name)  # the launcher has ended
    (note,) = reconcile(RunPod(), Ledger())
    assert rented.pod.id in note and emulator.pods() == {}


def test_a_refused_key_is_not_the_pods_end(emulator: Emulator, rent: Rent) -> None:
    rented = rent()
    emulator.inject("answer", on="get", status=401, times=2)
    assert rented.refresh() is not None
    emulator.inject("answer", on="reads", status=401, times=2)
    rented.release()  # asked again, and then confirmed
    assert emulator.pods() == {}


def test_a_pod_that_vanished_is_told_from_an_api_that_is_down(emulator: Emulator, rent: Rent) -> None:
    rented = rent()
    emulator.inject("answer", on="get", status=502, times=0)
    with pytest.raises(ApiDownError):
        rented.refresh()
    emulator.clear()
    assert rented.refresh() is not None
    emulator.inject("vanish", pod=rented.pod.id)
    until(lambda: not emulator.pods())
    assert rented.refresh() is None and states(rented.name)[-1] == "PREEMPTED"
    rented.release()
    assert Ledger().entries() == []


def absent(monkeypatch: pytest.MonkeyPatch, looks: str) -> list[str]:
    """What RunPod says of a pod in turn: present, or absent, or an error; then as it is. The looks that were taken."""
    taken: list[str] = []
    real = Api.pod

    def pod(self: Api, pod_id: str) -> Pod | None:
        if len(taken) == len(looks):
            return real(self, pod_id)
        taken.append(looks[len(taken)])
        if taken[-1] == "e":
            raise ApiDownError(Problem("an error"))
        return real(self, pod_id) if taken[-1] == "p" else None

    monkeypatch.setattr(Api, "pod", pod)
    monkeypatch.setattr(Api, "pods", lambda self: [])
    return taken


def test_a_pod_that_is_absent_once_is_not_gone(emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch) -> None:
    rented = rent()
    rented.mark("RUNNING", "training")
    rented.ledger.leave(rented.name)
    before = states(rented.name)
    with monkeypatch.context() as context:
        taken = absent(context, "aap")  # asked, looked at once more, and there it is
        assert rented.refresh() is not None and taken == ["a", "a", "p"]
    entry = Ledger().entry(rented.name)
    with monkeypatch.context() as context:
        taken = absent(context, "ap")
        assert entry is not None
        assert _armed(RunPod(), Ledger(), entry, None, ProviderClock(lambda: None)) is None and taken == ["a", "p"]
    assert states(rented.name) == before and list(emulator.pods()) == [rented.pod.id]
    emulator.inject("vanish", pod=rented.pod.id)
    until(lambda: not emulator.pods())
    assert rented.refresh() is None


def test_of_two_commands_one_settles_what_a_launcher_has_left(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented = rent()
    rented.ledger.leave(rented.name)
    with monkeypatch.context() as context:
        context.setattr(Ledger, "take", lambda self, name: False)  # the other one was faster
        assert reconcile(RunPod(), Ledger()) == [] and list(emulator.pods()) == [rented.pod.id]
    (note,) = reconcile(RunPod(), Ledger())
    assert rented.pod.id in note and emulator.pods() == {}


def long_since(rented: Lease, **facts: Any) -> Entry:
    """A run that has trained for three hours since its last entry, when its launcher was killed."""
    rented.mark("RUNNING", "training")
    dead = {"pid": 2**22 + 1, "host": owner()["host"], "pid_started": 1.0}
    rented.ledger.set(rented.name, updated=now() - 3 * 3600, **dead, **facts)
    entry = rented.ledger.entry(rented.name)
    assert entry is not None and not entry.owned
    return entry


def test_a_listing_after_a_launcher_was_killed_leaves_its_training_alone_as_its_agent_does(
    emulator: Emulator, rent: Rent
) -> None:
    """Nobody has heard of it for longer than `where.heartbeat_minutes`, as far as the ledger knows."""
    rented = rent()
    long_since(rented)
    for _ in range(2):
        assert reconcile(RunPod(), Ledger()) == [] and list(emulator.pods()) == [rented.pod.id]
        assert fleet.unowned_pods(RunPod(), Ledger()) == []
    entry = Ledger().entry(rented.name)
    assert entry is not None and entry.pid is None and entry.updated > now() - 60
    rented.ledger.set(rented.name, updated=now() - 3 * 3600)  # and was not attached to for another three
    assert len(reconcile(RunPod(), Ledger())) == 1


def test_a_pod_has_five_minutes_to_end_itself_after_its_deadline_or_its_launchers_silence(
    emulator: Emulator, rent: Rent
) -> None:
    entry = replace(long_since(rent()), deadline=5_000.0, updated=1_000.0, heartbeat_s=600.0)
    assert not overdue(replace(entry, heartbeat_s=None), 5_299) and overdue(replace(entry, heartbeat_s=None), 5_301)
    assert not overdue(entry, 1_899) and overdue(entry, 1_901)


def test_a_listing_is_no_word_of_a_launcher_and_a_word_takes_nothing_back(emulator: Emulator, rent: Rent) -> None:
    rented = rent()
    rented.mark("RUNNING", "training")
    rented.ledger.leave(rented.name)
    for heard in (now() - 100, now() + 1000):  # the second one by a clock that was ahead
        rented.ledger.set(rented.name, updated=heard)
        reconcile(RunPod(), Ledger())
        entry = Ledger().entry(rented.name)
        assert entry is not None and entry.updated == heard
    rented.ledger.leave(rented.name)
    entry = Ledger().entry(rented.name)
    assert entry is not None and entry.updated == heard


def test_a_launcher_that_leaves_its_pod_to_another_command_was_heard_of(emulator: Emulator, rent: Rent) -> None:
    rented = rent()
    rented.mark("COLLECTING", "done")
    rented.ledger.set(rented.name, updated=now() - 3 * 3600)
    rented.ledger.leave(rented.name)  # its disk is full: `fetch` goes on
    assert reconcile(RunPod(), Ledger()) == [] and list(emulator.pods()) == [rented.pod.id]


@pytest.mark.parametrize(
    ("agent", "stood", "message"),
    [
        ({"state": "ending", "ended_in": "done", "exit_code": 0}, "done", None),
        ({"state": "ending", "ended_in": "failed", "exit_code": 1}, "failed", None),
        ({"state": "ending", "ended_in": "done", "uploaded": False}, "done", "the upload failed"),
        ({"state": "ending", "ended_in": "training"}, "training", "the pod ended it: no sign of the launcher"),
        ({"state": "failed", "ended_in": None}, "failed", "no sign of the launcher"),
    ],
)
def test_why_a_pod_ended_itself_is_no_failure_of_a_run_that_was_over(
    agent: dict[str, Any], stood: str, message: str | None
) -> None:
    found = before_its_end({**agent, "message": "no sign of the launcher"})
    assert (found["state"], found["message"]) == (stood, message)


@pytest.mark.parametrize(("minutes", "stands"), [(10.0, "done"), (10.0, "training"), (None, "training")])
def test_what_an_attached_command_orders_is_what_the_next_listing_judges_by(
    emulator: Emulator, rent: Rent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float | None, stands: str
) -> None:
    """`attach` that is left with Ctrl-C leaves the run to its pod, and `fetch` has a pod listen past its deadline."""
    rented = rent()
    session = session_of(rented, tmp_path, monkeypatch)
    rented.mark("RUNNING", "training")
    rented.deadline = now() - 3600 if stands == "done" else now() + 3600
    rented.ledger.set(rented.name, updated=now() - 3 * 3600, deadline=rented.deadline)
    session.agent, placed = {"state": stands}, {}
    order = {"sent": now() - 7200, "deadline": rented.deadline, "started": now() - 7200}
    said = f"{json.dumps(order)}\n{time.time() - 7200:.0f}\n{time.time():.0f}\n"
    session.at = SimpleNamespace(
        folder="/x", connection=SimpleNamespace(run=lambda *_: said, close=lambda: None),
        place=lambda name, content: placed.update(content), start_agent=dict,
    )  # type: ignore[assignment]  # fmt: skip
    _listen(session, minutes)
    assert placed["heartbeat_minutes"] == minutes
    rented.ledger.leave(rented.name)
    entry = rented.ledger.entry(rented.name)
    assert entry is not None and entry.heartbeat_s == (600 if minutes else None) and entry.updated > now() - 60
    assert entry.deadline == pytest.approx(placed["deadline"], abs=5)
    assert reconcile(RunPod(), Ledger()) == [] and list(emulator.pods()) == [rented.pod.id]


@pytest.mark.parametrize("disk", [False, True])
def test_a_pod_past_its_deadline_is_stopped_where_its_disk_may_have_the_only_result(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch, disk: bool
) -> None:
    rented = rent()
    if not disk:
        real = Api.pods
        monkeypatch.setattr(Api, "pods", lambda self: [replace(pod, volume_gb=0.0) for pod in real(self)])
    long_since(rented, deadline=now() - 3600)
    (note,) = reconcile(RunPod(), Ledger())
    assert rented.pod.id in note and "past its deadline" in note
    if disk:
        assert f"fetch {rented.run_id}" in note and states(rented.name)[-1] == "STOPPED"
        assert [pod.status for pod in emulator.pods().values()] == ["EXITED"]
        assert reconcile(RunPod(), Ledger()) == [] and fleet.unowned_pods(RunPod(), Ledger()) == []
        assert fleet.terminate(RunPod(), Ledger(), rented.run_id) == [rented.pod.id]
    assert emulator.pods() == {}


def test_a_pod_past_its_deadline_that_cannot_be_stopped_is_ended(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented = rent()
    long_since(rented, deadline=now() - 3600)
    monkeypatch.setattr(Api, "stop", raising(ApiDownError(Problem("no"))))
    (note,) = reconcile(RunPod(), Ledger())
    assert "it is ended" in note and emulator.pods() == {}


@pytest.mark.slow
@pytest.mark.parametrize(("looks", "asked"), [("aa", 1), ("apaa", 2), ("aeaa", 2), ("ppaa", 3), ("apapaa", 3)])
def test_an_end_is_confirmed_by_two_absences_in_a_row(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch, looks: str, asked: int
) -> None:
    rented = rent()
    emulator.inject("undead", times=0)  # until it is not there any more
    before = sum(e.method == "DELETE" for e in emulator.exchanges)
    with monkeypatch.context() as context:
        taken = absent(context, looks)
        termination.confirm_gone(RunPod(), rented.name, rented.pod.id)
    assert "".join(taken) == looks
    assert sum(e.method == "DELETE" for e in emulator.exchanges) - before == asked
    emulator.clear()
    rented.release()


def session_of(rented: Lease, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session whose pod takes everything, and says nothing."""
    spec = rented_spec("where.volume_gb=20")
    run = RunDir(next((folder / "runs").iterdir()))
    session = Session(run, spec, rented, KeyPair(folder / "key", "ssh-ed25519 AAAA test"), print)
    monkeypatch.setattr(session, "login", lambda: None)
    monkeypatch.setattr(session, "_keepalive", lambda at: nullcontext())
    for name in ("arm_agent", "check_memory", "check_gpus", "send_run", "send_secrets", "start_task"):
        monkeypatch.setattr(transfer, name, lambda *_: {})
    return session


def test_a_pod_is_running_in_the_ledger_before_it_has_a_task(
    emulator: Emulator, rent: Rent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that dies in between leaves a pod that is armed, and not one that the next command ends."""
    rented = rent()
    session = session_of(rented, tmp_path, monkeypatch)
    seen: list[str] = []
    monkeypatch.setattr(transfer, "start_task", lambda *_: seen.append(rented.ledger.entry(rented.name).state))
    session.load(False)
    assert seen == ["RUNNING"]
    rented.ledger.move(rented.name, "SYNCED", "once more")
    other = replace(session, _recorded_pod=None)
    monkeypatch.setattr(other, "login", lambda: None)
    monkeypatch.setattr(other, "_keepalive", lambda at: nullcontext())
    monkeypatch.setattr(Ledger, "_set", staticmethod(raising(sqlite3.OperationalError("database or disk is full"))))
    with pytest.raises(LedgerError):
        other.load(False)
    assert seen == ["RUNNING"]  # a task that is not recorded is not begun


def test_a_pod_that_may_train_is_not_given_back_for_a_ledger_that_breaks_afterwards(
    emulator: Emulator, rent: Rent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by benchmarks/chaos_pods.py: the connection broke after the task was given, then the disk."""
    rented = rent()
    session = session_of(rented, tmp_path, monkeypatch)
    given: list[str] = []

    def give(*_: object) -> None:
        given.append(rented.pod.id)
        if len(given) == 1:
            monkeypatch.setattr(Ledger, "_set", staticmethod(raising(sqlite3.OperationalError("disk is full"))))
            raise LostError(Problem("the connection broke"))

    monkeypatch.setattr(transfer, "start_task", give)
    session.load(False)
    assert given == [rented.pod.id] * 2


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("where", ["before", "pod.json", "following", "memory", "collecting"])
def test_a_disk_here_that_takes_nothing_ends_a_pod_only_before_it_trains(
    emulator: Emulator, rent: Rent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    rented, full = rent(), OSError(errno.ENOSPC, "No space left on device")
    session = session_of(rented, tmp_path, monkeypatch)
    if where == "before":
        monkeypatch.setattr(transfer, "send_run", raising(full))
    elif where == "pod.json":
        monkeypatch.setattr(RunDir, "write", raising(full))
    elif where == "following":
        monkeypatch.setattr(executor, "follow", raising(full))
    elif where == "memory":
        monkeypatch.setattr(executor, "follow", raising(MemoryError()))
    else:
        done = {"state": "done", "exit_code": 0}
        monkeypatch.setattr(executor, "follow", lambda session, _: session.agent.update(done) or done)
        monkeypatch.setattr(session, "collect", raising(full))
    monkeypatch.setattr(renting, "acquire", lambda *_, **__: rented)
    monkeypatch.setattr(executor, "Session", lambda *_: session)
    monkeypatch.setenv("RUNPOD_API_KEY", emulator.key)
    with pytest.raises(RunFailedError) as caught:
        executor.execute(session.run, session.spec)
    assert ("no memory" if where == "memory" else "No space left on device") in str(caught.value)
    entry = Ledger().entry(rented.name)
    assert entry is not None and not entry.owned
    if where in ("following", "memory"):
        (problem,) = caught.value.problems
        assert f"pod {rented.pod.id} still has the run" in problem.what
        assert f"python -m runner attach {session.run.id}" in str(problem.remedy)
    if where == "collecting":
        assert str(caught.value.problems[0].remedy) == f"make room, then: python -m runner fetch {session.run.id}"
    if where in ("following", "memory", "collecting"):
        assert list(emulator.pods()) == [rented.pod.id] and entry.state == "RUNNING"
        rented.release()
    assert emulator.pods() == {}


@pytest.mark.parametrize("when", ["renting", "released"])
def test_a_disk_here_that_takes_nothing_hides_no_pod_that_may_still_run(
    emulator: Emulator, rent: Rent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    rented = rent()
    session = session_of(rented, tmp_path, monkeypatch)
    there = StillThereError(Problem("pod x MAY STILL BE RUNNING"))
    monkeypatch.setattr(RunDir, "write", raising(OSError(errno.EROFS, "Read-only file system")))
    monkeypatch.setattr(session, "collect", lambda part: None)
    with monkeypatch.context() as context:
        context.setattr(renting, "acquire", raising(there))
        context.setattr(Lease, "release", raising(there))
        ended = {"state": "failed", "exit_code": 1}
        ways = {
            "renting": lambda: executor.execute(session.run, session.spec),
            "released": lambda: executor.finish(session, ended, Display(Console())),
        }
        with pytest.raises(StillThereError) as caught:
            ways[when]()
    assert caught.value is there
    outcome = executor.finish(session, ended, Display(Console()))
    assert outcome.exit_code == 1 and emulator.pods() == {}


def test_what_earlier_pods_of_a_run_cost_counts(emulator: Emulator, tmp_path: Path) -> None:
    spec = rented_spec("where.max_usd=1")
    run = run_of(spec, tmp_path / "runs")
    rented = acquire(run, spec, PLAN, KEY, print)
    rented.release()
    Ledger().set(rented.name, created=time.time() - 3600 * 1.3)
    assert spent(Ledger(), run.id) == pytest.approx(0.97, abs=0.03)
    with pytest.raises(TooDearError, match="are spent"):
        acquire(run, spec, PLAN, KEY, print)
    assert emulator.pods() == {}


def test_a_pod_whose_launcher_dies_at_once_ends_before_the_cap(emulator: Emulator, tmp_path: Path) -> None:
    """Found by benchmarks/chaos_pods.py: twice `where.setup_minutes` are more than what is left for a later pod."""
    spec = rented_spec("where.max_usd=1")
    run = run_of(spec, tmp_path / "runs")

    def alone_seconds() -> int:
        rented = acquire(run, spec, PLAN, KEY, print, alone_minutes=40)
        command = shlex.split(emulator.pods()[rented.pod.id].config["args"])
        rented.release()
        Ledger().set(rented.name, created=time.time() - 3600 * 0.9)
        return int(command[command.index(run.id) + 1])

    assert alone_seconds() == 40 * 60
    left = 1 - spent(Ledger(), run.id)
    assert 0.1 < left < 0.4
    assert alone_seconds() == pytest.approx(left / 0.75 * 3600, rel=0.1)  # $0.74 an hour, and its disks


def test_ctrl_c_while_waiting_gives_the_pod_back(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(renting, "wait_until_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rent()
    assert emulator.pods() == {} and Ledger().entries() == []


# ── launchers that die ─────────────────────────────────────────────────────────────────────────

LAUNCHER = """
import os, signal, sys
from pathlib import Path
from runner.cloud import ledger, rent_pod as pod, readiness as waiting
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.runpod_provider import RunPod
from tests.support.rented import KEY, PLAN, rented_spec, run_of
die, folder = sys.argv[1], Path(sys.argv[2])
waiting.says_hello = lambda host, port: True
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if die == "CREATING":  # after the request, before its answer is written down
    create = Api.create_pod
    Api.create_pod = lambda self, wanted: (create(self, wanted), kill())
move = ledger.Ledger.move
def moved(self, name, state, why, **facts):
    move(self, name, state, why, **facts)
    if state == die and die != "CREATING":
        kill()
ledger.Ledger.move = moved
plan = ledger.Ledger.plan
ledger.Ledger.plan = lambda self, name, **facts: (plan(self, name, **facts), die == "PLANNED" and kill())
spec = rented_spec()
rented = pod.acquire(run_of(spec, folder), spec, PLAN, KEY, print)
rented.mark("RUNNING", "training")
print("ready", flush=True)
sys.stdin.read()
"""


def launcher(die: str, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", LAUNCHER, die, str(folder)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.mark.parametrize("die", ["PLANNED", "CREATING", "CREATE_UNKNOWN", "PROVISIONING", "SSH_READY"])
def test_after_a_launcher_was_killed_the_next_command_ends_its_pod(
    emulator: Emulator, tmp_path: Path, die: str
) -> None:
    if die == "CREATE_UNKNOWN":
        emulator.inject("lost", on="create")
    dead = launcher(die, tmp_path / "runs")
    assert dead.wait(60) == -signal.SIGKILL
    assert len(emulator.pods()) == (die != "PLANNED")
    notes = reconcile(RunPod(), Ledger())
    assert emulator.pods() == {} and Ledger().entries() == []
    assert ("is ended" in "".join(notes)) == (die != "PLANNED")


def test_a_living_launchers_pod_is_left_alone_and_an_armed_one_survives_it(emulator: Emulator, tmp_path: Path) -> None:
    alive = launcher("NEVER", tmp_path / "runs")
    assert alive.stdout is not None
    while "ready" not in alive.stdout.readline():
        pass
    assert reconcile(RunPod(), Ledger()) == [] and len(emulator.pods()) == 1
    alive.kill()
    alive.wait()
    assert reconcile(RunPod(), Ledger()) == [] and len(emulator.pods()) == 1  # its agent ends it in time
    (entry,) = Ledger().entries()
    Ledger().set(entry.name, deadline=time.time() - 3600)
    assert "past its deadline" in reconcile(RunPod(), Ledger())[0]
    assert [pod.status for pod in emulator.pods().values()] == ["EXITED"]


def test_a_pod_that_stopped_itself_with_its_result_is_not_ended(emulator: Emulator, tmp_path: Path) -> None:
    alive = launcher("NEVER", tmp_path / "runs")
    assert alive.stdout is not None
    while "ready" not in alive.stdout.readline():
        pass
    alive.kill()
    alive.wait()
    (entry,) = Ledger().entries()
    assert entry.pod_id is not None
    RunPod().stop(entry.pod_id)
    Ledger().set(entry.name, deadline=time.time() - 3600)
    assert f"runner fetch {entry.run_id}" in reconcile(RunPod(), Ledger())[0]
    assert reconcile(RunPod(), Ledger()) == [] and len(emulator.pods()) == 1
    assert Ledger().entries()[0].state == "STOPPED"


def test_another_accounts_pods_are_not_taken_for_gone(
    emulator: Emulator, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented = rent()
    rented.ledger.leave(rented.name)
    rented.ledger.set(rented.name, account="another", pod_id="elsewhere")
    (note,) = reconcile(RunPod(), Ledger())
    assert "another key" in note and len(Ledger().entries()) == 1


def test_many_pods_of_another_account_are_one_note(emulator: Emulator, rent: Rent) -> None:
    for rented in (rent(), rent()):
        rented.ledger.leave(rented.name)
        rented.ledger.set(rented.name, account="another", pod_id=f"elsewhere{rented.name[-4:]}")
    (note,) = reconcile(RunPod(), Ledger())
    assert note.startswith("2 pods (elsewhere") and len(Ledger().entries()) == 2


def test_pods_of_an_emulator_that_has_ended_are_forgotten(emulator: Emulator, rent: Rent) -> None:
    """Else every command, also with a real account, would list them as running."""
    rented = rent()
    rented.ledger.leave(rented.name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rented.ledger.set(rented.name, base=f"http://127.0.0.1:{free.getsockname()[1]}", deadline=1.0)
    assert reconcile(RunPod(), Ledger()) == [] and Ledger().entries() == []


@pytest.mark.slow
def test_a_create_that_came_to_nothing_is_forgotten_after_a_while(emulator: Emulator, rent: Rent) -> None:
    emulator.inject("lost", on="create", commit=False)
    rented = rent()
    rented.release()
    (entry,) = Ledger().entries()
    assert entry.state == "CREATE_UNKNOWN"
    Ledger().leave(entry.name)
    assert reconcile(RunPod(), Ledger()) == [] and len(Ledger().entries()) == 1
    Ledger().leave(entry.name)
    Ledger().set(entry.name, created=time.time() - UNKNOWN_S - 1)
    reconcile(RunPod(), Ledger())
    assert Ledger().entries() == []
