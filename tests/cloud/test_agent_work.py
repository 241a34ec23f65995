"""The agent's work, one step at a time: what it writes, which task it begins, in what environment, and how it arms."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud.agent import agent
from runner.cloud.agent.agent import DeadManSwitch
from tests.cloud.test_agent_limits import Clock, clock, order, shm
from tests.cloud.test_agent_switch import Over, folder, variables

__all__ = ["clock", "folder", "shm", "variables"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""A lock is held until its process ends: no file of one is closed."""


# ── files ──────────────────────────────────────────────────────────────────────────────────────


def test_a_line_of_the_log_has_its_time_and_a_log_that_cannot_be_written_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent.time, "gmtime", lambda: agent.time.struct_time((2026, 11, 30, 9, 8, 7, 0, 334, 0)))
    agent.log("hello")
    assert capsys.readouterr() == ("", "2026-11-30 09:08:07 hello\n")
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: 1 / 0))
    agent.log("hello")


@pytest.mark.parametrize("text", ["[1]", '"x"', "{", "[" * 100_000])
def test_what_is_no_json_object_is_an_empty_one(tmp_path: Path, text: str) -> None:
    assert agent.read_json(tmp_path / "none.json") == {}
    (tmp_path / "some.json").write_text(text)
    assert agent.read_json(tmp_path / "some.json") == {}


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "file.json", list[Any]()
    file.write_text("old", "utf-8")
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        (temporary,) = tmp_path.glob(".file.json.*.tmp")
        seen.append((file.read_text(), json.loads(temporary.read_text("utf-8"))))
        fsync(descriptor)

    monkeypatch.setattr(agent.os, "fsync", synced)
    agent.write_json(file, {"a": "ä"})
    assert seen == [("old", {"a": "ä"})] and agent.read_json(file) == {"a": "ä"}
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["file.json"]


def test_a_full_disk_gets_the_new_content_over_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    agent.write_json(file, {"much": "x" * 1000})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(agent.os, "fsync", full)
    agent.write_json(file, {"a": 1})
    assert agent.read_json(file) == {"a": 1} and not [*tmp_path.glob(".file*")]
    with pytest.raises(FileNotFoundError):
        agent.write_json(tmp_path / "new.json", {"a": 1})  # which has no old content


def test_the_status_that_was_written_last_is_read_wherever_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    agent.write_json(run / "agent-status.json", {"state": "training", "pid": 7, "time": 10.0})
    for when, stands in ((9.0, "training"), (10.0, "failed"), (11.0, "failed")):
        agent.write_json(agent.unwritten(run), {"state": "failed", "time": when})
        found = agent.read_status(run)
        assert (found["state"], found["pid"]) == (stands, 7)


def test_what_neither_disk_nor_memory_takes_is_known_and_written_with_what_follows(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write = agent.write_json
    with monkeypatch.context() as context:
        context.setattr(agent, "write_json", lambda file, content: _raise(OSError(errno.EIO, "Input/output error")))
        agent.update_status(run, state="failed")
    assert agent.read_json(run / "agent-status.json") == {} and agent.read_status(run)["state"] == "failed"
    assert agent.write_json is write
    agent.update_status(run, exit_code=1)
    expected = {"state": "failed", "exit_code": 1, "time": clock.wall}
    assert agent.read_json(run / "agent-status.json") == expected and run not in agent.UNWRITTEN


def _raise(error: BaseException) -> None:
    raise error


def test_two_writers_of_a_status_take_turns_and_one_that_hangs_is_not_waited_for(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = clock.seconds
    monkeypatch.setattr(agent.time, "sleep", clock.pass_by)
    file = tmp_path / "lock"
    with file.open("w") as other, file.open("w") as own:
        fcntl.flock(other, fcntl.LOCK_EX)
        agent._wait_for(own)
        assert 2 <= clock.seconds - began < 2.1
        fcntl.flock(other, fcntl.LOCK_UN)
        agent._wait_for(own)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert clock.seconds - began < 2.1
    taken: list[str] = []
    monkeypatch.setattr(agent, "_wait_for", lambda stream: taken.append(stream.name))
    agent.update_status(tmp_path, state="armed")
    assert taken == [str(agent.SHM / f"runner-{tmp_path.name}.status")]


def test_a_launchers_key_is_let_in_once_and_on_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: Path
) -> None:
    file = tmp_path / "ssh" / "keys"
    monkeypatch.setenv("RUNNER_AUTHORIZED_KEYS", str(file))
    agent.authorize_key(None)
    assert not file.parent.exists()
    agent.authorize_key("ssh-ed25519 A")
    assert file.read_text() == "ssh-ed25519 A\n" and file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.write_text("ssh-ed25519 B")  # somebody's, without an end of its line
    for _ in range(2):
        agent.authorize_key("ssh-ed25519 A")
    assert file.read_text() == "ssh-ed25519 B\nssh-ed25519 A\n"
    file.write_bytes(b"ssh-rsa C caf\xe9\n")  # a comment that is no UTF-8
    agent.authorize_key("ssh-ed25519 A")
    assert file.read_bytes() == b"ssh-rsa C caf\xe9\nssh-ed25519 A\n"
    monkeypatch.delenv("RUNNER_AUTHORIZED_KEYS")
    monkeypatch.setattr(agent.Path, "home", lambda: tmp_path)
    agent.authorize_key("ssh-ed25519 A")
    monkeypatch.setenv("RUNNER_AUTHORIZED_KEYS", "/dev/null/keys")  # a disk that takes nothing
    agent.authorize_key("ssh-ed25519 A")
    assert (tmp_path / ".ssh" / "authorized_keys").read_text() == "ssh-ed25519 A\n"


# ── the work ───────────────────────────────────────────────────────────────────────────────────

TASK = {"id": "t1", "pod_id": "pod1", "python": "py", "command": ["train"]}


class Work:
    """A task's steps, noted; what they return is the test's."""

    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.states, self.commands = run, list[dict[str, Any]](), list[Any]()
        self.python: str | None = "py"
        self.codes = {"worker.log": 0, "upload.log": 0}
        update = agent.update_status

        def noted(at: Path, **facts: Any) -> None:
            assert at == run
            self.states.append(facts)
            update(at, **facts)

        monkeypatch.setattr(agent, "update_status", noted)
        monkeypatch.setattr(agent, "install", lambda at, task: self.python)
        monkeypatch.setattr(agent, "await_secrets", lambda at, task: self.commands.append("secrets"))
        monkeypatch.setattr(agent, "run_command", self._command)
        monkeypatch.setattr(agent, "sample_gpus", lambda at, over: None)

    def _command(self, at: Path, task: dict[str, Any], command: list[str], name: str, state: str | None = None) -> int:
        self.commands.append((command, name, state))
        return self.codes[name]

    def does(self, task: dict[str, Any] = TASK, /, **status: Any) -> dict[str, Any]:
        """Give it the task where the run stands so; where it stands then."""
        agent.write_json(self.run / "agent-status.json", {"pod_id": "pod1", "state": "armed", **status})
        agent.write_json(self.run / "work.json", task)
        self.states.clear(), self.commands.clear()
        agent.run_task(self.run)
        return agent.read_status(self.run)


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(folder, monkeypatch)


def test_a_task_is_installed_trained_and_uploaded(work: Work) -> None:
    found = work.does({**TASK, "after": ["-m", "up"]})
    assert work.states[0] == {"state": "installing", "task": "t1", "starts": 1, "exit_code": None, "message": None}
    assert work.commands == [
        "secrets", (["py", "train"], "worker.log", "training"), (["py", "-m", "up"], "upload.log", None),
    ]  # fmt: skip
    assert work.states[1:] == [
        {"state": "uploading", "pid": None}, {"uploaded": True, "message": None},
        {"state": "done", "exit_code": 0, "pid": None},
    ]  # fmt: skip
    assert found["state"] == "done" and found["uploaded"] is True


def test_a_training_that_fails_is_not_uploaded_and_a_failed_upload_fails_no_training(work: Work) -> None:
    work.codes["worker.log"] = 3
    found = work.does({**TASK, "after": ["-m", "up"]})
    assert (found["state"], found["exit_code"]) == ("failed", 3) and len(work.commands) == 2
    work.codes |= {"worker.log": 0, "upload.log": 1}
    found = work.does({**TASK, "after": ["-m", "up"]})
    assert (found["state"], found["exit_code"], found["uploaded"]) == ("done", 0, False)
    assert "logs/upload.log" in found["message"]
    assert "uploaded" not in work.does()  # nothing was to be


def test_what_cannot_be_installed_is_not_trained(work: Work) -> None:
    work.python = None
    found = work.does()
    assert (found["state"], found["exit_code"]) == ("failed", 1) and "logs/install.log" in found["message"]
    assert work.commands == ["secrets"]


@pytest.mark.parametrize(
    ("status", "starts", "state"),
    [
        ({}, 1, "done"),
        ({"task": "t1", "starts": 1, "state": "training"}, 2, "done"),
        ({"task": "t1", "starts": 3, "state": "training"}, 4, "done"),
        ({"task": "t1", "starts": 4, "state": "training"}, None, "failed"),
        ({"task": "t0", "starts": 4, "state": "training"}, 1, "done"),  # another task
        ({"task": "t0", "starts": 4, "state": "done"}, 1, "done"),
        ({"task": "t1", "starts": 1, "state": "done"}, None, "done"),  # it was over
        ({"task": "t1", "starts": 1, "state": "failed"}, None, "failed"),
    ],
)
def test_how_often_a_task_is_begun(work: Work, status: dict[str, Any], starts: int | None, state: str) -> None:
    found = work.does(**status)
    assert [one["starts"] for one in work.states if "starts" in one] == ([starts] if starts else [])
    assert found["state"] == state and bool(work.commands) == bool(starts)
    if status.get("starts") == 4 and status["task"] == "t1":
        assert found["exit_code"] == 1 and "restarted 3 times" in found["message"]


def test_only_a_new_task_of_this_pod_is_begun_and_by_the_agents_own_process(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[dict[str, Any]] = [{**TASK, "id": "over"}, {**TASK, "id": None}, TASK]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        agent.write_json(work.run / "work.json", tasks.pop(0))

    monkeypatch.setattr(agent.time, "sleep", sleep)
    found = work.does({**TASK, "pod_id": "pod0"}, over="over")
    assert found["task"] == "t1" and slept == [0.5] * 3
    parents = [1, 1, 2]
    monkeypatch.setattr(agent.os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(agent.time, "sleep", lambda _: None)
    assert work.does({**TASK, "pod_id": "pod0"})["state"] == "armed" and parents == []  # another one is its parent


def test_secrets_are_waited_for_half_a_minute(clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = clock.seconds
    monkeypatch.setattr(agent.time, "sleep", clock.pass_by)
    agent.await_secrets(folder, {})
    assert clock.seconds == began
    agent.await_secrets(folder, {"secrets": True})
    assert clock.seconds == began + 30
    (agent.SHM / f"runner-{folder.name}.env").touch()
    agent.await_secrets(folder, {"secrets": True})
    assert clock.seconds == began + 30


def test_the_python_that_trains_is_the_images_or_the_installed_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(agent, "run_command", lambda *words: asked.append(words) or code)
    assert agent.install(folder, TASK) == "py" and asked == []
    task, code = {**TASK, "install": ["install.py"]}, 0
    assert agent.install(folder, task) is None
    agent.write_json(folder / "install.json", {"python": "/venv/python"})
    assert agent.install(folder, task) == "/venv/python"
    assert asked[-1] == (folder, task, [sys.executable, "install.py"], "install.log")
    code = 1
    assert agent.install(folder, task) is None


@pytest.fixture
def logs(folder: Path) -> Path:
    (folder / "logs").mkdir()
    return folder / "logs"


SAYS = """
import os, sys
print(os.getpid() == os.getpgrp() == os.getsid(0), os.environ.get("SECRET"), os.getcwd(), sys.stdin.read() == "")
print("error", file=sys.stderr)
"""


def test_a_command_runs_in_its_folder_and_session_and_its_words_are_added_to_a_log(
    folder: Path, logs: Path, tmp_path: Path
) -> None:
    (agent.SHM / f"runner-{folder.name}.env").write_text('{"SECRET": "s"}')
    for name, secret in (("worker.log", "s"), ("install.log", "None")):
        (logs / name).write_text("before\n")
        task = {"cwd": str(tmp_path)}
        assert agent.run_command(folder, task, [sys.executable, "-c", SAYS], name, state="training") == 0
        lines = (logs / name).read_text().splitlines()
        assert sorted(lines) == sorted(["before", f"True {secret} {tmp_path} True", "error"])
    status = agent.read_status(folder)
    assert status["state"] == "training" and status["pid"] > 1
    assert agent.run_command(folder, {}, ["sh", "-c", "exit 3"], "worker.log") == 3
    assert agent.run_command(folder, {}, ["sh", "-c", "kill -9 $$"], "worker.log") == 128 + 9
    assert agent.read_status(folder)["state"] == "training"  # which these did not say


def test_a_training_has_its_gpus_watched_until_it_ends(
    folder: Path, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[tuple[Path, threading.Event]] = []
    began = threading.Event()
    monkeypatch.setattr(agent, "sample_gpus", lambda at, over: (watched.append((at, over)), began.set(), over.wait(9)))
    assert agent.train(folder, {"command": ["-c", "raise SystemExit(4)"]}, sys.executable) == 4
    assert began.wait(5) and watched[0][0] == folder and watched[0][1].is_set()
    assert agent.read_status(folder)["state"] == "training" and (logs / "worker.log").exists()


def test_a_key_that_ends_the_pod_is_no_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (agent.SHM / f"runner-{folder.name}.env").write_text('{"B": "secret", "C": "secret"}')
    monkeypatch.setenv("RUNPOD_API_KEY", "key")
    monkeypatch.setenv("A", "pod")
    task = {"env": {"A": "task", "B": "task", "RUNPOD_API_KEY": "key"}}
    found = agent.environment(folder, task)
    assert (found["A"], found["B"], found["C"]) == ("task", "secret", "secret") and "RUNPOD_API_KEY" not in found
    assert "RUNPOD_API_KEY" not in agent.environment(folder, {}) and agent.environment(folder, {})["A"] == "pod"
    told = agent.environment(folder, task, False)
    assert told["B"] == "task" and "C" not in told and "RUNPOD_API_KEY" not in told


def test_what_the_gpus_do_is_written_as_long_as_somebody_says_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "0, 50, 100, 200, 30.5, 60"\necho "1, 51"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    waits: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return len(waits) > 2

    agent.sample_gpus(folder, Event())
    first, second = (json.loads(line) for line in (folder / "gpu.jsonl").read_text("utf-8").splitlines())
    assert waits == [5.0] * 3 and first == second and first["time"] == clock.wall
    assert first["gpus"][0] == {
        "index": "0", "utilization.gpu": "50", "memory.used": "100", "memory.total": "200", "power.draw": "30.5",
        "temperature.gpu": "60",
    }  # fmt: skip
    assert first["gpus"][1] == {"index": "1", "utilization.gpu": "51"}
    fields = "index,utilization.gpu,memory.used,memory.total,power.draw,temperature.gpu"
    asked = Path(f"{program}.asked").read_text().strip()
    assert asked == f"--query-gpu={fields} --format=csv,noheader,nounits"
    for text in ("#!/bin/sh\nexit 9\n", None):
        program.write_text(text) if text else program.unlink()
        waits.clear()
        agent.sample_gpus(tmp_path, Event())
        assert len(waits) == 1 and not (tmp_path / "gpu.jsonl").exists()


# ── its own process ────────────────────────────────────────────────────────────────────────────


def test_the_work_is_a_process_that_holds_no_lock_and_may_be_killed_for_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    switch = DeadManSwitch(folder, order(), SimpleNamespace(id="pod1"))  # type: ignore[arg-type]  # all it reads
    switch.held = [(agent.SHM / "lock").open("w")]
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def says(at: Path) -> None:
        facts = {
            "group": os.getpgrp() == os.getpid(), "closed": switch.held[0].closed,
            "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            "oom": Path("/proc/self/oom_score_adj").read_text().strip(),
        }  # fmt: skip
        (at / "said").write_text(json.dumps(facts))
        raise ValueError("garbage")

    monkeypatch.setattr(agent, "run_task", says)
    try:
        switch.begin()
        assert switch.child is not None and os.waitpid(switch.child, 0)[1] == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads((folder / "said").read_text()) == {"group": True, "closed": True, "term": True, "oom": "0"}
    status = agent.read_status(folder)
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 1, "ValueError: garbage")
    assert not switch.held[0].closed
    monkeypatch.setattr(agent.os, "fork", lambda: _raise(OSError(errno.EAGAIN, "Resource temporarily unavailable")))
    agent.update_status(folder, message=None, state="armed", exit_code=None)
    switch.begin()
    status = agent.read_status(folder)
    assert (status["state"], status["exit_code"]) == ("failed", 1) and "Resource temporarily" in status["message"]


def test_one_agent_is_at_work_for_one_run_and_one_stands_by_for_a_run_that_was_handed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = list[Any](), list[Any]()
    assert agent.lock_run("run-1", first) and first[0].name == str(agent.SHM / "runner-run-1.lock")
    assert agent.lock_run("run-1", first) and len(first) == 1  # held already
    assert not agent.lock_run("run-1", second)
    asked: list[int] = []
    monkeypatch.setattr(agent.fcntl, "flock", lambda stream, how: asked.append(how))
    assert agent.lock_run("run-2", list[Any]()) and agent.lock_run("run-3", first)
    assert asked == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
    monkeypatch.setattr(agent, "SHM", Path("/nowhere"))
    assert agent.lock_run("run-4", [])  # without a lock rather than not at all


@pytest.mark.parametrize(
    ("status", "changes", "collected", "expected"),
    [
        ({"pod_id": "pod0", "state": "training"}, {}, False, {}),
        ({"state": "training"}, {}, False, {"state": "training"}),
        ({"state": "training"}, {"fresh": True}, True, {"state": "training"}),
        ({"state": "done", "order": "o0", "task": "t1"}, {"fresh": True}, True, {"over": "t1"}),
        ({"state": "ending", "order": "o0", "task": "t1"}, {"fresh": True}, False, {"over": "t1"}),
        ({"state": "done", "order": "o1"}, {"fresh": True}, False, {"state": "done", "order": "o1"}),
        ({"state": "done", "order": "o0"}, {}, False, {"state": "done", "order": "o0"}),
        ({"state": "done"}, {}, True, {"state": "ending", "ended_in": "done"}),
        ({"state": "ending", "ended_in": "failed"}, {}, True, {"state": "ending", "ended_in": "failed"}),
    ],
)  # fmt: skip
def test_what_of_an_earlier_status_still_holds(
    folder: Path, status: dict[str, Any], changes: dict[str, Any], collected: bool, expected: dict[str, Any]
) -> None:
    agent.write_json(folder / "agent-status.json", {"pod_id": "pod1", **status})
    if collected:
        (folder / "collected").touch()
    found = agent.previous_status(folder, order(**changes), "pod1")
    assert {key: value for key, value in found.items() if key != "pod_id"} == expected
    assert (folder / "collected").exists() == (collected and expected.get("state") != "ending")


class Arming:
    """What arming a run does to its pod and process, noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.right, self.begun, self.watch, self.oom, self.keys = True, 0, list[Any](), list[int](), list[Any]()
        self.served: list[Any] = []
        own = SimpleNamespace(id="pod1", may_end=lambda: self.right, tell_watch=lambda *words: self.watch.append(words))
        monkeypatch.setattr(agent, "ThisPod", lambda order=None: own)
        monkeypatch.setattr(agent, "lower_oom_score", lambda: self.oom.append(1))
        monkeypatch.setattr(agent, "authorize_key", self.keys.append)
        monkeypatch.setattr(DeadManSwitch, "begin", lambda switch: setattr(self, "begun", self.begun + 1))
        monkeypatch.setattr(DeadManSwitch, "serve", lambda switch: self.served.append(switch.own.id) or switch.held)

    def arm(self, folder: Path, held: list[Any] | None = None, **changes: Any) -> Any:
        agent.write_json(folder / "agent.json", order(public_key="ssh-ed25519 A", **changes))
        return agent.arm_and_serve(folder, [] if held is None else held)


@pytest.fixture
def arming(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Arming:
    return Arming(monkeypatch)


def test_arming_tells_the_start_command_says_so_and_lets_the_work_begin(
    arming: Arming, folder: Path, clock: Clock
) -> None:
    (folder / "collected").touch()  # an earlier pod's, on a volume
    held: list[Any] = []
    assert arming.arm(folder, held) is held and len(held) == 1
    assert (arming.begun, arming.oom, arming.keys, arming.served) == (1, [1], ["ssh-ed25519 A"], ["pod1"])
    assert arming.watch == [(1600.0 + agent.WATCH_SECONDS, "terminate")] and not (folder / "collected").exists()
    assert agent.read_status(folder) == {
        "state": "armed", "pod_id": "pod1", "agent": os.getpid(), "order": "o1", "right_to_end": True, "pid": None,
        "armed": clock.wall, "time": clock.wall,
    }  # fmt: skip
    assert {*agent.FOLDERS} <= {one.name for one in folder.parent.parent.iterdir()}


@pytest.mark.parametrize(
    ("heartbeat", "right", "refused"), [(None, False, True), (10.0, False, False), (None, True, False)]
)
def test_an_unattended_run_is_refused_without_the_right_to_end_its_pod(
    arming: Arming, folder: Path, heartbeat: float | None, right: bool, refused: bool
) -> None:
    arming.right = right
    assert (arming.arm(folder, heartbeat_minutes=heartbeat) is None) is refused
    status = agent.read_status(folder)
    assert status["state"] == ("refused" if refused else "armed") and status["right_to_end"] is right
    assert arming.begun == (not refused) and (status.get("exit_code"), status["order"]) == (
        1 if refused else None,
        "o1",
    )
    assert not refused or status["message"] == "this pod may not end itself: its key is refused"
    arming.right = True  # another key, and once more
    assert arming.arm(folder, heartbeat_minutes=heartbeat) is not None
    assert agent.read_status(folder)["state"] == "armed"


def test_a_run_goes_on_where_it_stood_and_one_that_was_ended_is_only_looked_at(
    arming: Arming, folder: Path, clock: Clock
) -> None:
    for state, begins, ends in (("training", 1, 7200), ("done", 1, 7200), ("ending", 0, 600)):
        arming.begun = 0
        (folder / "armed.json").unlink(missing_ok=True)
        agent.write_json(folder / "agent-status.json", {"pod_id": "pod1", "state": state, "task": "t1"})
        arming.watch.clear()
        assert arming.arm(folder, deadline=5_007_200.0) is not None
        status = agent.read_status(folder)
        assert (status["state"], status["task"], arming.begun) == (state, "t1", begins)
        assert arming.watch == [(clock.seconds + ends + agent.WATCH_SECONDS, "terminate")]


def test_an_order_of_another_pod_or_a_run_that_is_served_arms_nothing(
    arming: Arming, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arming.arm(folder, pod_id="pod0") is None
    (folder / "agent.json").unlink()
    assert agent.arm_and_serve(folder, []) is None
    other: list[Any] = []
    assert agent.lock_run(folder.name, other) and arming.arm(folder) is None
    assert arming.watch == [] and agent.read_status(folder) == {}
    for stream in other:
        stream.close()
    (folder.parent / "run-2").mkdir()
    agent.write_json(folder.parent / "run-2" / "agent.json", {"run_id": "run-2", "pod_id": "pod1"})
    agent.write_json(folder / "successor.json", {"run_id": "run-2"})
    assert arming.arm(folder) == folder.parent / "run-2" and arming.watch == []
    told: list[Path] = []
    monkeypatch.setattr(agent, "redirect_output", told.append)
    held = [(agent.SHM / "first").open("w")]
    arming.arm(folder, held)
    assert told == [folder] and len(held) == 2  # its log from here on, and it keeps the lock of the first one
    after = order(id="o9", public_key="ssh-ed25519 Z", deadline=5_000_300.0)
    (folder / "successor.json").unlink()
    monkeypatch.setattr(agent, "lock_run", lambda name, held: agent.write_json(folder / "agent.json", after) or True)
    arming.arm(folder, held)  # the order was renewed while it stood by
    assert agent.read_status(folder)["order"] == "o9" and arming.keys == ["ssh-ed25519 Z"]
    assert arming.watch[-1][0] == 1300.0 + agent.WATCH_SECONDS


def test_one_process_serves_the_runs_that_its_pod_is_handed_on_to(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[str, int]] = []
    following: dict[str, Path | None] = {"a": Path("b"), "b": Path("c"), "c": None}

    def serve(run: Path, held: list[Any]) -> Path | None:
        held.append(run)
        served.append((str(run), len(held)))
        return following[str(run)]

    monkeypatch.setattr(agent, "arm_and_serve", serve)
    assert agent.run(Path("a")) == 0 and served == [("a", 1), ("b", 2), ("c", 3)]


def test_its_words_go_to_the_log_of_its_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[int] = []
    opened: list[int] = []

    def dup2(source: int, target: int) -> None:
        opened.append(source)
        targets.append(target)
        os.write(source, b"x")

    for count in (1, 2):
        with monkeypatch.context() as context:
            context.setattr(agent.os, "dup2", dup2)
            agent.redirect_output(folder)
        assert (folder / "logs" / "agent.log").read_bytes() == b"xx" * count and targets == [1, 2] * count
    assert (folder / "logs" / "agent.log").stat().st_mode & 0o777 == 0o644
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])
    agent.redirect_output(folder / "logs" / "agent.log")  # a disk that does not take it


def test_others_are_killed_first_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrote: list[tuple[str, str]] = []

    def refused(text: str) -> None:
        wrote.append((wrote.pop()[0], text))
        raise PermissionError

    def path(name: str) -> Any:
        wrote.append((name, ""))
        return SimpleNamespace(write_text=refused)

    monkeypatch.setattr(agent, "Path", path)
    agent.lower_oom_score()
    assert wrote == [("/proc/self/oom_score_adj", "-900")]


@contextmanager
def forks(monkeypatch: pytest.MonkeyPatch, *pids: int) -> Iterator[list[str]]:
    """`fork` as it returns in one of the processes; what that one does."""
    left, done = list(pids), list[str]()

    def exits(code: int) -> None:
        done.append(f"exit {code}")
        raise Over

    noted: dict[str, Callable[..., Any]] = {
        "fork": lambda: left.pop(0), "setsid": lambda: done.append("setsid"), "wait": lambda: done.append("wait"),
        "dup2": lambda source, target: done.append(f"{os.readlink(f'/proc/self/fd/{source}')} as {target}"),
        "_exit": exits,
    }  # fmt: skip
    with monkeypatch.context() as context:
        for name, call in noted.items():
            context.setattr(agent.os, name, call)
        context.setattr(agent, "redirect_output", lambda at: done.append("redirect"))
        context.setattr(agent, "run", lambda at: done.append(f"run {at.name}") or 3)
        yield done


def test_an_agent_is_started_in_a_session_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with forks(monkeypatch, 0, 0) as done, pytest.raises(Over):
        agent.start(folder)
    assert done == ["setsid", "/dev/null as 0", "redirect", "run run-1", "exit 3"]
    with forks(monkeypatch, 0, 7) as done, pytest.raises(Over):
        agent.start(folder)
    assert done == ["setsid", "exit 0"]


def test_a_start_is_answered_as_soon_as_the_switch_is_armed_by_the_run_that_has_the_pod(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agent, "ThisPod", lambda order: SimpleNamespace(id=order["pod_id"]))
    agent.write_json(folder / "agent.json", order(id="o2"))
    agent.update_status(folder, state="armed", order="o1", right_to_end=True)  # an earlier order's
    slept = 0

    def sleep(seconds: float) -> None:
        nonlocal slept
        assert seconds == 0.1
        slept += 1
        clock.pass_by(seconds)
        if slept == 10:
            agent.update_status(folder, order="o2", right_to_end=None)
        if slept == 20:
            agent.update_status(folder, right_to_end=False)

    monkeypatch.setattr(agent.time, "sleep", sleep)
    with forks(monkeypatch, 7) as done:
        assert agent.start(folder) == 0
    assert done == ["wait"] and slept == 20
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], said["order"], said["right_to_end"]) == ("armed", "o2", False)
    for number, following in ((1, "run-2"), (2, "run-3")):
        (folder.parent / following).mkdir()
        agent.write_json(folder.parent / following / "agent.json", order(run_id=following, id=following))
        agent.write_json(folder.parent / f"run-{number}" / "successor.json", {"run_id": following})
    agent.update_status(folder.parent / "run-3", state="training", order="run-3", right_to_end=True)
    with forks(monkeypatch, 7):
        assert agent.start(folder) == 0
    assert json.loads(capsys.readouterr().out)["order"] == "run-3"
    agent.update_status(folder.parent / "run-3", order="other")
    began = clock.seconds
    with forks(monkeypatch, 7):
        assert agent.start(folder) == 1
    assert json.loads(capsys.readouterr().out) == {"state": "silent"} and 60 <= clock.seconds - began < 61
