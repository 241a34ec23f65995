"""A pod goes from one run to the next: its one process, the switch, serves whoever has the pod, whatever dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.cloud.agent import agent
from runner.rundir.directory import is_alive
from tests.cloud.test_agent import AGENT, Api, Pod
from tests.support.processes import until

LONG = "import time; print('begun', flush=True); time.sleep(100)"


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.server.shutdown()


@pytest.fixture
def runs(tmp_path: Path, api: Api) -> Iterator[tuple[Pod, Pod]]:
    """Two runs of one pod: the second one is not begun."""
    both = Pod(tmp_path, api), Pod(tmp_path, api)
    yield both
    for run in both:
        run.clear()


def hand_on(first: Pod, second: Pod) -> None:
    """What the launcher does: the order of the next run, and the word."""
    second.order()
    agent.write_json(first.folder / "successor.json", {"run_id": second.run_id})


def handed_on(first: Pod, second: Pod) -> None:
    """The pod of a run that is over, as it serves the next one."""
    hand_on(first, second)
    until(lambda: second.state() == "armed")


def done(run: Pod) -> dict[str, object]:
    """A run to its end."""
    run.order()
    status = run.start()
    run.task("print('done it')")
    until(lambda: run.state() == "done")
    return status


def test_the_same_process_serves_the_next_run(runs: tuple[Pod, Pod], api: Api) -> None:
    first, second = runs
    before = done(first)
    handed_on(first, second)
    assert second.status()["agent"] == before["agent"] and second.status()["right_to_end"] is True
    second.task("print('the other one')")
    until(lambda: second.state() == "done")
    assert "the other one" in second.log("worker.log") and "done it" not in second.log("worker.log")
    assert "handed on" in first.log("agent.log") and "worker.log: exit code 0" in second.log("agent.log")
    assert not api.ended() and first.state() == "done"
    (first.folder / "collected").touch()
    time.sleep(1.2)
    assert not api.ended()  # the first run has no say any more
    (second.folder / "collected").touch()
    until(api.ended)


def test_start_answers_for_the_run_that_has_the_pod(runs: tuple[Pod, Pod]) -> None:
    first, second = runs
    before = done(first)
    hand_on(first, second)
    answer = first.start()  # as the launcher asks it
    order = agent.read_json(second.folder / "agent.json")["id"]
    assert (answer["order"], answer["agent"], answer["state"]) == (order, before["agent"], "armed")


def test_a_run_is_finished_before_its_pod_is_handed_on(runs: tuple[Pod, Pod]) -> None:
    first, second = runs
    first.order()
    first.start()
    first.task("import time; time.sleep(3)")
    until(lambda: first.state() == "training")
    hand_on(first, second)
    time.sleep(1.2)
    assert second.state() is None and first.state() == "training"
    until(lambda: second.state() == "armed")
    assert first.state() == "done"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"pod_id": "pod0"}, {"run_id": "another"}])
def test_an_order_that_is_not_for_this_pod_is_not_followed(
    runs: tuple[Pod, Pod], api: Api, changes: dict[str, str]
) -> None:
    """Of an earlier pod, on a network volume: the first run's limits stay."""
    first, second = runs
    done(first)
    second.order(**changes)
    agent.write_json(first.folder / "successor.json", {"run_id": second.run_id})
    time.sleep(1.2)
    assert second.state() is None and not api.ended()
    first.order(deadline=time.time() + 1, uncollected="terminate")
    until(api.ended, 30)


def test_a_parked_pod_that_is_not_taken_over_ends_itself(runs: tuple[Pod, Pod], api: Api) -> None:
    first, _ = runs
    done(first)
    first.order(heartbeat_minutes=2 / 60, uncollected="terminate")
    until(api.ended, 30)
    assert not api.ended("stop") and "no sign of the launcher" in first.status()["message"]


def test_the_next_runs_limits_are_its_own(runs: tuple[Pod, Pod], api: Api) -> None:
    first, second = runs
    done(first)
    first.order(deadline=time.time() + 3, uncollected="terminate")
    handed_on(first, second)
    time.sleep(3.5)
    assert not api.ended()
    second.order(deadline=time.time() + 1)
    until(api.ended, 30)


def test_after_a_restart_of_the_container_the_last_run_has_its_agent_again(runs: tuple[Pod, Pod]) -> None:
    """What starts it is the pod's start command, which knows the first run alone."""
    first, second = runs
    done(first)
    handed_on(first, second)
    second.task(LONG)
    until(lambda: "begun" in second.log("worker.log"))
    second.kill()
    first.start()
    until(lambda: second.log("worker.log").count("begun") == 2)
    own = second.status()["agent"]
    assert is_alive(own) and own != first.status()["agent"]
    assert second.status()["starts"] == 2 and first.log("worker.log").count("done it") == 1
    assert first.start()["agent"] == own


@pytest.mark.slow
def test_the_start_command_leaves_a_pod_alone_that_was_handed_on(runs: tuple[Pod, Pod]) -> None:
    first, second = runs
    (first.folder / "agent.py").write_bytes(AGENT.read_bytes())
    first.order()
    with first.start_command():
        until(lambda: first.state() == "armed", 30)
        first.task("pass")
        until(lambda: first.state() == "done")
        handed_on(first, second)
        pid = second.status()["agent"]
        time.sleep(6)  # longer than it waits between two looks
        assert is_alive(pid) and second.status()["agent"] == pid
        assert "already running" not in first.log("agent.log")
        second.kill()
        until(lambda: is_alive(second.status()["agent"]), 30)
        assert second.state() == "armed"


def test_of_two_agents_of_the_last_run_one_stands_by(runs: tuple[Pod, Pod]) -> None:
    """A launcher that comes back after a restart may be faster than the start command."""
    first, second = runs
    done(first)
    handed_on(first, second)
    second.task(LONG)
    until(lambda: "begun" in second.log("worker.log"))
    second.kill()
    second.start()
    until(lambda: second.log("worker.log").count("begun") == 2)
    own = second.status()["agent"]
    assert first.start()["agent"] == own  # it waits, with the first run's lock
    second.kill()
    until(lambda: second.log("worker.log").count("begun") == 3)
    assert second.status()["agent"] != own


def test_the_next_runs_key_opens_the_pod(runs: tuple[Pod, Pod], tmp_path: Path) -> None:
    first, second = runs
    keys = tmp_path / "home" / ".ssh" / "authorized_keys"
    keys.parent.mkdir(parents=True)
    keys.write_text("ssh-ed25519 AAAA first")
    first.order(public_key="ssh-ed25519 AAAA first")
    first.start(RUNNER_AUTHORIZED_KEYS=str(keys))
    first.task("pass")
    until(lambda: first.state() == "done")
    second.order(public_key="ssh-ed25519 BBBB second")
    agent.write_json(first.folder / "successor.json", {"run_id": second.run_id})
    until(lambda: second.state() == "armed")
    assert keys.read_text() == "ssh-ed25519 AAAA first\nssh-ed25519 BBBB second\n"
    keys.write_text("ssh-ed25519 AAAA first\n")  # a container that was made anew
    second.kill()
    for _ in range(2):
        first.start(RUNNER_AUTHORIZED_KEYS=str(keys))
    assert keys.read_text().splitlines() == ["ssh-ed25519 AAAA first", "ssh-ed25519 BBBB second"]


def test_the_next_runs_training_does_not_hold_the_locks(runs: tuple[Pod, Pod]) -> None:
    """A training that outlives its switch must not pass for one."""
    first, second = runs
    done(first)
    handed_on(first, second)
    second.task(LONG)
    until(lambda: "begun" in second.log("worker.log"))
    os.kill(second.status()["agent"], signal.SIGKILL)
    until(lambda: not is_alive(second.status()["agent"]))
    first.start()
    until(lambda: is_alive(second.status()["agent"]))
