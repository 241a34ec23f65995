"""The agent's decisions, one at a time: how it asks, when it ends the pod and how, whom it serves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud.agent import agent
from runner.cloud.agent.agent import DeadManSwitch, ThisPod
from tests.cloud.test_agent_limits import Clock, clock, order, shm

__all__ = ["clock", "shm"]
SENT = 5_000_000.0


class Over(BaseException):
    """Out of a loop that ends with its pod."""


@pytest.fixture(autouse=True)
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the pod's variables, and none of RunPod's in this process."""
    monkeypatch.setattr(agent, "RP_ENVIRONMENT", tmp_path / "rp_environment")
    monkeypatch.setattr(agent, "KEYS", {"RUNPOD_API_KEY"})
    for name in ("RUNPOD_POD_ID", "RUNPOD_API_KEY", "RUNPOD_API_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "rp_environment"


# ── the pod and its API ────────────────────────────────────────────────────────────────────────


def test_the_pods_variables_are_those_for_shells_and_the_processs_own_win(
    variables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN", "process")
    assert agent.pod_variables() == dict(os.environ)  # there is no such file
    variables.write_text("export RUNPOD_POD_ID=\"pod1\"\nexport OWN='file'\nA = b=c \n", "utf-8")
    found = agent.pod_variables()
    variables.write_bytes(variables.read_bytes() + b"export ODD=\xff\n")  # which keeps no agent from ending its pod
    assert agent.pod_variables() == {**found, "ODD": "\ufffd"}
    assert (found["RUNPOD_POD_ID"], found["OWN"], found["A"]) == ("pod1", "process", "b=c")


def test_the_address_is_the_pods_then_the_orders_then_runpods(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ThisPod().base == "https://api.runpod.io"
    assert ThisPod({"api_base": "https://order/"}).base == "https://order"
    monkeypatch.setenv("RUNPOD_API_BASE_URL", "https://pod//")
    assert ThisPod({"api_base": "https://order/"}).base == "https://pod"
    assert ThisPod({"calls": "garbage"}).calls == agent.CALLS
    monkeypatch.setenv("OTHER_ID", "theirs")
    other = ThisPod({"calls": {"id": "OTHER_ID", "key": "OTHER_KEY"}})
    assert other.id == "theirs" and other.key == "" and other.calls["path"] == agent.CALLS["path"]
    assert {"RUNPOD_API_KEY", "OTHER_KEY"} == agent.KEYS  # which no training gets


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ThisPod:
    monkeypatch.setenv("RUNPOD_POD_ID", "pod1")
    monkeypatch.setenv("RUNPOD_API_KEY", "key")
    return ThisPod({"api_base": "https://api"})


def answering(own: ThisPod, monkeypatch: pytest.MonkeyPatch, *answers: int) -> list[Any]:
    """Have the API give these answers in turn, 0 for none; the requests, and the waits between them as numbers."""
    left, seen = list(answers), list[Any]()

    def open_(request: Any, timeout: float) -> Any:
        seen.append(request)
        assert 0 < timeout <= agent.REQUEST_SECONDS
        status = left.pop(0) if left else 599
        if status == 0:
            raise OSError("the connection broke")
        if status >= 400:
            raise urllib.error.HTTPError(request.full_url, status, "no", request.headers, None)
        return nullcontext(SimpleNamespace(status=status))

    def sleep(seconds: float) -> None:
        seen.append(seconds)
        if not left:
            raise Over

    own._open = open_
    monkeypatch.setattr(agent.time, "sleep", sleep)
    return seen


def test_a_request_has_the_pods_address_its_key_and_a_body_only_where_there_is_one(
    own: ThisPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = answering(own, monkeypatch, 204, 200, 403, 0)
    assert [own.ask("DELETE"), own.ask("POST", "/action", {"action": "stop"})] == [204, 200]
    assert [own.ask("GET"), own.ask("GET")] == [403, 0]
    assert [(r.get_method(), r.full_url, r.data) for r in seen[:2]] == [
        ("DELETE", "https://api/v2/pods/pod1", None),
        ("POST", "https://api/v2/pods/pod1/action", b'{"action": "stop"}'),
    ]
    expected = {"Authorization": "Bearer key", "Content-type": "application/json", "User-agent": "runner-agent"}
    assert dict(seen[0].header_items()) == expected


def test_an_answers_time_is_bounded_and_the_alarm_is_put_back(own: ThisPod) -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        with agent.time_limit(30):
            assert 29 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
        with pytest.raises(TimeoutError, match=r"within 0.01 s"), agent.time_limit(0.01):
            signal.sigtimedwait([], 5)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("answer", "may"), [(200, True), (204, True), (300, False), (400, True), (409, True), (401, False), (403, False)]
)
def test_a_key_may_end_the_pod_where_a_start_is_granted_or_a_conflict(
    own: ThisPod, monkeypatch: pytest.MonkeyPatch, answer: int, may: bool
) -> None:
    (asked,) = [answering(own, monkeypatch, answer, 409)]
    assert own.may_end() is may and len(asked) == 1
    assert (asked[0].get_method(), asked[0].data) == ("POST", b'{"action": "start"}')


def test_whether_the_key_may_end_the_pod_is_asked_five_times_and_never_without_a_key(
    own: ThisPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = answering(own, monkeypatch, 0, 429, 500, 503, 409)
    assert own.may_end() is True
    assert [one for one in seen if isinstance(one, float)] == [0.5, 1.0, 2.0, 4.0]
    seen = answering(own, monkeypatch, 500, 500, 500, 500, 500, 409)
    assert own.may_end() is False and len(seen) == 10
    own.key = ""
    assert own.may_end() is False and len(seen) == 10
    own.key, own.id = "key", ""
    assert own.may_end() is False and len(seen) == 10


def test_a_pod_is_asked_to_end_until_it_is_gone(own: ThisPod, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(own, "tell_watch", lambda due, how: told.append((due - clock.seconds, how)))
    seen = answering(own, monkeypatch, *[0, 204] * 6)
    with pytest.raises(Over):
        own.end("terminate")
    assert {r.get_method() for r in seen if not isinstance(r, float)} == {"DELETE"}
    waits = [one for one in seen if isinstance(one, float)]
    assert waits[:4] == [1.0, 1.5, 2.25, 3.375] and waits[-1] == 30
    assert set(told) == {(20 + 30 + 30, "terminate")}  # its request, a wait, and the start command's own patience


@pytest.mark.parametrize("answer", [400, 403, 404, 405, 409, 422])
def test_a_pod_that_cannot_be_stopped_is_terminated_at_once(
    own: ThisPod, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    told: list[str] = []
    monkeypatch.setattr(own, "tell_watch", lambda due, how: told.append(how))
    seen = answering(own, monkeypatch, 500, answer, answer)
    with pytest.raises(Over):
        own.end("stop")
    asked = [one if isinstance(one, float) else (one.get_method(), one.data) for one in seen]
    stop = ("POST", b'{"action": "stop"}')
    assert asked == [stop, 1.0, stop, ("DELETE", None), 1.5] and told == ["stop", "stop", "terminate"]


def test_the_start_command_is_told_over_a_socket_that_needs_no_disk(own: ThisPod) -> None:
    own.tell_watch(12.5, "stop")  # nobody listens: no error
    address = agent.watch_address("pod1", own.base)
    assert address == "\0runner-pod1 https://api" and len(agent.watch_address("p" * 90, "https://api.example")) == 100
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as watch:
        watch.bind(address)
        watch.settimeout(5)
        own.tell_watch(12.5, "stop")
        assert watch.recv(100) == b"12.5 stop"


def test_a_host_is_known_by_its_boot_and_its_seconds_count_on_while_it_sleeps() -> None:
    import time

    assert agent.boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert agent.now() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=1)
    assert agent.seconds(None) is None and agent.seconds(2) == 120


# ── when it ends the pod, and how ──────────────────────────────────────────────────────────────


class Switch(DeadManSwitch):
    """With a pod that only notes what it is told."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.ended: list[str] = []
        self.told: list[tuple[float, str]] = []
        self.begun = 0
        own: Any = SimpleNamespace(
            id="pod1", end=self.ended.append, tell_watch=lambda due, how: self.told.append((due, how))
        )
        agent.write_json(folder / "agent.json", order(**changes))
        super().__init__(folder, order(**changes), own)

    def begin(self) -> None:
        self.begun += 1

    def look(self, **status: Any) -> list[str]:
        """One look, where the run stands so; why and how the pod was ended."""
        agent.update_status(self.folder, **status)
        assert self._look() is None
        return [str(agent.read_status(self.folder)["message"]), *self.ended] if self.ended else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "run-1").mkdir(parents=True)
    return tmp_path / "runs" / "run-1"


UPLOADED = {"state": "done", "uploaded": True}


@pytest.mark.parametrize(
    ("changes", "status", "passed", "expected"),
    [
        ({"heartbeat_minutes": 10.0}, {"state": "training"}, 599, []),
        ({"heartbeat_minutes": 10.0}, {"state": "training"}, 601, ["no sign of the launcher for 10 minutes", "stop"]),
        ({"heartbeat_minutes": 10.0}, {"state": "done"}, 5, []),  # somebody comes for it
        ({"heartbeat_minutes": None}, {"state": "training"}, 601, []),
        ({"heartbeat_minutes": None}, {"state": "armed"}, 601, []),
        ({"heartbeat_minutes": None}, {"state": "done"}, 5, ["the run is over", "stop"]),
        ({"heartbeat_minutes": None}, {"state": "failed"}, 5, ["the run is over", "stop"]),
        ({"heartbeat_minutes": None}, UPLOADED, 5, ["the run is over", "terminate"]),
        ({"heartbeat_minutes": None, "boarding_minutes": 5.0}, {"state": "armed"}, 301,
         ["no sign of the launcher for 5 minutes", "terminate"]),
        ({"heartbeat_minutes": None, "uncollected": "wait"}, {"state": "done"}, 601, []),
        ({"heartbeat_minutes": 10.0, "uncollected": "wait"}, {"state": "done"}, 601, []),
        ({"heartbeat_minutes": 10.0, "uncollected": "wait"}, {"state": "training"}, 601,
         ["no sign of the launcher for 10 minutes", "terminate"]),
        ({"heartbeat_minutes": 10.0, "uncollected": "wait"}, {"state": "done"}, 7160,
         ["the deadline has come", "terminate"]),
        ({"heartbeat_minutes": None, "uncollected": "wait"}, UPLOADED, 5, ["the run is over", "terminate"]),
        ({"heartbeat_minutes": 10.0, "uncollected": "wait"}, UPLOADED, 601,
         ["no sign of the launcher for 10 minutes", "terminate"]),
    ],
)  # fmt: skip
def test_when_a_pod_is_ended_and_how(
    clock: Clock, folder: Path, changes: dict[str, Any], status: dict[str, Any], passed: float, expected: list[str]
) -> None:
    switch = Switch(folder, **{"deadline": SENT + 7200, "uncollected": "stop", **changes})
    clock.pass_by(passed)
    assert switch.look(message=None, **status) == expected
    waits = switch._is_over() and changes.get("uncollected") == "wait" and not status.get("uploaded")
    silence = None if waits else switch.limits._longest(switch._begun())
    assert switch._due() == min(8200.0, 1000.0 + (silence or 9999))  # as the start command is told


def test_a_collected_pod_is_ended_when_its_run_is_over(clock: Clock, folder: Path) -> None:
    switch = Switch(folder, heartbeat_minutes=10.0, uncollected="stop")
    (folder / "collected").touch()
    assert switch.look(state="training") == []
    switch.child = 7
    switch._worker_is_gone = lambda: False  # type: ignore[method-assign]  # for this test
    assert switch.look(state="done") == []  # its process still works
    switch.child = None
    assert switch.look(state="done") == ["everything was collected", "terminate"]
    status = agent.read_status(folder)
    assert (status["state"], status["ended_in"], status["how"]) == ("ending", "done", "terminate")


def test_a_worker_that_ends_without_a_word_has_failed(clock: Clock, folder: Path) -> None:
    switch = Switch(folder, heartbeat_minutes=10.0)
    for state, stands in (("training", "failed"), ("done", "done")):
        switch.child = 7
        switch._worker_is_gone = lambda: True  # type: ignore[method-assign]  # for this test
        assert switch.look(state=state, exit_code=0, message=None) == [] and switch.child is None
        assert agent.read_status(folder)["state"] == stands
        if stands == "failed":
            assert agent.read_status(folder)["exit_code"] == 1
            assert "ended without a message" in agent.read_status(folder)["message"]


@pytest.mark.parametrize("state", ["training", "uploading", "done", "failed", "ending"])
def test_of_a_run_that_has_begun_the_disk_is_kept(clock: Clock, folder: Path, state: str) -> None:
    assert Switch(folder, uncollected="stop").status == {}
    agent.update_status(folder, state=state)
    assert Switch(folder, uncollected="stop")._how() == "stop"
    assert Switch(folder, uncollected="terminate")._how() == "terminate"
    (folder / "collected").touch()
    assert Switch(folder, uncollected="terminate", keep=True)._how() == "stop"


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"keep": True, "uncollected": "terminate"}, "stop"), ({"uncollected": "stop"}, "stop"),
        ({"uncollected": "terminate"}, "terminate"), ({"uncollected": "wait"}, "terminate"),
    ],
)  # fmt: skip
def test_a_disk_that_does_not_answer_may_have_the_result(
    clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], how: str
) -> None:
    switch = Switch(folder, **changes)

    def broken() -> str:
        raise OSError("Input/output error")

    monkeypatch.setattr(switch, "_how", broken)
    switch._end("the deadline has come")
    assert switch.ended == [how]
    assert switch.told == [(clock.seconds + 45 + agent.WATCH_SECONDS, how)]


def test_what_a_training_has_saved_is_on_its_disk_before_the_pod_ends(
    clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = Switch(folder)
    monkeypatch.setattr(agent.os, "sync", lambda: switch.ended.append(agent.read_status(folder)["state"]))
    switch._end("the deadline has come")
    assert switch.ended == ["ending", "terminate"]


@pytest.mark.parametrize("pid", ["x", {"a": 1}, 2**70])
def test_a_status_with_garbage_for_a_process_keeps_no_pod_alive(clock: Clock, folder: Path, pid: Any) -> None:
    switch = Switch(folder)
    agent.update_status(folder, state="training", pid=pid)
    switch.child = 2**22 + 1
    switch._end_work(clock.seconds - 1)
    switch._end("the deadline has come")
    assert switch.ended == ["terminate"]


def test_the_start_command_waits_for_the_saving_of_a_training(clock: Clock, folder: Path) -> None:
    switch = Switch(folder, deadline=SENT + 4)
    switch._end("the deadline has come")
    assert switch.told[0][0] == clock.seconds + 1 + agent.WATCH_SECONDS  # a second at least


def test_a_training_is_told_and_then_killed(clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, int, int]] = []
    monkeypatch.setattr(agent.os, "kill", lambda pid, number: sent.append(("kill", pid, number)))
    monkeypatch.setattr(agent.os, "killpg", lambda pid, number: sent.append(("killpg", pid, number)))
    monkeypatch.setattr(agent.time, "sleep", clock.pass_by)
    switch = Switch(folder)
    agent.update_status(folder, state="training", pid=4711)
    switch._end_work(clock.seconds + 3)
    assert sent == []  # it has no process
    switch.child = 4700
    switch._worker_is_gone = lambda: False  # type: ignore[method-assign]  # for this test
    began = clock.seconds
    switch._end_work(began + 3)
    term, *kills = sent
    assert term == ("kill", 4711, signal.SIGTERM) and clock.seconds - began == pytest.approx(3, abs=0.2)
    assert kills == [("killpg", 4711, signal.SIGKILL), ("killpg", 4700, signal.SIGKILL)]
    switch._worker_is_gone = lambda: True  # type: ignore[method-assign]  # for this test
    began = clock.seconds
    switch._end_work(began + 3)
    assert clock.seconds == began  # it has saved: nothing is waited for


@pytest.mark.parametrize("pid", [None, "x", 0, 1, -1])
def test_no_group_is_killed_that_is_no_trainings(monkeypatch: pytest.MonkeyPatch, pid: Any) -> None:
    monkeypatch.setattr(agent.os, "killpg", lambda *_: pytest.fail("killed"))
    agent.kill_group(pid, signal.SIGKILL)


def test_a_worker_that_waits_in_vain_is_killed_and_fetched(clock: Clock, folder: Path) -> None:
    switch = Switch(folder)
    switch._leave_child()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as process:
        switch.child = process.pid
        assert switch._worker_is_gone() is False
        switch._leave_child()
        assert switch.child is None
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, 0)
        process.returncode = -9
    switch.child = process.pid
    assert switch._worker_is_gone() is True  # somebody has fetched it


# ── which order and which run it serves ────────────────────────────────────────────────────────


def test_a_fresh_order_begins_the_run_again_and_a_newer_one_only_moves_its_limits(clock: Clock, folder: Path) -> None:
    switch = Switch(folder)
    agent.update_status(folder, state="done", task="t1", exit_code=0, uploaded=True, starts=2, order="o1")
    (folder / "collected").touch()
    agent.write_json(folder / "agent.json", order(id="o2", deadline=SENT + 900))
    switch._renew()
    assert switch.begun == 0 and switch.limits.at == 1900 and (folder / "collected").exists()
    assert agent.read_status(folder) | {"time": 0} == {
        "state": "done", "task": "t1", "exit_code": 0, "uploaded": True, "starts": 2, "order": "o2", "time": 0,
    }  # fmt: skip
    for number, child in enumerate((7, None, None), 3):
        switch.child = child
        agent.write_json(folder / "agent.json", order(id=f"o{number}", fresh=True))
        switch._renew()
        assert switch.begun == max(0, number - 3) and (folder / "collected").exists() == (child is not None)
        assert agent.read_status(folder)["over" if number == 4 else "order"] == ("t1" if number == 4 else f"o{number}")
    assert agent.read_status(folder) | {"time": 0} == {**agent.ANEW, "over": None, "order": "o5", "time": 0}
    assert agent.ANEW["state"] == "armed" and {*agent.ANEW.values()} == {"armed", None, 0}


@pytest.mark.parametrize(
    ("status", "child", "handed"),
    [
        ("armed", 7, True), ("armed", None, True), ("training", 7, False), ("done", None, True), ("done", 7, False),
        ("ending", None, True), ("ending", 7, False), ("refused", None, True), ("uploading", None, False),
    ],
)  # fmt: skip
def test_the_pod_is_handed_on_where_nothing_is_at_work(
    clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch, status: str, child: int | None, handed: bool
) -> None:
    switch, killed = Switch(folder, heartbeat_minutes=10.0), list[int]()
    switch.child = child
    switch._worker_is_gone = lambda: False  # type: ignore[method-assign]  # for this test
    monkeypatch.setattr(agent, "kill_group", lambda pid, number: killed.append(pid))
    agent.update_status(folder, state=status)
    agent.write_json(folder / "successor.json", {"run_id": "run-2"})
    assert switch._look() is None  # which has no order yet
    (folder.parent / "run-2").mkdir()
    agent.write_json(folder.parent / "run-2" / "agent.json", {"run_id": "run-2", "pod_id": "pod1"})
    assert switch._look() == (folder.parent / "run-2" if handed else None) and switch.ended == []
    assert killed == ([7] if handed and child else [])


@pytest.mark.parametrize(
    ("named", "has", "pod"),
    [
        ("run-2", {"run_id": "run-3", "pod_id": "pod1"}, "pod1"), ("run-2", {"run_id": "run-2"}, "pod1"),
        ("run-2", {"run_id": "run-2", "pod_id": "pod0"}, "pod1"), ("", {"run_id": "", "pod_id": "pod1"}, "pod1"),
        ("run-2", {"run_id": "run-2", "pod_id": ""}, ""),
    ],
)  # fmt: skip
def test_a_successor_without_an_order_for_this_pod_is_none(
    folder: Path, named: str, has: dict[str, Any], pod: str
) -> None:
    (folder.parent / "run-2").mkdir()
    agent.write_json(folder / "successor.json", {"run_id": named})
    agent.write_json(folder.parent / named / "agent.json", has)
    assert agent.successor(folder, pod) is None


def test_it_looks_twice_a_second_tells_the_start_command_and_ends_what_it_cannot_read(
    clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch, slept, reasons = Switch(folder, heartbeat_minutes=None), list[float](), list[str]()
    looks: list[Callable[[], Any]] = [lambda: 1 / 0, lambda: None, lambda: 1 / 0, lambda: folder]
    before = signal.getsignal(signal.SIGTERM)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.pass_by(400 if len(slept) == 2 else 0)

    monkeypatch.setattr(agent.time, "sleep", sleep)
    monkeypatch.setattr(switch, "_look", lambda: looks.pop(0)())
    monkeypatch.setattr(switch, "_end", reasons.append)
    passed: list[int] = []
    monkeypatch.setattr(switch, "_pass_on", lambda: passed.append(1))
    switch.limits.at = clock.seconds + 300
    try:
        assert switch.serve() == folder
        signal.raise_signal(signal.SIGTERM)  # as the pod's end does: the training is told
        assert passed == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert slept == [0.5] * 3 and reasons == ["the deadline has come"]
    assert switch.told == [(1300 + agent.WATCH_SECONDS, "terminate")] * 3
