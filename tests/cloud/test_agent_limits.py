"""The agent's limits, to the second: which one strikes, when the training is told, what a restart leaves of them."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud.agent import agent, tail
from runner.cloud.agent.agent import DeadManSwitch, Limits


class Clock:
    """This host's seconds, and the wall's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.wall, self.boot = 1000.0, time.time(), "boot-a"
        monkeypatch.setattr(agent, "now", lambda: self.seconds)
        monkeypatch.setattr(agent, "boot_id", lambda: self.boot)
        monkeypatch.setattr(agent.time, "time", lambda: self.wall)

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds
        self.wall += seconds


@pytest.fixture(autouse=True)
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of the test's own."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(agent, "SHM", tmp_path / "shm")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def order(**changes: Any) -> dict[str, Any]:
    sent = 5_000_000.0  # the launcher's clock is its own
    own = {"id": "o1", "run_id": "run-1", "pod_id": "pod1", "sent": sent, "started": sent, "deadline": sent + 600}
    return {**own, "budget_usd": None, "usd_per_hour": 1.0, **changes}


def limits(folder: Path, again: bool = False, **changes: Any) -> Limits:
    return Limits(folder, order(**changes), folder / "beat", again)


def test_the_training_is_told_before_the_deadline_and_the_pod_ends_at_it(clock: Clock, tmp_path: Path) -> None:
    found = limits(tmp_path)
    assert found.due() == pytest.approx(1600) and found.grace == 45
    clock.pass_by(554)
    assert found.over() is None
    clock.pass_by(2)
    assert found.over() == "the deadline has come"
    short = limits(tmp_path, id="o2", deadline=5_000_020.0)
    assert short.grace == 2  # a tenth


def test_the_deadline_counts_from_when_the_order_was_sent(clock: Clock, tmp_path: Path) -> None:
    """By the launcher's clock: minutes of renting and sending have passed since the pod began."""
    assert limits(tmp_path, started=5_000_000.0 - 300).due() == pytest.approx(1600)


def test_the_budget_counts_from_the_pods_start_and_not_from_the_order(clock: Clock, tmp_path: Path) -> None:
    found = limits(tmp_path, started=5_000_000.0 - 300, budget_usd=0.1)
    assert found.due() == pytest.approx(1000 + 360 - 300)
    clock.pass_by(60)
    assert found.over() == "the budget is spent"


def test_of_a_silent_launcher_and_a_deadline_the_earlier_one_is_due(clock: Clock, tmp_path: Path) -> None:
    found = limits(tmp_path, heartbeat_minutes=1.0)
    assert found.due() == pytest.approx(1060) and found.due(silence=False) == pytest.approx(1600)
    clock.pass_by(50)
    (tmp_path / "beat").touch()
    assert found.due() == pytest.approx(1110) and found.over() is None
    clock.pass_by(61)
    assert found.over() == "no sign of the launcher for 1 minutes" and found.over(silence=False) is None


def test_a_run_that_is_left_to_its_pod_is_silent_only_until_it_begins(clock: Clock, tmp_path: Path) -> None:
    left = limits(tmp_path, boarding_minutes=1.0)
    assert left.due(begun=False) == pytest.approx(1060) and left.due() == pytest.approx(1600)
    followed = limits(tmp_path, id="o2", boarding_minutes=1.0, heartbeat_minutes=2.0)
    assert followed.due(begun=False) == pytest.approx(1120)
    clock.pass_by(61)
    assert left.over(begun=False) == "no sign of the launcher for 1 minutes" and left.over() is None


def test_a_restart_on_the_same_host_moves_nothing_and_on_another_one_the_walls_clock_counts(
    clock: Clock, tmp_path: Path
) -> None:
    limits(tmp_path)
    clock.seconds += 100  # the wall's clock was set back meanwhile: it does not matter here
    assert limits(tmp_path).due() == pytest.approx(1600)
    clock.boot, clock.seconds = "boot-b", 7.0
    clock.wall += 250
    assert limits(tmp_path).due() == pytest.approx(7 + 600 - 100 - 250, abs=1)


def test_a_pod_that_was_ended_and_is_started_again_has_ten_minutes_and_not_its_old_deadline(
    clock: Clock, tmp_path: Path
) -> None:
    limits(tmp_path, deadline=5_007_200.0)
    assert limits(tmp_path, again=True, deadline=5_007_200.0).due() == pytest.approx(1600)
    clock.pass_by(10_000)
    assert limits(tmp_path, again=True, deadline=5_007_200.0).due() == pytest.approx(11_600)
    clock.pass_by(601)
    assert limits(tmp_path, deadline=5_007_200.0).over() == "the deadline has come"
    soon = limits(tmp_path, again=True, id="o2", deadline=5_000_100.0)
    assert soon.due() == pytest.approx(clock.seconds + 100)  # ten minutes at most


def test_a_restart_does_not_begin_anew_where_no_disk_took_the_deadline(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_text("{}")
    os.utime(tmp_path / "agent.json", (clock.wall, clock.wall))
    (tmp_path / "armed.json").mkdir()  # cannot be written
    assert limits(tmp_path).due() == pytest.approx(1600)
    clock.pass_by(400)
    assert limits(tmp_path).due() == pytest.approx(1600)


@pytest.mark.parametrize("armed", ["[]", '{"pod_id": "pod1", "order": "o1", "boot_id": "boot-a", "at_boot": "x"}', ""])
def test_garbage_in_the_file_of_the_deadline_is_no_deadline(clock: Clock, tmp_path: Path, armed: str) -> None:
    (tmp_path / "armed.json").write_text(armed)
    assert limits(tmp_path).due() == pytest.approx(1600)


@pytest.mark.parametrize("deadline", [float("nan"), float("inf")])
def test_an_order_without_an_end_is_none(clock: Clock, tmp_path: Path, deadline: float) -> None:
    with pytest.raises(ValueError, match="no end"):
        limits(tmp_path, deadline=deadline)


# ── the switch ─────────────────────────────────────────────────────────────────────────────────


def switch(folder: Path, **changes: Any) -> DeadManSwitch:
    own: Any = SimpleNamespace(id="pod1")
    return DeadManSwitch(folder, order(**changes), own)


@pytest.mark.parametrize(
    "newer",
    [
        {"id": "o2", "pod_id": "pod2", "deadline": 5_009_999.0},
        {"id": "o2", "sent": "garbage"},
        {"id": "o2", "deadline": float("nan")},
        {"deadline": 5_009_999.0},
    ],
)
def test_an_order_that_is_not_a_newer_one_for_this_pod_changes_nothing(
    clock: Clock, tmp_path: Path, newer: dict[str, Any]
) -> None:
    found = switch(tmp_path)
    agent.write_json(tmp_path / "agent.json", order(**newer))
    for _ in range(2):
        found._renew()
    assert found.limits.due() == pytest.approx(1600) and found.order["id"] == "o1"
    agent.write_json(tmp_path / "agent.json", order(id="o3", deadline=5_000_900.0))
    found._renew()
    assert found.limits.due() == pytest.approx(1900)


@pytest.mark.parametrize(
    ("changes", "status", "how"),
    [
        ({"uncollected": "stop"}, {"state": "training"}, "stop"),
        ({"uncollected": "stop"}, {"state": "armed"}, "terminate"),  # nothing was begun
        ({"uncollected": "stop"}, {"state": "done", "uploaded": True}, "terminate"),
        ({"uncollected": "terminate"}, {"state": "training"}, "terminate"),
        ({"keep": True}, {"state": "armed"}, "stop"),
    ],
)
def test_how_a_pod_is_ended(
    clock: Clock, tmp_path: Path, changes: dict[str, Any], status: dict[str, Any], how: str
) -> None:
    found = switch(tmp_path, **changes)
    agent.update_status(tmp_path, **status)
    assert found._how() == how
    (tmp_path / "agent-status.json").write_text("gar")  # cut short: what was read last still counts
    assert found._how() == how


def test_what_was_collected_is_kept_by_no_disk(clock: Clock, tmp_path: Path) -> None:
    found = switch(tmp_path, uncollected="stop")
    agent.update_status(tmp_path, state="done")
    assert found._how() == "stop"
    (tmp_path / "collected").touch()
    assert found._how() == "terminate"


def test_a_status_that_no_disk_takes_is_kept_in_memory_and_an_old_file_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.update_status(tmp_path, state="armed", pid=7)
    file = tmp_path / "agent-status.json"
    before = file.read_text()
    file.unlink()
    file.mkdir()
    agent.update_status(tmp_path, state="failed")
    assert agent.read_status(tmp_path)["state"] == "failed"
    kept = agent.read_json(agent.unwritten(tmp_path))
    assert agent.UNWRITTEN == {} and kept["state"] == "failed"  # for the agent's other process
    monkeypatch.setattr(tail, "SHM", agent.SHM)
    told = [line for line in tail.Tail(tmp_path, {}).news() if line.get("whole") == "agent-status.json"]
    assert json.loads(base64.b64decode(told[-1]["data"]))["state"] == "failed"  # and for the launcher
    file.rmdir()
    file.write_text(before)
    assert agent.read_status(tmp_path)["state"] == "failed"
    agent.update_status(tmp_path, exit_code=1)
    assert (
        agent.read_json(file)["state"] == "failed" and agent.UNWRITTEN == {} and not agent.unwritten(tmp_path).exists()
    )
