"""A pod ends in time whatever its disks do: full, read-only, broken; and where the agent itself hangs or is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.agent import agent
from runner.emulator.container import namespaces
from runner.rundir.directory import is_alive
from tests.cloud.test_agent import AGENT, KEY, Api, Pod, pod
from tests.conftest import ROOT
from tests.support.processes import until

__all__ = ["pod"]
LONG = "import time; print('begun', flush=True); time.sleep(100)"

# ── a real disk: a small ext4 in a mount namespace ───────────────────────────────────────────────

ON_A_DISK = """
import subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from tests.support.processes import until
from tests.support.disks import Disk
from tests.cloud.test_agent import Pod
root, url, run_id, damage = Path(sys.argv[1]), *sys.argv[2:5]
disk = Disk(root / "disk")
root = disk.place
pod = Pod(root, SimpleNamespace(url=url))
pod.run_id, pod.folder = run_id, pod.folder.with_name(run_id)
(pod.folder / "logs").mkdir(parents=True)
pod.order(deadline=time.time() + float(sys.argv[5]), uncollected="terminate")
print(pod.start()["agent"], flush=True)
pod.task("import time; time.sleep(100)")
until(lambda: pod.state() == "training")
if damage == "full":
    disk.fill()
elif damage == "readonly":
    disk.break_down()  # under open files: a remount would be refused, for the agent's log is one
elif damage == "garbage":
    for file in pod.folder.glob("*.json"):
        file.write_bytes(bytes(range(256)))
elif damage == "gone":
    subprocess.run(["rm", "-rf", str(pod.folder)], check=True)
print("damaged", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="no right to mount")
@pytest.mark.parametrize("damage", ["full", "readonly", "garbage", "gone"])
def test_a_disk_that_takes_nothing_keeps_no_pod_alive(tmp_path: Path, damage: str) -> None:
    api, run_id = Api(), f"run-{os.urandom(4).hex()}"
    words = [str(tmp_path), api.url, run_id, damage, "8"]
    script = subprocess.Popen(
        ["unshare", "--mount", sys.executable, "-c", ON_A_DISK, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert script.stdout is not None
    pid = int(script.stdout.readline())
    try:
        assert script.stdout.readline() == "damaged\n" and script.wait(30) == 0
        assert not api.ended()
        until(api.ended, 20)
        assert api.asked[-1] == ("DELETE", "/v2/pods/pod1", f"Bearer {KEY}")
    finally:
        end(pid, run_id)
        api.server.shutdown()


MENDED = """
import subprocess, sys
from pathlib import Path
from tests.support.disks import Disk
disk = Disk(Path(sys.argv[1]) / "disk")
(disk.place / "before").write_text("x")
subprocess.run(["sync", "-f", disk.place], check=True)
other = subprocess.Popen(["unshare", "--mount", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)
other.stdout.readline()
disk.break_down()
try:
    (disk.place / "broken").write_text("x")
except OSError as error:
    print(error.strerror)
disk.mend()
(disk.place / "after").write_text("x")
print(sorted(file.name for file in disk.place.iterdir()))
disk.close()
other.kill()
"""


@pytest.mark.skipif(not namespaces(), reason="no right to mount")
def test_a_disk_is_mended_though_another_mount_namespace_still_has_the_broken_one(tmp_path: Path) -> None:
    """As every pod has that an emulator has begun meanwhile: benchmarks/chaos_pods.py counted results as lost that
    nobody could have written."""
    words = ["unshare", "--mount", sys.executable, "-c", MENDED, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["Read-only file system", "['after', 'before']"], done.stderr


def end(pid: int, run_id: str) -> None:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if run_id in file.read_text("utf-8", errors="replace"):
                os.kill(int(file.parent.name), signal.SIGKILL)
        except OSError:
            continue
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
    for left in agent.SHM.glob(f"runner-{run_id}.*"):
        left.unlink()


# ── faults of the system, as the agent sees them ───────────────────────────────────────────────

FAULTY = """
import builtins, errno, fcntl, io, os, runpy, sys, time
code, start = getattr(errno, os.environ["FAULT"]), float(os.environ["FAULT_FROM"])
def faulty(function):
    def call(*arguments, **named):
        if time.time() > start:
            raise OSError(code, os.strerror(code)) if code != errno.ENOMEM else MemoryError
        return function(*arguments, **named)
    return call
class Words:
    def __getattr__(self, name): return getattr(sys.__stderr__, name)
    write = faulty(lambda text: sys.__stderr__.write(text))
    flush = faulty(lambda: sys.__stderr__.flush())
sys.stderr = Words()
io.open = builtins.open = faulty(io.open)  # pathlib calls the first
for name in ("open", "replace", "unlink", "fsync", "stat", "mkdir", "sync", "fork", "waitpid", "kill", "killpg"):
    setattr(os, name, faulty(getattr(os, name)))
fcntl.flock = faulty(fcntl.flock)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextmanager
def faulty_agent(pod: Pod, fault: str, since: float) -> Iterator[subprocess.Popen[bytes]]:
    """The agent, whose every call fails from so many seconds on."""
    env = {**pod.env, "FAULT": fault, "FAULT_FROM": str(time.time() + since)}
    words = [sys.executable, "-c", FAULTY, str(AGENT), "run", str(pod.folder)]
    process = subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "since"),
    [("ENOSPC", 0.0), ("ENOMEM", 0.0), *((fault, 2.0) for fault in ("EDQUOT", "EROFS", "EIO", "ENOMEM", "EMFILE"))],
)
def test_no_call_that_fails_keeps_a_pod_alive(pod: Pod, fault: str, since: float) -> None:
    """Every file, lock, log and process: all of it fails, from one moment on, for as long as the agent lives."""
    pod.order(deadline=time.time() + 5, uncollected="terminate")
    # Two seconds for Python itself to start; the earlier faults come before there is a task.
    with faulty_agent(pod, fault, 2 + since) as process:
        until(lambda: pod.state() == "armed" or process.poll() is not None)
        if since:
            pod.task(LONG)
        until(pod.api.ended, 30)
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["EIO", "ENOMEM", "EMFILE"])
def test_no_call_that_fails_costs_a_finished_result(pod: Pod, fault: str) -> None:
    """Found by benchmarks/chaos_agents.py: without memory for a look at the disk it was terminated, not stopped."""
    pod.order(deadline=time.time() + 6, uncollected="stop")
    pod.task("pass")
    with faulty_agent(pod, fault, 4):
        until(lambda: pod.state() == "done", 4)
        until(lambda: pod.api.ended("stop"), 30)
        assert not pod.api.ended()


# ── an agent that hangs, or is gone ────────────────────────────────────────────────────────────


@pytest.fixture
def watched(pod: Pod) -> Iterator[None]:
    """The pod's start command; its agent gives it a second, and not thirty."""
    text = AGENT.read_text("utf-8")
    assert "WATCH_SECONDS = 30.0" in text
    (pod.folder / "agent.py").write_text(text.replace("WATCH_SECONDS = 30.0", "WATCH_SECONDS = 1.0"), "utf-8")
    with pod.start_command():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "is gone"])
@pytest.mark.parametrize("uncollected", ["terminate", "stop"])
def test_the_start_command_ends_a_pod_whose_agent_does_not(pod: Pod, watched: None, how: str, uncollected: str) -> None:
    pod.order(deadline=time.time() + 8, uncollected=uncollected)
    until(lambda: pod.state() == "armed", 30)
    pod.task(LONG)
    until(lambda: "begun" in pod.log("worker.log"), 30)
    time.sleep(1.2)  # two words of the agent's
    pid = pod.status()["agent"]
    if how == "is gone":  # and the disk does not give it back
        (pod.folder / "agent.py").unlink()
    os.kill(pid, signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
    assert not pod.api.ended() and not pod.api.ended("stop")
    until(lambda: pod.api.ended("stop" if uncollected == "stop" else "DELETE"), 30)
    assert uncollected == "terminate" or not pod.api.ended()


def test_the_start_command_leaves_a_pod_alone_whose_agent_speaks(pod: Pod, watched: None) -> None:
    pod.order(deadline=time.time() + 3, uncollected="terminate")
    until(lambda: pod.state() == "armed", 30)
    pod.order(deadline=time.time() + 600, uncollected="terminate")
    time.sleep(6)
    assert not pod.api.ended() and pod.state() == "armed"


# ── answers ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def odd() -> Iterator[Any]:
    """A server that answers what it is told to, byte by byte."""
    server = socket.create_server(("127.0.0.1", 0))
    answers: dict[str, Any] = {"words": b"", "pause": 0.0, "asked": 0}

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            answers["asked"] += 1
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    def answer(client: socket.socket) -> None:
        with client:
            client.recv(4096)
            try:
                for byte in answers["words"]:
                    client.sendall(bytes([byte]))
                    time.sleep(answers["pause"])
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    answers["url"] = f"http://127.0.0.1:{server.getsockname()[1]}"
    yield answers
    server.close()


@pytest.mark.parametrize(
    "words", [b"garbage\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"\xff\xfe\x00", b"HTTP/1.1 99999 X\r\n\r\n", b""]
)
def test_an_answer_that_is_no_http_is_no_answer(
    odd: dict[str, Any], words: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", odd["url"])
    odd["words"] = words
    assert agent.ThisPod().ask("DELETE") == 0


def test_an_answer_that_drips_is_waited_for_so_long_and_no_longer(
    odd: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_API_BASE_URL", odd["url"])
    monkeypatch.setattr(agent, "REQUEST_SECONDS", 0.5)
    odd |= {"words": b"HTTP/1.1 204 No Content\r\nX: " + bytes(1000), "pause": 0.02}
    began = time.monotonic()
    assert agent.ThisPod().ask("DELETE") == 0
    assert time.monotonic() - began < 5


def test_the_agent_outlives_garbled_answers_and_ends_the_pod_by_a_whole_one(odd: dict[str, Any], pod: Pod) -> None:
    odd["words"] = b"HTTP/1.1 garbage\r\n\r\n"
    pod.order(deadline=time.time() + 600, uncollected="terminate")
    pod.start()
    real, pod.api.url = pod.api.url, odd["url"]
    pod.kill()
    pod.order(deadline=time.time() + 2, uncollected="terminate")
    words, log = [sys.executable, str(AGENT), "run", str(pod.folder)], pod.folder / "words"
    with log.open("wb") as file:
        process = subprocess.Popen(words, env={**pod.env, "RUNPOD_API_BASE_URL": odd["url"]}, stderr=file)
    try:
        until(lambda: log.read_text().count("terminate: the API answers 0") > 1, 60)
        odd["words"] = b"HTTP/1.1 204 No Content\r\n\r\n"
        until(lambda: "terminate: the API answers 204" in log.read_text(), 30)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
        pod.api.url = real
