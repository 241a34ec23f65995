"""One run, one pod, one owner: nothing rents a second one, and a stopped one is used again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.cloud import remote_run
from runner.cloud.agent import agent
from runner.cloud.budget import spent
from runner.cloud.fleet import refuse_second_pod
from runner.cloud.lease import Lease
from runner.cloud.ledger import HeldError, Ledger, owner
from runner.cloud.provider import PodRequest
from runner.cloud.provider_errors import NoCapacityError, StillThereError
from runner.cloud.rent_pod import acquire
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.runpod_provider import RunPod
from runner.errors import RequestError
from runner.rundir.directory import RunDir
from tests.cloud.test_agent import Pod, pod
from tests.conftest import ROOT
from tests.support.emulated import IMAGE, Emulator
from tests.support.front import runner
from tests.support.processes import until
from tests.support.rented import KEY, PLAN, creates, impatient, rented_spec, run_of

__all__ = ["pod"]
WORDS = ("where.setup_minutes=0.2", "where.bad_host_minutes=0.02", "where.volume_gb=20", "where.max_usd=9")


@pytest.fixture
def run(state: Path, here: Path, hello: None, tmp_path: Path) -> RunDir:
    return run_of(rented_spec(*WORDS), tmp_path / "runs")


def rent(run: RunDir, *words: str, said: list[str] | None = None) -> Lease:
    say = print if said is None else said.append
    return acquire(run, rented_spec(*WORDS, *words), PLAN, KEY, say)


def left(run: RunDir, state: str = "RUNNING") -> Lease:
    """Its pod, after kill -9 of the launcher."""
    rented = rent(run)
    rented.ledger.move(rented.name, state, "and then the launcher was killed")
    rented.ledger.leave(rented.name)
    return rented


# ── a run that is in a pod ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("left_in", ["RUNNING", "COLLECTING"])
@pytest.mark.parametrize("rents", [True, False], ids=["rents", "local"])
def test_a_run_that_trains_in_a_pod_without_a_launcher_is_attached_to_and_not_resumed(
    emulator: Emulator, run: RunDir, left_in: str, rents: bool
) -> None:
    rented = left(run, left_in)
    with pytest.raises(RequestError, match=f"is in pod {rented.pod.id}") as error:
        refuse_second_pod(run.id, "runpod" if rents else None)
    assert f"python -m runner attach {run.id}" in str(error.value.problems[0].remedy)
    assert list(emulator.pods()) == [rented.pod.id]


def test_also_where_the_ledger_is_lost_or_another_machine_has_rented_it(
    emulator: Emulator, run: RunDir, state: Path
) -> None:
    rented = left(run)
    (state / "ledger.db").unlink()
    with pytest.raises(RequestError, match=f"is in pod {rented.pod.id}"):
        refuse_second_pod(run.id, "runpod")


def test_a_pod_that_is_gone_or_half_made_is_no_obstacle(emulator: Emulator, run: RunDir) -> None:
    left(run, "SYNCED")
    assert "is ended" in "".join(refuse_second_pod(run.id, "runpod")) and emulator.pods() == {}
    rented = left(run)
    RunPod().terminate(rented.pod.id)
    assert "is gone" in "".join(refuse_second_pod(run.id, "runpod"))
    assert Ledger().entries() == []


def test_another_runs_pod_is_none_of_its_business(emulator: Emulator, run: RunDir, tmp_path: Path) -> None:
    left(run_of(rented_spec(), tmp_path / "runs"))
    RunPod().create_pod(PodRequest("somebody-else", IMAGE, "secure", gpu_id="NVIDIA L4"))
    assert refuse_second_pod(run.id, "runpod") == []


def test_two_that_resume_at_once_rent_one_pod(emulator: Emulator, run: RunDir) -> None:
    rented = rent(run)
    code = (
        "import sys; from pathlib import Path; from runner.rundir.directory import RunDir\n"
        "from tests.cloud.test_one_pod_per_run import rent\n"
        "rent(RunDir(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and HeldError.__name__ in done.stderr and "is running in pod" in done.stderr
    rented.mark("RUNNING")
    rented.ledger.leave(rented.name)
    with pytest.raises(RequestError, match="is in pod"):
        refuse_second_pod(run.id, "runpod")
    assert list(emulator.pods()) == [rented.pod.id] and creates(emulator) == 1


# ── a pod that was kept ────────────────────────────────────────────────────────────────────────


def test_a_kept_pod_is_used_again(emulator: Emulator, run: RunDir) -> None:
    first = rent(run)
    first.release(keep=True)
    Ledger().set(first.name, created=time.time() - 3600, updated=time.time() - 1800)  # an hour ago, for half an hour
    cost = spent(Ledger(), run.id)
    assert cost == pytest.approx(0.37, abs=0.02)  # stopped, it costs no GPU
    assert refuse_second_pod(run.id, "runpod") == [] == refuse_second_pod(run.id, None)
    said: list[str] = [""]
    again = rent(run, said=said)
    assert again.pod.id == first.pod.id and creates(emulator) == 1 and again.pod.status == "RUNNING"
    assert f"Starts  pod {first.pod.id}" in "".join(said)
    assert again.usd() == pytest.approx(cost, abs=0.02)  # what was spent counts, and the time in between does not
    assert again.meter.cap_usd == 9 and again.deadline > time.time() + 3000
    again.release()
    assert emulator.pods() == {} and Ledger().entries() == []


def test_kept_again_it_is_stopped_and_not_ended(emulator: Emulator, run: RunDir) -> None:
    rent(run).release(keep=True)
    rent(run).release(keep=True)
    (pod,) = emulator.pods().values()
    (entry,) = Ledger().entries()
    assert pod.status == "EXITED" and (entry.state, entry.pod_id) == ("STOPPED", pod.id)


def test_a_pod_is_not_taken_for_stopped_before_it_is(
    emulator: Emulator, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch, 0.3)
    rented = rent(run)
    monkeypatch.setattr(Api, "stop", lambda self, pod_id: None)  # answered well, and nothing done
    with pytest.raises(StillThereError, match="MAY STILL BE RUNNING"):
        rented.release(keep=True)
    (entry,) = Ledger().entries()
    assert entry.state == "TERMINATING" and entry.keep


def test_a_kept_pod_whose_host_is_full_stays_kept(emulator: Emulator, run: RunDir) -> None:
    first = rent(run)
    first.release(keep=True)
    emulator.inject("no_capacity", on="start", times=0)
    with pytest.raises(NoCapacityError, match="does not start") as error:
        rent(run)
    assert f"pods terminate {run.id}" in str(error.value.problems[0].remedy)
    (pod,) = emulator.pods().values()
    (entry,) = Ledger().entries()
    assert pod.status == "EXITED" and entry.state == "STOPPED" and creates(emulator) == 1


def test_a_kept_pod_of_another_kind_is_refused_and_stays(emulator: Emulator, run: RunDir) -> None:
    rent(run).release(keep=True)
    with pytest.raises(RequestError, match="not what the run needs"):
        rent(run, "hw=a40")
    assert [pod.status for pod in emulator.pods().values()] == ["EXITED"] and creates(emulator) == 1


def test_a_kept_pod_that_is_gone_is_replaced(emulator: Emulator, run: RunDir) -> None:
    first = rent(run)
    first.release(keep=True)
    RunPod().terminate(first.pod.id)
    again = rent(run)
    assert again.pod.id != first.pod.id and list(emulator.pods()) == [again.pod.id]


def test_what_a_stopped_pod_alone_has_is_fetched_before_the_run_goes_on_here(emulator: Emulator, run: RunDir) -> None:
    rented = left(run)
    RunPod().stop(rented.pod.id)
    assert "runner fetch" in "".join(refuse_second_pod(run.id, "runpod"))  # a note: the pod itself is used
    with pytest.raises(RequestError, match="has stopped itself") as error:
        refuse_second_pod(run.id, None)
    assert f"python -m runner fetch {run.id}" in str(error.value.problems[0].remedy)


# ── in the pod ─────────────────────────────────────────────────────────────────────────────────


def test_in_a_pod_that_was_kept_the_agent_begins_anew_and_not_with_what_is_done(pod: Pod) -> None:
    pod.order(keep=True)
    pod.start()
    pod.task("print('first')")
    until(lambda: pod.state() == "done")
    (pod.folder / "collected").touch()
    until(lambda: pod.api.ended("stop"))
    assert not pod.api.ended()  # kept is not ended
    pod.kill()
    pod.api.asked.clear()
    assert pod.start()["state"] == "ending"  # by the start command, before anybody is there
    time.sleep(1.5)
    assert not pod.api.ended("stop") and not pod.api.ended()
    pod.order(keep=True, fresh=True)
    assert pod.start()["state"] == "armed"
    time.sleep(1.2)
    assert pod.log("worker.log").count("first") == 1 and pod.state() == "armed"
    pod.task("print('second')")
    until(lambda: pod.state() == "done")
    assert "second" in pod.log("worker.log") and pod.log("worker.log").count("first") == 1
    assert not pod.api.ended("stop")
    (pod.folder / "collected").touch()
    until(lambda: pod.api.ended("stop"))


def test_a_fresh_order_does_not_disturb_what_is_at_work(pod: Pod) -> None:
    """The launcher sends it again where the connection broke."""
    pod.order(fresh=True)
    pod.start()
    pod.task("import time; print('begun', flush=True); time.sleep(60)")
    until(lambda: "begun" in pod.log("worker.log"))
    pod.order(fresh=True)
    status = pod.start()
    time.sleep(1)
    assert status["state"] == "training" == pod.state() and pod.log("worker.log").count("begun") == 1
    assert agent.read_json(pod.folder / "agent.json")["id"] == pod.status()["order"]


def test_a_dead_launcher_of_another_hostname_holds_no_pod(emulator: Emulator, run: RunDir) -> None:
    rented, same = left(run), str(owner()["host"]).partition("|")[2]
    dead = {"pid": 2**22 + 1, "pid_started": 1.0, "host": f"before-dhcp|{same}"}
    rented.ledger.set(rented.name, **dead)
    (row,) = json.loads(runner("pods", "--json").stdout)
    assert row["pod_id"] == rented.pod.id and not row["held"]
    rented.ledger.set(rented.name, **dead)
    remote_run._adopt(run.id, run.path)  # attach and fetch take it so
    rented.ledger.set(rented.name, **dead)
    assert json.loads(runner("pods", "reap", "--all", "--yes", "--json").stdout)["ended"] == [rented.pod.id]
