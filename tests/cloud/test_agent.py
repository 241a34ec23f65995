"""The agent ends its pod in time, trains once, and says where it stands: as a process, against a real HTTP server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.agent import agent
from runner.cloud.runpod import runpod_provider
from runner.rundir.directory import is_alive
from tests.support.processes import until

AGENT = Path(agent.__file__)
KEY = "pod-scoped-key"


class Api:
    """RunPod's part of it: answers for one pod, keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.answers: dict[str, int] = {"GET": 200, "DELETE": 204, "start": 409, "stop": 200}
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = json.loads(body)["action"] if body else self.command
                api.asked.append((what, self.path, self.headers["Authorization"]))
                self.send_response(api.answers[what])
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_DELETE = do_POST = answer  # noqa: N815  # http.server calls them so

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def ended(self, how: str = "DELETE") -> bool:
        return any(what == how for what, _, _ in self.asked)


class Pod:
    """A folder that stands for a pod's workspace, and the processes in it."""

    def __init__(self, root: Path, api: Api) -> None:
        self.api, self.id = api, "pod1"
        self.run_id = f"run-{uuid.uuid4().hex[:8]}"
        self.folder = root / "workspace" / "runs" / self.run_id
        (self.folder / "logs").mkdir(parents=True)

    @property
    def env(self) -> dict[str, str]:
        """Variables of every process in it."""
        return {**os.environ, "RUNPOD_POD_ID": self.id, "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": self.api.url}

    def order(self, **changes: Any) -> None:
        t = time.time()
        order = {
            "id": uuid.uuid4().hex, "run_id": self.run_id, "pod_id": self.id, "sent": t, "started": t,
            "deadline": t + 600, "budget_usd": None, "usd_per_hour": 1.0, "heartbeat_minutes": 10.0, "keep": False,
            "uncollected": "stop",
        }  # fmt: skip
        agent.write_json(self.folder / "agent.json", {**order, **changes})

    def task(self, code: str, **changes: Any) -> None:
        task = {"id": uuid.uuid4().hex, "pod_id": self.id, "python": sys.executable, "command": ["-c", code], "env": {}}
        agent.write_json(self.folder / "work.json", {**task, **changes})

    def start(self, **env: str) -> dict[str, Any]:
        words = [sys.executable, str(AGENT), "start", str(self.folder)]
        done = subprocess.run(words, env={**self.env, **env}, capture_output=True, text=True, timeout=90)
        status: dict[str, Any] = json.loads(done.stdout)
        return status

    @contextmanager
    def start_command(self, minutes: float = 10, start: Path | str = "/bin/cat") -> Iterator[subprocess.Popen[bytes]]:
        """What a pod runs from its first second; it ends with the block, and all that it has started."""
        workspace = self.folder.parents[1]
        main = subprocess.Popen(
            runpod_provider.start_arguments(self.run_id, minutes, str(start)), stdin=subprocess.PIPE,
            cwd=workspace.parent, env={**self.env, "RUNNER_WORKSPACE": str(workspace)}, start_new_session=True,
        )  # fmt: skip
        try:
            yield main
        finally:
            os.killpg(main.pid, signal.SIGKILL)
            main.wait()

    def status(self) -> dict[str, Any]:
        return agent.read_json(self.folder / "agent-status.json")

    def state(self) -> str | None:
        return self.status().get("state")

    def log(self, name: str) -> str:
        file = self.folder / "logs" / name
        return file.read_text("utf-8") if file.exists() else ""

    def kill(self) -> None:
        """As a restart of the container does it."""
        agent_pid = self.status().get("agent")
        for pid in [agent_pid, self.status().get("pid"), *children(agent_pid)]:
            if pid and is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(agent_pid))

    def clear(self) -> None:
        if self.status().get("agent"):
            self.kill()
        for file in agent.SHM.glob(f"runner-{self.run_id}.*"):
            file.unlink()


def children(pid: int | None) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path, Api())
    yield pod
    pod.clear()
    pod.api.server.shutdown()


OTHER_CLOUD = {
    "id": "OTHER_ID", "key": "OTHER_KEY", "base": "OTHER_BASE", "path": "/machines/{id}",
    "authorization": "Token {key}",
    "terminate": ["POST", "/off", {"action": "stop"}],
}  # fmt: skip


def test_a_pod_of_another_cloud_ends_itself_by_the_calls_of_its_order(pod: Pod) -> None:
    pod.order(calls=OTHER_CLOUD, heartbeat_minutes=None, uncollected="terminate")
    none = {"RUNPOD_POD_ID": "", "RUNPOD_API_KEY": "", "RUNPOD_API_BASE_URL": ""}
    status = pod.start(**none, OTHER_ID=pod.id, OTHER_KEY="theirs", OTHER_BASE=pod.api.url)
    assert status["state"] == "armed" and status["right_to_end"] is True
    pod.task("import os; raise SystemExit('OTHER_KEY' in os.environ)")
    until(lambda: pod.api.ended("stop"), 30)
    assert ("stop", f"/machines/{pod.id}/off", "Token theirs") in pod.api.asked
    assert pod.status()["exit_code"] == 0 and not pod.api.ended()


def test_it_trains_once_armed_and_waits_for_the_launcher_to_collect(pod: Pod) -> None:
    pod.order()
    status = pod.start()
    assert status["state"] == "armed" and status["right_to_end"] is True
    assert {path.name for path in pod.folder.parent.parent.iterdir()} == set(agent.FOLDERS)
    pod.task("print('hello'); raise SystemExit(0)")
    until(lambda: pod.state() == "done")
    assert pod.status()["exit_code"] == 0 and "hello" in pod.log("worker.log")
    time.sleep(1.2)
    assert not pod.api.ended() and not pod.api.ended("stop")
    (pod.folder / "collected").touch()
    until(pod.api.ended)
    assert pod.api.asked[-1] == ("DELETE", "/v2/pods/pod1", f"Bearer {KEY}")


def test_the_exit_code_is_the_trainings(pod: Pod) -> None:
    pod.order()
    pod.start()
    pod.task("raise SystemExit(3)")
    until(lambda: pod.state() == "failed")
    assert pod.status()["exit_code"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"deadline": 3.0}, "the deadline has come"),
        ({"budget_usd": 3 / 3600}, "the budget is spent"),
        ({"heartbeat_minutes": 3 / 60}, "no sign of the launcher"),
    ],
)
def test_the_pod_ends_by_itself_and_the_training_saves_first(pod: Pod, changes: dict[str, Any], why: str) -> None:
    if "deadline" in changes:
        changes = {"deadline": time.time() + changes["deadline"]}
    pod.order(**changes)
    pod.start()
    code = (
        "import signal, sys, time, pathlib\n"
        "def save(*_): pathlib.Path('saved').touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save); time.sleep(100)"
    )
    pod.task(code, cwd=str(pod.folder))
    until(lambda: pod.api.ended("stop"), 30)
    status = pod.status()
    assert status["state"] == "ending" and status["message"].startswith(why) and status["how"] == "stop"
    assert (pod.folder / "saved").exists()
    assert not pod.api.ended()  # the volume disk has what nobody else has


def test_signs_of_the_launcher_keep_a_pod(pod: Pod) -> None:
    pod.order(heartbeat_minutes=2 / 60)
    pod.start()
    beat = agent.SHM / f"runner-{pod.run_id}.beat"
    for _ in range(16):
        beat.touch()
        time.sleep(0.25)
    assert not pod.api.ended() and pod.state() == "armed"
    until(pod.api.ended, 30)  # nothing was begun: nothing to keep


def test_a_detached_run_that_never_begins_does_not_wait_for_its_deadline(pod: Pod) -> None:
    """Found by benchmarks/chaos_pods.py: the launcher was killed between arming the pod and telling it what to do."""
    pod.order(heartbeat_minutes=None, boarding_minutes=2 / 60)
    pod.start()
    until(pod.api.ended, 30)


def test_a_detached_run_that_has_begun_needs_no_launcher(pod: Pod) -> None:
    pod.order(heartbeat_minutes=None, boarding_minutes=2 / 60)
    pod.start()
    pod.task("import time; time.sleep(100)")
    time.sleep(4)
    assert pod.state() == "training" and not pod.api.ended() and not pod.api.ended("stop")


def test_a_pod_that_cannot_be_stopped_is_terminated(pod: Pod) -> None:
    pod.api.answers["stop"] = 409
    pod.order(deadline=time.time() + 2)
    pod.start()
    pod.task("import time; time.sleep(100)")
    until(pod.api.ended, 30)


def test_it_asks_again_until_it_is_gone(pod: Pod) -> None:
    pod.api.answers["DELETE"] = 500
    pod.order(deadline=time.time() + 1, uncollected="terminate")
    pod.start()
    until(lambda: sum(what == "DELETE" for what, _, _ in pod.api.asked) > 2, 30)


@pytest.mark.parametrize("answers", [{"GET": 401, "start": 401}, {"start": 403}])
def test_an_unattended_run_is_refused_where_the_pod_may_not_end_itself(pod: Pod, answers: dict[str, int]) -> None:
    pod.api.answers |= answers
    pod.order(heartbeat_minutes=None)
    status = pod.start()
    assert status["state"] == "refused" and status["right_to_end"] is False


def test_a_key_that_may_act_and_not_read_is_good(pod: Pod) -> None:
    pod.api.answers |= {"GET": 403, "start": 409}
    pod.order(heartbeat_minutes=None)
    assert pod.start()["right_to_end"] is True


def test_an_unattended_run_ends_its_pod(pod: Pod) -> None:
    pod.order(heartbeat_minutes=None, uncollected="terminate")
    pod.start()
    pod.task("pass")
    until(pod.api.ended, 30)
    assert pod.status()["ended_in"] == "done"


@pytest.mark.slow
def test_a_result_that_no_disk_keeps_is_waited_with_until_the_deadline(pod: Pod) -> None:
    pod.order(heartbeat_minutes=None, uncollected="wait", deadline=time.time() + 8)
    pod.start()
    pod.task("pass")
    until(lambda: pod.state() == "done")
    time.sleep(1.5)
    assert not pod.api.ended()
    until(pod.api.ended, 30)


def test_what_was_uploaded_needs_no_disk(pod: Pod) -> None:
    pod.order(heartbeat_minutes=None)
    pod.start()
    pod.task("pass", after=["-c", "print('up')"])
    until(pod.api.ended, 30)
    assert pod.status()["uploaded"] is True and "up" in pod.log("upload.log")


def test_an_order_for_another_pod_is_nobodys(pod: Pod) -> None:
    """A deadline on a network volume must not end the next pod that has the volume."""
    pod.order(pod_id="pod0", deadline=time.time() - 1000)
    code = subprocess.run(
        [sys.executable, str(AGENT), "run", str(pod.folder)],
        env={**os.environ, "RUNPOD_POD_ID": "pod1", "RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": pod.api.url},
        timeout=30,
    ).returncode
    assert code == 0 and pod.api.asked == []


def test_an_earlier_pods_task_is_not_begun(pod: Pod) -> None:
    pod.task("print('old')", pod_id="pod0")
    pod.order()
    pod.start()
    time.sleep(1.2)
    assert pod.state() == "armed" and not pod.log("worker.log")


def test_a_second_agent_leaves_the_first_alone(pod: Pod) -> None:
    pod.order()
    first = pod.start()
    pod.task("import time; print('once', flush=True); time.sleep(100)")
    until(lambda: "once" in pod.log("worker.log"))
    again = pod.start()
    assert again["agent"] == first["agent"]
    time.sleep(1)
    assert pod.log("worker.log").count("once") == 1


def test_a_process_that_waits_for_work_ends_with_its_agent(pod: Pod) -> None:
    """Or the training would begin twice: there, and in the agent that follows."""
    pod.order()
    own = pod.start()["agent"]
    (waits,) = until(lambda: children(own))
    os.kill(own, signal.SIGKILL)
    until(lambda: not is_alive(waits), 10)


def test_after_a_restart_of_the_container_the_training_goes_on_and_the_deadline_stays(pod: Pod) -> None:
    pod.order(deadline=time.time() + 300)
    pod.start()
    pod.task("import time; print('begun', flush=True); time.sleep(100)")
    until(lambda: "begun" in pod.log("worker.log"))
    before = agent.read_json(pod.folder / "armed.json")
    pod.kill()
    pod.start()
    until(lambda: pod.log("worker.log").count("begun") == 2)
    after = agent.read_json(pod.folder / "armed.json")
    assert pod.status()["starts"] == 2
    assert abs(after["at_boot"] - before["at_boot"]) < 0.01


def test_a_finished_training_is_not_done_again_after_a_restart(pod: Pod) -> None:
    pod.order()
    pod.start()
    pod.task("print('done it')")
    until(lambda: pod.state() == "done")
    pod.kill()
    pod.start()
    time.sleep(1.5)
    assert pod.log("worker.log").count("done it") == 1 and pod.state() == "done"


def test_a_container_that_dies_of_its_training_is_not_restarted_for_ever(pod: Pod) -> None:
    pod.order()
    pod.task("import time; print('begun', flush=True); time.sleep(100)")
    for count in range(1, agent.MAX_STARTS + 1):
        pod.start()
        until(lambda: pod.log("worker.log").count("begun") == count)  # noqa: B023  # called before the loop goes on
        pod.kill()
    pod.start()
    until(lambda: pod.state() == "failed")
    assert "restarted" in pod.status()["message"]


def test_a_newer_order_moves_the_deadline(pod: Pod) -> None:
    pod.order(deadline=time.time() + 4)
    pod.start()
    pod.order(deadline=time.time() + 600)
    time.sleep(5)
    assert not pod.api.ended() and pod.state() == "armed"


def test_the_launchers_clock_does_not_matter(pod: Pod) -> None:
    skewed = time.time() - 86_400
    pod.order(sent=skewed, started=skewed, deadline=skewed + 600)
    pod.start()
    time.sleep(1.2)
    assert not pod.api.ended()


def test_secrets_reach_the_training_and_the_pods_own_key_does_not(pod: Pod) -> None:
    secret = agent.SHM / f"runner-{pod.run_id}.env"
    secret.write_text(json.dumps({"HF_TOKEN": "hf_secret"}))
    pod.order()
    pod.start()
    pod.task(
        "import os; print(os.environ['HF_TOKEN'][::-1], os.environ.get('RUNPOD_API_KEY'), os.environ['X'])",
        env={"X": "y"},
    )
    until(lambda: pod.state() == "done")
    assert "terces_fh None y" in pod.log("worker.log")
    written = b"".join(file.read_bytes() for file in pod.folder.rglob("*") if file.is_file())
    assert b"hf_secret" not in written


def test_the_start_command_ends_a_pod_to_which_no_agent_comes(pod: Pod, tmp_path: Path) -> None:
    start = tmp_path / "start.sh"
    start.write_text("#!/bin/bash\ntouch started\nsleep 100\n")
    start.chmod(0o755)
    with pod.start_command(1 / 60, start) as main:
        until(pod.api.ended, 30)
        assert (tmp_path / "started").exists() and main.poll() is None


def test_the_start_command_brings_the_agent_back(pod: Pod) -> None:
    (pod.folder / "agent.py").write_bytes(AGENT.read_bytes())
    pod.order()
    with pod.start_command():
        until(lambda: pod.state() == "armed", 30)
