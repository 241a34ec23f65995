"""A clock that is wrong, or is set, ends no healthy pod: RunPod's time and elapsed seconds decide."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud import clock, remote_run
from runner.cloud.lease import Lease
from runner.cloud.ledger import Ledger
from runner.cloud.reconcile import UNKNOWN_S, reconcile
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.runpod_provider import RunPod
from tests.cli.test_pods_verbs import elsewhere
from tests.support.emulated import Emulator
from tests.support.front import runner
from tests.support.processes import until
from tests.support.rented import rent

DAY = 86_400.0


@pytest.fixture(autouse=True)
def ready(state: Path, here: Path, hello: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_BEGAN", clock._BEGAN)


def another_process(ahead: float) -> None:
    """Of a machine whose clock is so far ahead."""
    clock._BEGAN = time.time() - clock._elapsed() + ahead


def left_alone(tmp_path: Path, emulator: Emulator) -> Lease:
    """A pod that trains, whose launcher is gone."""
    rented = rent(tmp_path, "where.deadline_hours=2")
    rented.mark("RUNNING", "training")
    rented.ledger.leave(rented.name)
    return rented


@pytest.mark.slow
@pytest.mark.parametrize("then", [-DAY, 0.0, DAY], ids=["then a day behind", "then right", "then a day ahead"])
@pytest.mark.parametrize("now", [-DAY, 0.0, DAY], ids=["now a day behind", "now right", "now a day ahead"])
def test_a_listing_ends_a_pod_by_runpods_clock_alone(
    emulator: Emulator, tmp_path: Path, then: float, now: float
) -> None:
    another_process(then)
    rented = left_alone(tmp_path, emulator)
    another_process(now)
    for words in (("pods",), ("pods", "reap", "--yes")):
        assert runner(*words).exit_code == 0
        assert list(emulator.pods()) == [rented.pod.id]
    emulator.clock.skew_s = 2 * 3600 + 400  # two hours and some minutes later, at RunPod
    said = runner("pods")
    assert said.exit_code == 0 and f"pod {rented.pod.id} of run {rented.run_id} was past its deadline" in said.output
    assert [pod.status for pod in emulator.pods().values()] == ["EXITED"]  # its own disk may have the only result


def test_without_runpods_time_nothing_is_ended(
    emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented = left_alone(tmp_path, emulator)
    another_process(DAY)
    monkeypatch.setattr(Api, "time", lambda self: None)
    assert reconcile(RunPod(), Ledger()) == [] and list(emulator.pods()) == [rented.pod.id]
    assert runner("pods", "reap", "--yes").exit_code == 0
    assert list(emulator.pods()) == [rented.pod.id]


def test_reap_names_a_stopped_pod_which_costs_its_disk(emulator: Emulator, tmp_path: Path) -> None:
    rented = left_alone(tmp_path, emulator)
    RunPod().stop(rented.pod.id)
    runner("pods")  # the ledger hears of it
    done = runner("pods", "reap", "--yes", "--json")
    assert json.loads(done.stdout) == {"ended": [], "stopped": [rented.pod.id]}
    assert f"python -m runner fetch {rented.run_id} downloads the run" in done.stderr
    assert f"python -m runner pods terminate {rented.pod.id} ends the pod" in done.stderr
    assert json.loads(runner("pods", "reap", "--all", "--yes", "--json").stdout)["ended"] == [rented.pod.id]


@pytest.mark.parametrize("ahead", [-DAY, DAY])
def test_a_pod_of_another_machine_whose_clock_is_wrong(emulator: Emulator, ahead: float) -> None:
    then = time.time() + ahead
    healthy = elsewhere("runner-a-0001", RUNNER_RENTED=str(then), RUNNER_DEADLINE=str(then + 3600))
    late = elsewhere("runner-b-0001", RUNNER_RENTED=str(then), RUNNER_DEADLINE=str(then - 60))
    assert json.loads(runner("pods", "reap", "--yes", "--json").stdout)["ended"] == [late]
    assert list(emulator.pods()) == [healthy]


def test_a_pod_that_another_machine_has_kept_and_started_again_is_not_past_its_first_deadline(
    emulator: Emulator,
) -> None:
    then = time.time()
    pod = elsewhere("runner-a-0001", RUNNER_RENTED=str(then), RUNNER_DEADLINE=str(then + 3600))
    RunPod().stop(pod)
    emulator.clock.skew_s = 7200
    RunPod().start(pod)
    until(lambda: emulator.pods()[pod].status == "RUNNING")
    assert json.loads(runner("pods", "reap", "--yes", "--json").stdout)["ended"] == []
    emulator.clock.skew_s = 7200 + 3700
    assert json.loads(runner("pods", "reap", "--yes", "--json").stdout)["ended"] == [pod]


def test_a_lost_create_is_not_forgotten_because_the_clock_was_set(emulator: Emulator, tmp_path: Path) -> None:
    rented = left_alone(tmp_path, emulator)
    rented.ledger.move(rented.name, "CREATE_UNKNOWN", "lost", pod_id=None)
    emulator.inject("vanish", pod=rented.pod.id)
    while emulator.pods():
        time.sleep(0.02)
    another_process(DAY)
    reconcile(RunPod(), Ledger())
    assert [entry.state for entry in Ledger().entries()] == ["CREATE_UNKNOWN"]
    emulator.clock.skew_s = UNKNOWN_S + 60
    reconcile(RunPod(), Ledger())
    assert Ledger().entries() == []


def test_a_clock_that_is_set_while_a_run_goes_on_moves_no_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    before, wall = clock.now(), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + DAY)
    assert abs(clock.now() - before) < 60


@pytest.mark.parametrize("ahead", [-DAY, 0.0, DAY])
@pytest.mark.parametrize("over", [True, False])
def test_who_comes_back_with_another_clock_moves_no_deadline(ahead: float, over: bool) -> None:
    """The order was sent ten minutes ago, by the pod's clock: two hours, of which 110 minutes are left."""
    another_process(ahead)
    old = {"id": "o1", "sent": 5e8, "deadline": 5e8 + 7200, "started": 5e8 - 60, "budget_usd": 3.0, "fresh": True}
    said = json.dumps(old) + "\n1700000000\n1700000600\n"
    placed: list[dict[str, Any]] = []
    at: Any = SimpleNamespace(
        connection=SimpleNamespace(run=lambda command: said), folder="/workspace/runs/a",
        place=lambda name, content: placed.append(content), start_agent=lambda: {},
    )  # fmt: skip
    known, told = clock.now() + 6600, dict[str, Any]()
    ledger = SimpleNamespace(set=lambda name, **fields: told.update(fields))
    rented = SimpleNamespace(deadline=known, ledger=ledger, name="runner-a-0001")
    session: Any = SimpleNamespace(at=at, over=over, rented=rented)
    remote_run._listen(session, 10.0)
    (new,) = placed
    assert told == {"heartbeat_s": 600.0, "deadline": known}
    assert new["deadline"] - new["sent"] == pytest.approx(6600, abs=1)
    assert new["sent"] - new["started"] == pytest.approx(660, abs=1)
    assert new["id"] != "o1" and new["fresh"] is False and new["budget_usd"] == (None if over else 3.0)


@pytest.mark.parametrize("header", [None, "", "yesterday", "Mon, 99 Nov 2026 00:00:00 GMT", "\x00"])
def test_a_date_that_is_none(header: str | None) -> None:
    assert clock.parse_date(header) is None
    assert clock.parse_date("Sun, 06 Nov 1994 08:49:37 GMT") == 784111777.0
