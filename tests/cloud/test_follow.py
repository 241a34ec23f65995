"""What grows in a pod grows here: byte for byte, across broken connections, restarts and files that begin anew."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.agent import agent, tail
from runner.cloud.follow import Follower, News
from runner.cloud.ssh import PodGoneError
from runner.cloud.transfer import PodRunFolder
from runner.errors import Problem
from runner.rundir.directory import RunDir
from tests.support.emulated import needs_sshd
from tests.support.processes import until
from tests.support.sshd import Server, server

pytestmark = needs_sshd


class Pod:
    """A run's folder behind a real ssh server, and a follower of it in a thread."""

    def __init__(self, root: Path, there: Server) -> None:
        self.there, self.run = there, RunDir(root / "here" / "runs" / "run-f")
        self.folder = root / "workspace" / "runs" / "run-f"
        for folder in (self.run.path / "logs", self.folder / "logs"):
            folder.mkdir(parents=True)
        for module in (agent, tail):
            (self.folder / Path(str(module.__file__)).name).write_bytes(Path(str(module.__file__)).read_bytes())
        self.told: list[News] = []
        self.error: BaseException | None = None
        self.gone = self.over = False
        self.prepared = 0
        self.thread: threading.Thread | None = None
        self.link = there.connection()

    def find(self) -> tuple[str, int] | None:
        if self.gone:
            raise PodGoneError(Problem("the pod is gone"))
        return "127.0.0.1", self.there.port

    def prepare(self) -> None:
        self.prepared += 1

    def begin(self) -> None:
        follower = Follower(
            PodRunFolder(self.link, str(self.folder.parent.parent), "run-f"), self.run, self.find, self.prepare
        )

        def listen() -> None:
            news = follower.news()
            try:
                for item in news:
                    self.told.append(item)
                    if self.over:
                        break
            except BaseException as error:
                self.error = error
            finally:
                news.close()

        self.thread = threading.Thread(target=listen)
        self.thread.start()

    def end(self) -> None:
        self.over = True
        if self.thread is not None:
            self.thread.join(60)
        self.link.close()

    def add(self, name: str, text: str) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(text)

    def same(self, name: str) -> Callable[[], bool]:
        here, there = self.run.path / name, self.folder / name
        return lambda: here.exists() and here.read_bytes() == there.read_bytes()

    def kinds(self, kind: str) -> list[Any]:
        return [item.value for item in self.told if item.kind == kind]


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    with server(tmp_path / "sshd") as there:
        found = Pod(tmp_path, there)
        yield found
        found.end()


def line(step: int) -> str:
    return json.dumps({"step": step, "loss": 1 / step}) + "\n"


def test_lines_arrive_as_they_are_written(pod: Pod) -> None:
    pod.add("metrics.jsonl", line(1))
    pod.begin()
    until(pod.same("metrics.jsonl"))
    pod.add("metrics.jsonl", line(2) + '{"step": 3, "lo')
    pod.add("logs/worker.log", "Loading …\nhalf a li")
    until(pod.same("logs/worker.log"))
    pod.add("metrics.jsonl", 'ss": 0.1}\n')
    pod.add("logs/worker.log", "ne\n")
    agent.write_json(pod.folder / "agent-status.json", {"state": "training"})
    until(lambda: pod.kinds("agent"))
    assert [step["step"] for step in pod.kinds("step")] == [1, 2, 3]
    assert pod.kinds("words") == ["Loading …", "half a line"]
    assert pod.kinds("agent") == [{"state": "training"}]
    assert not (pod.run.path / "status.json").exists()
    (pod.folder / "status.json").write_text('{"state": "training", "num_steps": 9}')
    until(lambda: pod.kinds("status"))
    assert not (pod.run.path / "status.json").exists()  # ours is not overwritten


def test_the_launcher_is_heard_of(pod: Pod) -> None:
    beat = agent.SHM / "runner-run-f.beat"
    pod.begin()
    until(beat.exists)
    first = beat.stat().st_mtime_ns
    until(lambda: beat.stat().st_mtime_ns > first, 20)
    beat.unlink()


def test_after_a_break_it_goes_on_at_its_byte_wherever_the_pod_is(pod: Pod) -> None:
    pod.add("metrics.jsonl", "".join(line(n) for n in range(1, 400)))
    pod.begin()
    until(pod.same("metrics.jsonl"))
    pod.there.cut()
    pod.add("metrics.jsonl", line(400))
    until(lambda: pod.kinds("lost"))
    pod.there.start(pod.there.port + 1)
    until(pod.same("metrics.jsonl"))
    steps = [step["step"] for step in pod.kinds("step")]
    assert steps == list(range(1, 401))  # none twice, none missing
    assert pod.prepared == 1 and any(item.kind == "back" for item in pod.told)


def test_a_file_that_begins_anew_does_so_here(pod: Pod) -> None:
    pod.add("metrics.jsonl", line(1) + line(2) + line(3))
    pod.begin()
    until(pod.same("metrics.jsonl"))
    new = pod.folder / "new"
    new.write_text(line(1) + line(2))
    new.replace(pod.folder / "metrics.jsonl")
    until(pod.same("metrics.jsonl"))
    pod.add("metrics.jsonl", line(3))
    until(pod.same("metrics.jsonl"))


def test_what_was_rewritten_during_a_break_is_sent_whole(pod: Pod) -> None:
    pod.add("metrics.jsonl", line(1) + line(2) + line(3))
    (pod.run.path / "metrics.jsonl").write_text(line(1) + line(7) + line(9))
    pod.begin()
    until(pod.same("metrics.jsonl"))


def test_binary_files_of_tensorboard_arrive(pod: Pod) -> None:
    (pod.folder / "tensorboard" / "x").mkdir(parents=True)
    (pod.folder / "tensorboard" / "x" / "events.out.1").write_bytes(bytes(range(256)) * 2000)
    pod.begin()
    until(pod.same("tensorboard/x/events.out.1"))


def test_checkpoints_are_told_once_they_are_complete(pod: Pod) -> None:
    place = pod.folder / "checkpoints" / "checkpoint-4"
    place.mkdir(parents=True)
    pod.begin()
    until(lambda: pod.kinds("checkpoints") == [[]])
    (place / "COMPLETE").write_text("{}")
    until(lambda: pod.kinds("checkpoints")[-1] == [4])


def test_a_pod_that_is_gone_ends_it(pod: Pod) -> None:
    pod.begin()
    until(lambda: pod.kinds("checkpoints"))
    pod.gone = True
    pod.there.cut()
    until(lambda: isinstance(pod.error, PodGoneError))


def test_an_empty_disk_ends_it(pod: Pod) -> None:
    (pod.folder / "agent.py").unlink()
    pod.begin()
    until(lambda: isinstance(pod.error, PodGoneError), 30)
