"""A cloud that is no part of the package is rented from as RunPod is: one class, one line in each table
of `runner/cloud/providers.py`.

The scenarios are those of test_lifecycle.py, test_unclear_pods.py and test_lost_ledger.py, which hold them against an
emulated RunPod.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cloud import fleet, remote_run, rent_pod, ssh_keys
from runner.cloud.lease import Lease
from runner.cloud.ledger import Ledger, LedgerError
from runner.cloud.provider import OVER
from runner.cloud.provider_errors import ApiDownError, NoCapacityError, NoPodError, StillThereError, TooDearError
from runner.cloud.providers import PRICES, PROVIDERS, cloud_of, connect, name_of, provider_class, provider_of
from runner.cloud.reconcile import UNKNOWN_S, reconcile
from runner.doctor.finding import DoctorTarget
from runner.doctor.system import key_findings
from runner.resolve.plan_inputs import hardware, price_of
from runner.rundir.directory import RunDir
from runner.spec import RentedPlace, RunSpec
from tests.conftest import ROOT
from tests.support.front import runner
from tests.support.memory_cloud import USD, MemoryCloud, account_of
from tests.support.rented import KEY, PLAN, impatient, rented_spec, run_of, states

pytestmark = pytest.mark.usefixtures("state")


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, hello: None) -> MemoryCloud:
    """The cloud, known by the name `memory`; a pod is ready as soon as it has an address."""
    found = MemoryCloud()
    monkeypatch.setitem(PROVIDERS, "memory", account_of(found))
    monkeypatch.setattr("runner.cloud.readiness.LEAST_LOOK_S", 0.2)
    monkeypatch.setattr("runner.cloud.readiness.LOOK_S", 0.2)
    impatient(monkeypatch, 0.5)
    monkeypatch.setattr("runner.cloud.termination.GAP_S", 0.5)
    return found


def spec_there(*words: str) -> RunSpec:
    """A resolved run whose place is the cloud."""
    spec = rented_spec("where.setup_minutes=0.1", *words)
    place = RentedPlace.model_validate({**spec.where.model_dump(), "name": "memory"})
    return spec.model_copy(update={"where": place})


Rent = Callable[..., Lease]


@pytest.fixture
def rent(tmp_path: Path) -> Rent:
    def rented(*words: str, run: RunDir | None = None) -> Lease:
        run = run or run_of(rented_spec(), tmp_path / "runs")
        return rent_pod.acquire(run, spec_there(*words), PLAN, KEY, print, alone_minutes=20)

    return rented


def settle() -> list[str]:
    """Reconcile, as the next command would after this process's end."""
    for entry in Ledger().entries():
        Ledger().leave(entry.name)
    return reconcile(connect("memory"), Ledger())


def test_the_place_names_the_provider(cloud: MemoryCloud) -> None:
    assert provider_of(spec_there()).title == "Memory"


def test_its_key_opens_the_pods_of_its_runs(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    assert ssh_keys.key_pair("run-1", "memory").public.startswith("ssh-ed25519 ")


def test_nothing_outside_asks_for_runpod_where_it_means_a_rented_machine() -> None:
    """Or a second cloud would be planned, checked and launched as if it were this machine."""
    asked = []
    for file in sorted((ROOT / "runner").rglob("*.py")):
        if not {"runpod", "emulator"} & set(file.parts):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                values = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                if isinstance(node, ast.Compare) and "runpod" in values and "RUNPOD_API_KEY" not in ast.unparse(node):
                    asked.append(f"{file.name}: {ast.unparse(node)}")
    assert asked == []


def test_doctor_asks_the_cloud_that_is_rented_from_about_its_key(cloud: MemoryCloud) -> None:
    (told,) = (one for one in key_findings(DoctorTarget(spec_there(), None)) if one.name == "MEMORY_API_KEY")
    assert told.state == "ok" and "accepted" in told.found
    cloud.faults["check_key"] = ["down"]
    (told,) = (one for one in key_findings(DoctorTarget(spec_there(), None)) if one.name == "MEMORY_API_KEY")
    assert told.state == "warning" and "the cloud does not answer" in told.found


def test_from_planned_to_gone(cloud: MemoryCloud, rent: Rent) -> None:
    rented = rent()
    assert cloud.alive() == [rented.pod.id] and rented.usd_per_hour == USD and rented.pod.gpu_id == "CLOUD A"
    rented.mark("RUNNING")
    (row,) = fleet.pod_rows(connect("memory"), Ledger())
    assert (row.pod_id, row.state, row.page) == (rented.pod.id, "RUNNING", f"https://cloud.example/pods/{row.pod_id}")
    rented.release()
    rented.release()  # again is no error
    assert cloud.alive() == [] and Ledger().entries() == []
    expected = ["PLANNED", "CREATING", "PROVISIONING", "SSH_READY", "RUNNING", "TERMINATING", "GONE"]
    assert states(rented.name)[:7] == expected


def test_what_is_not_free_is_passed_over(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"] = ["full"]
    rented = rent()
    assert rented.pod.gpu_id == "CLOUD B"
    rented.release()
    cloud.faults["create"] = ["full", "full"]
    with pytest.raises(NoCapacityError, match="none of these is free now"):
        rent()
    assert cloud.alive() == [] and Ledger().entries() == []


def test_a_create_whose_answer_is_lost_is_found_by_its_name(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"] = ["lost"]
    rented = rent()
    assert cloud.alive() == [rented.pod.id] and "CREATE_UNKNOWN" in states(rented.name)
    assert cloud.calls.count("create") == 1


def test_a_lost_create_and_a_list_that_is_down_are_said(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"], cloud.faults["list"] = ["lost"], ["down"] * 100
    with pytest.raises(StillThereError, match="MAY STILL BE RUNNING") as error:
        rent()
    assert "https://cloud.example/pods/" in str(error.value.problems[0].remedy) and len(cloud.alive()) == 1
    cloud.faults.clear()
    assert "it is ended" in settle()[0] and cloud.alive() == []


def test_a_pod_that_appears_after_it_was_looked_for_is_ended(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"], cloud.faults["list"] = ["lost"], ["ignored"] * 12
    rented = rent()  # another one, under another name
    assert len(cloud.alive()) == 2
    cloud.faults.clear()
    rented.release()
    assert cloud.alive() == []


def test_a_create_that_came_to_nothing_is_forgotten_after_a_while(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"], cloud.faults["list"] = ["lost", "lost", "full"], ["ignored"] * 1000
    with pytest.raises(NoPodError, match="MAY STILL BE RUNNING"):
        rent()
    cloud.faults.clear()
    cloud.rented.clear()
    assert settle() == [] and len(Ledger().entries()) == 2
    for entry in Ledger().entries():
        Ledger().set(entry.name, created=time.time() - UNKNOWN_S - 1)
    assert settle() == [] and Ledger().entries() == []


def test_a_create_that_was_carried_out_twice_leaves_one_pod(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"] = ["double"]
    rented = rent()
    assert cloud.alive() == [rented.pod.id]
    rented.release()
    assert cloud.alive() == []


def test_an_end_that_is_not_done_is_asked_for_again_and_then_loud(cloud: MemoryCloud, rent: Rent) -> None:
    rented = rent()
    cloud.faults["terminate"] = ["down", "ignored", "ignored"]
    rented.release()
    assert cloud.alive() == []
    rented = rent()
    cloud.faults["terminate"] = ["ignored"] * 1000
    with pytest.raises(StillThereError, match="MAY STILL BE RUNNING"):
        rented.release()
    assert states(rented.name)[-1] == "TERMINATING"
    cloud.faults.clear()
    assert rented.pod.id in settle()[0] and cloud.alive() == []


def test_a_pod_that_is_gone_is_told_from_a_cloud_that_is_down(cloud: MemoryCloud, rent: Rent) -> None:
    rented = rent()
    cloud.faults["get"] = ["down"]
    with pytest.raises(ApiDownError):
        rented.refresh()
    assert rented.refresh() is not None
    cloud.rented.clear()
    assert rented.refresh() is None and states(rented.name)[-1] == "PREEMPTED"
    rented.release()
    assert Ledger().entries() == []


def test_the_real_price_is_held_against_the_cap(cloud: MemoryCloud, rent: Rent) -> None:
    cloud.faults["create"] = ["dear"]
    with pytest.raises(TooDearError, match=r"costs \$5.00 an hour, where \$0.50 was offered"):
        rent("where.max_usd=1")
    assert cloud.alive() == [] and Ledger().entries() == []


def test_past_its_deadline_a_pod_that_nobody_holds_is_stopped_with_its_disk(cloud: MemoryCloud, rent: Rent) -> None:
    rented = rent("where.deadline_hours=1")
    rented.mark("RUNNING")
    assert settle() == [] and cloud.alive() == [rented.pod.id]  # its agent ends it in time
    Ledger().set(rented.name, deadline=time.time() - 3600)
    assert "past its deadline" in settle()[0] and [pod.status for pod in cloud.rented.values()] == ["EXITED"]


@pytest.mark.parametrize("die", ["PLANNED", "CREATING", "PROVISIONING", "SSH_READY"])
def test_after_a_launcher_was_killed_the_next_command_ends_its_pod(
    cloud: MemoryCloud, rent: Rent, die: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process goes on in this test; what it would have done after the state was written is not done."""
    move = Ledger.move

    class Killed(BaseException):
        pass

    def moved(self: Ledger, name: str, to: str, why: str, **facts: object) -> None:
        move(self, name, to, why, **facts)
        if to == die and die != "CREATING":
            raise Killed

    with monkeypatch.context() as context:
        context.setattr(Ledger, "move", moved)
        context.setattr("runner.cloud.termination.terminate", lambda *_: None)
        context.setattr("runner.cloud.rent_pod.wait_for_name", lambda *_: [])
        if die == "PLANNED":
            context.setattr(rent_pod._Order, "_afford", lambda *_: _raise(Killed()))
        if die == "CREATING":
            context.setattr(rent_pod._Order, "_create", _killed_in_create(Killed()))
        with pytest.raises(Killed):
            rent()
    assert len(cloud.alive()) == (die != "PLANNED")
    notes = settle()
    assert cloud.alive() == [] and Ledger().entries() == []
    assert ("is ended" in "".join(notes)) == (die != "PLANNED")


def _raise(error: BaseException) -> None:
    raise error


def _killed_in_create(error: BaseException) -> Callable[..., None]:
    def create(order: rent_pod._Order, wanted: rent_pod.PodRequest) -> None:
        order.ledger.move(wanted.name, "CREATING", "asking")
        order.api.create_pod(wanted)
        raise error

    return create


def test_a_stopped_pod_is_kept_and_taken_again(cloud: MemoryCloud, rent: Rent, tmp_path: Path) -> None:
    run = run_of(rented_spec(), tmp_path / "runs")
    rented = rent("where.volume_gb=50", run=run)
    rented.release(keep=True)
    assert [pod.status for pod in cloud.rented.values()] == ["EXITED"] and settle() == []
    again = rent("where.volume_gb=50", run=run)
    assert again.pod.id == rented.pod.id and again.volume_gb == 50
    again.release()
    assert cloud.alive() == []


@pytest.mark.parametrize("damage", ["deleted", "garbage"])
def test_without_its_ledger_a_pod_is_still_found_and_ended(
    cloud: MemoryCloud, rent: Rent, state: Path, damage: str
) -> None:
    rented = rent()
    rented.mark("RUNNING")
    for file in state.glob("ledger.db*"):
        file.unlink()
    if damage == "garbage":
        (state / "ledger.db").write_bytes(os.urandom(8192))
        with pytest.raises(LedgerError):
            rent()
    ledger, _ = Ledger.or_copy()
    assert fleet.terminate(connect("memory"), ledger, rented.run_id) == [rented.pod.id]
    assert all(pod.status in OVER for pod in cloud.rented.values())


def test_a_ledger_that_cannot_be_written_while_renting_leaves_no_pod(
    cloud: MemoryCloud, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    account = provider_class("memory")
    create = account.create_pod

    def created(self: object, wanted: object) -> object:
        monkeypatch.setattr(Ledger, "_set", staticmethod(full))
        return create(self, wanted)

    monkeypatch.setattr(account, "create_pod", created)
    with pytest.raises(LedgerError):
        rent()
    assert cloud.alive() == []


def test_ctrl_c_while_waiting_gives_the_pod_back(
    cloud: MemoryCloud, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rent_pod, "wait_until_ready", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        rent()
    assert cloud.alive() == [] and Ledger().entries() == []


def test_an_account_of_another_cloud_leaves_its_pods_alone(cloud: MemoryCloud, rent: Rent) -> None:
    rented = rent()
    Ledger().set(rented.name, base="https://api.elsewhere.example")
    (note,) = settle()
    assert "another key or address" in note and cloud.alive() == [rented.pod.id]


def test_the_price_is_that_of_the_cloud_of_the_place(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_there()
    assert price_of(spec.hw, spec.where) == (None, None)  # and not RunPod's
    monkeypatch.setitem(PRICES, "memory", lambda hw, place: (USD * hw.num_gpus, "Memory's list"))
    assert price_of(spec.hw, spec.where) == (USD, "Memory's list")
    assert isinstance(spec.where, RentedPlace)
    assert {hw.usd_per_hour for hw in hardware(where=spec.where) if hw.num_gpus == 2} == {2 * USD}
    usd, source = price_of(spec.hw)  # planned for and not rented
    assert usd == spec.hw.usd_per_hour and str(source).startswith("conf/hw")


@pytest.fixture
def only_here(cloud: MemoryCloud, monkeypatch: pytest.MonkeyPatch) -> MemoryCloud:
    """There is no key of RunPod's."""
    monkeypatch.delenv("RUNPOD_API_KEY", raising=False)
    return cloud


@pytest.mark.usefixtures("here")
def test_verbs_that_name_a_run_find_its_cloud(
    only_here: MemoryCloud, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented = rent("where.volume_gb=50")
    rented.mark("RUNNING")
    rented.ledger.leave(rented.name)
    (row,) = json.loads(runner("pods", "--json").stdout)
    assert (row["pod_id"], row["status"]) == (rented.pod.id, "RUNNING")
    stopped = runner("pods", "stop", rented.run_id, "--json")
    assert stopped.exit_code == 0 and json.loads(stopped.stdout)["pod_id"] == rented.pod.id, stopped.output
    status = json.loads(runner("status", rented.run_id, "--json").stdout)
    assert (status["pod_id"], status["pod"]) == (rented.pod.id, "EXITED")
    with monkeypatch.context() as inside:
        inside.chdir(Path("runs") / rented.run_id)
        for words in (".", "spec.json"):
            assert json.loads(runner("status", words, "--json").stdout)["pod_id"] == rented.pod.id
            assert fleet.find_pod(connect("memory"), Ledger(), words)[1] == rented.pod.id
        assert runner("pods", "terminate", "").exit_code == 2 and len(only_here.alive()) == 1
    told = runner("logs", rented.run_id)
    assert told.exit_code == 2 and f"pod {rented.pod.id} is EXITED" in " ".join(told.stderr.split()), told.output
    found = remote_run._adopt(rented.run_id, Path("runs") / rented.run_id)
    assert name_of(found.api) == "memory" and found.pod.id == rented.pod.id
    found.ledger.leave(found.name)
    ended = runner("pods", "terminate", rented.run_id, "--json")
    assert ended.exit_code == 0 and only_here.alive() == [], ended.output
    told_here = Path("runs") / rented.run_id / "spec.json"
    values = json.loads(told_here.read_text("utf-8"))  # the ledger has forgotten the pod: the run's directory tells
    told_here.write_text(json.dumps({**values, "where": {**values["where"], "name": "memory"}}), "utf-8")
    told = runner("fetch", f"runs/{rented.run_id}")
    said = " ".join(told.stderr.split())
    assert told.exit_code == 2 and f"Memory has no pod of run {rented.run_id}" in said
    assert f"runner resume runs/{rented.run_id} continues with what is here" in said


def test_among_several_accounts_the_ledger_and_the_lists_tell(
    cloud: MemoryCloud, rent: Rent, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = MemoryCloud()
    elsewhere = type("Other", (account_of(other),), {"base": "https://localhost/other", "title": "Other"})
    monkeypatch.setitem(PROVIDERS, "other", elsewhere)
    monkeypatch.delitem(PROVIDERS, "runpod")
    rented = rent()
    entries = Ledger().entries()
    assert cloud_of(rented.run_id, entries) == cloud_of(rented.pod.id, []) == cloud_of(rented.run_id, []) == "memory"
    other.rented["podx"] = replace(rented.pod, id="podx", name="runner-run-x-0001")
    assert cloud_of("run-x", entries) == cloud_of("runs/run-x/spec.json", entries) == "other"
    rows = fleet.rows_of_all([connect("memory"), connect("other")], Ledger())
    assert {row.pod_id: row.status for row in rows} == {rented.pod.id: "RUNNING", "podx": "RUNNING"}
