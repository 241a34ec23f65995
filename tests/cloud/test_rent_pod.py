"""Renting and holding a pod, one decision at a time: what is asked for, recorded, paid, tried again and given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from runner.cloud import clock, rent_pod, termination
from runner.cloud.budget import Meter
from runner.cloud.lease import Lease
from runner.cloud.ledger import NOBODY, PREFIX, Entry, Ledger, LedgerError, owner
from runner.cloud.provider import Offer, Pod, PodRequest
from runner.cloud.provider_errors import (
    ApiDownError,
    BadHostError,
    NoCapacityError,
    NoPodError,
    RefusedError,
    StillThereError,
    TooDearError,
    UnclearError,
    WrongKeyError,
)
from runner.cloud.providers import PROVIDERS
from runner.errors import CannotRunError, NotYetError, Problem
from runner.spec import RentedPlace, RunSpec
from tests.cloud.test_ledger import FACTS
from tests.cloud.test_termination import NAME, Account, Waiting, waiting
from tests.support.rented import PLAN, rented_spec, run_of

__all__ = ["waiting"]
pytestmark = pytest.mark.usefixtures("state")
NOW = 10_000_000.4
A = Offer("floating", 0.5, "CLOUD A", 2, image="debian")
B = Offer("floating", 1.0, "CLOUD B", 1, image="debian", data_centers=("X", "Y"))


class Shop(Account):
    """An account whose offers and answers to a create are the test's: a pod, or an error after it was made or not."""

    def __init__(self) -> None:
        super().__init__()
        self.machines, self.wanted, self.answers = [A, B], list[PodRequest](), list[Any]()
        self.usd, self.at = 0.5, "X"

    def offers(self, spec: RunSpec, plan: dict[str, Any]) -> list[Offer]:
        return self.machines

    def create_pod(self, wanted: PodRequest) -> Pod:
        self.wanted.append(wanted)
        self.asked.append(f"create {wanted.gpu_id or wanted.cpu_id}")
        answer = self.answers.pop(0) if self.answers else None
        made = [] if isinstance(answer, NoCapacityError | RefusedError) else [self._new(wanted)]
        if answer == "double":
            self._new(wanted)
        elif isinstance(answer, BaseException):
            raise answer
        return made[0]

    def _new(self, wanted: PodRequest) -> Pod:
        return self.add(
            f"pod{len(self.cloud.rented) + 1}", wanted.name, usd_per_hour=self.usd, volume_gb=wanted.volume_gb,
            data_center=self.at, created=NOW,
        )  # fmt: skip

    def time(self) -> float | None:
        return NOW


@cache
def spec_of(*words: str) -> RunSpec:
    """A resolved run whose place is the shop; 60 GB of volume disk."""
    spec = rented_spec("where.volume_gb=60", "where.deadline_hours=3", *words)
    place = RentedPlace.model_validate({**spec.where.model_dump(), "name": "shop"})
    return spec.model_copy(update={"where": place})


class Renting:
    """One run that rents, and what it was told."""

    def __init__(self, shop: Shop, folder: Path) -> None:
        self.shop, self.folder, self.said = shop, folder, list[str]()
        self.run = run_of(rented_spec(), folder)

    def rent(self, *words: str, **options: Any) -> Lease:
        return rent_pod.acquire(self.run, spec_of(*words), PLAN, "ssh-ed25519 A", self.said.append, **options)

    def entry(self, name: str | None = None) -> Entry:
        found = Ledger().entries(self.run.id, gone=True)
        return next(one for one in found if name in (None, one.name))

    def states(self, name: str) -> list[tuple[str, str]]:
        return [(new, why) for _, new, why in Ledger().transitions(name)]


@pytest.fixture
def shop(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> Shop:
    found = Shop()
    monkeypatch.setitem(PROVIDERS, "shop", lambda: found)  # type: ignore[arg-type]  # no path of a class
    monkeypatch.setattr("runner.cloud.readiness.says_hello", lambda host, port: True)
    monkeypatch.setattr(clock, "now", lambda: NOW)
    return found


@pytest.fixture
def renting(shop: Shop, tmp_path: Path) -> Renting:
    return Renting(shop, tmp_path / "runs")


# ── what is asked for ──────────────────────────────────────────────────────────────────────────


def test_a_pod_is_asked_for_with_all_that_the_run_says(renting: Renting) -> None:
    renting.shop.machines = [replace(A, image=None, template="t1", data_centers=("X",))]
    words = ("where.cuda_versions=['12.8']", "where.max_usd=9")
    rented = renting.rent(*words, env={"OWN": "1"}, alone_minutes=40.0)
    (wanted,) = renting.shop.wanted
    assert wanted == PodRequest(
        rented.name, None, "floating", gpu_id="CLOUD A", gpu_count=2, num_vcpus=0, template="t1", data_centers=("X",),
        container_disk_gb=20, volume_gb=60, cuda_versions=("12.8",), min_cuda=wanted.min_cuda,
        ports=("22/tcp",), args=f"end-after 40.0 {renting.run.id}",
        env={"PUBLIC_KEY": "ssh-ed25519 A", "SSH_KEY": "ssh-ed25519 A", "RUNNER_RUN_ID": renting.run.id,
             "RUNNER_RENTED": "10000000", "RUNNER_DEADLINE": "10010800", "OWN": "1"},
    )  # fmt: skip
    assert rented.name.startswith(f"{PREFIX}{renting.run.id}-") and len(rented.name.rpartition("-")[2]) == 4


def test_a_pod_without_gpus_or_with_a_network_volume_has_no_disk_of_its_own(renting: Renting) -> None:
    cpu = Offer("secure", 0.1, cpu_id="cpu3c", num_vcpus=4, image="debian")
    for machine in (cpu, replace(A, volume_id="v1")):
        renting.shop.machines = [machine]
        rented = renting.rent("where.cuda_versions=['12.8']")
        wanted, entry = renting.shop.wanted[-1], renting.entry(rented.name)
        assert (wanted.volume_gb, wanted.volume_id, rented.volume_gb) == (0, machine.volume_id, 0)
        assert wanted.cuda_versions == (() if machine is cpu else ("12.8",)) and wanted.num_vcpus == machine.num_vcpus
        assert (entry.disk_gb, entry.volume) == (20, machine.volume_id)
        assert entry.gpu == ("cpu3c" if machine is cpu else "CLOUD A")
        assert wanted.args is None  # it may be alone for as long as it likes
        assert rent_pod.size_or_default(7) == 7 and rent_pod.size_or_default("auto") == 20


def test_a_bid_is_that_of_a_spot_machine(renting: Renting) -> None:
    renting.rent("where.spot=true", "where.bid_usd=0.2")
    assert renting.shop.wanted[-1].bid_usd == 0.2
    renting.rent()
    assert renting.shop.wanted[-1].bid_usd is None


def test_a_pod_that_nobody_comes_to_ends_before_the_cap(renting: Renting) -> None:
    rate = Meter(0.5, 0.0, 80.0).rate
    renting.rent("where.max_usd=0.6", alone_minutes=999.0)
    said = str(renting.shop.wanted[-1].args).split()
    assert float(said[1]) == pytest.approx(0.6 / rate * 60)


# ── what is recorded and paid ──────────────────────────────────────────────────────────────────


def test_a_pod_is_recorded_from_before_it_is_asked_for(renting: Renting) -> None:
    rented = renting.rent("where.max_usd=5", "where.heartbeat_minutes=7")
    entry = renting.entry()
    own: Any = owner()
    assert entry == Entry(
        rented.name, renting.run.id, str(renting.run.path.absolute()), "SSH_READY", "pod1", "CLOUD A", "floating", 0.5,
        80, NOW + 3 * 3600, 420.0, NOW, NOW, None, "host:22 says hello", False, None, renting.shop.base,
        renting.shop.account, *own.values(),
    )  # fmt: skip
    assert renting.states(rented.name) == [
        ("PLANNED", "planned"), ("CREATING", "asking"), ("PROVISIONING", "created as pod1"),
        ("SSH_READY", "host:22 says hello"),
    ]  # fmt: skip
    assert rented.meter == Meter(0.5, NOW, 80, 5.0, 0.0) and rented.deadline == entry.deadline
    assert (rented.run_id, rented.volume_gb, rented.pod.id) == (renting.run.id, 60, "pod1")
    assert renting.said[0] == f"asking for {A.described}"
    renting.rent("where.keep=true", detached=True)
    entry = renting.entry(Ledger().entries()[-1].name)
    assert entry.heartbeat_s is None and entry.keep


def test_earlier_pods_of_the_run_are_paid_from_the_same_cap(renting: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    first = renting.rent("where.max_usd=1")
    first.release()
    ledger = Ledger()
    ledger.set(first.name, created=NOW - 3600, ended=NOW)
    paid = Meter(0.5, 0.0, 80.0).rate
    second = renting.rent("where.max_usd=1")
    assert second.meter.before_usd == pytest.approx(paid)
    assert second.cap_usd == pytest.approx(1 - paid)
    assert second.deadline == pytest.approx(NOW + (1 - paid) / paid * 3600)
    second.release()
    ledger.set(second.name, created=NOW - 3600, ended=NOW)
    renting.shop.asked.clear()
    with pytest.raises(TooDearError, match=r"of where.max_usd=1 are spent"):
        renting.rent("where.max_usd=1")
    assert renting.shop.times("create") == 0
    last = ledger.entries(renting.run.id, gone=True)[-1]
    assert last.state == "GONE" and "are spent" in last.detail


@pytest.mark.parametrize(
    ("usd", "cap", "outcome"),
    [
        (0.5, 1.0, ""), (0.504, 1.0, ""), (0.506, 1.0, "said"), (1.0, 1.0, "said"), (1.01, 1.0, "refused"),
        (0.4, 1.0, ""), (5.0, None, "said"), (0.0, 1.0, ""),
    ],
)  # fmt: skip
def test_the_pods_own_price_is_what_counts(renting: Renting, usd: float, cap: float | None, outcome: str) -> None:
    renting.shop.usd = usd
    words = () if cap is None else (f"where.max_usd={cap}",)
    if outcome == "refused":
        with pytest.raises(TooDearError, match=r"pod pod1 costs \$1.01 an hour, where \$0.50 was offered"):
            renting.rent(*words)
        assert renting.shop.cloud.rented == {} and renting.said[-1].startswith("giving pod pod1 back: pod pod1 costs")
        return
    rented = renting.rent(*words)
    real, entry = usd or 0.5, renting.entry()
    assert rented.usd_per_hour == entry.usd_per_hour == real and rented.deadline == entry.deadline
    assert rented.deadline == min(NOW + 3 * 3600, rented.meter.ends() or 1e99)
    told = [line for line in renting.said if "catalogue" in line]
    expected = f"pod pod1 costs ${real:.2f} an hour, not $0.50 as the catalogue says"
    assert told == ([expected] if outcome == "said" else [])


def test_a_price_that_changes_while_it_is_waited_for_is_the_new_one(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices = [0.6, 0.6, 0.7, 0.0, 0.4]

    def ready(api: Any, pod: Pod, *, seen: Callable[[Pod], None], **_: Any) -> Pod:
        for usd in prices:
            seen(replace(pod, usd_per_hour=usd))
        return pod

    monkeypatch.setattr(rent_pod, "wait_until_ready", ready)
    renting.shop.usd = 0.0  # not said yet
    rented = renting.rent("where.max_usd=0.7")
    assert rented.usd_per_hour == renting.entry().usd_per_hour == 0.4
    assert rented.deadline == renting.entry().deadline == rented.meter.ends()
    assert [line[15:20] for line in renting.said if "catalogue" in line] == ["$0.60", "$0.70"]


# ── what goes wrong ────────────────────────────────────────────────────────────────────────────


def test_a_machine_that_is_not_free_is_asked_for_once_and_a_bad_one_twice(renting: Renting) -> None:
    full = NoCapacityError(Problem("none is free"))
    renting.shop.answers = [full]
    assert renting.rent().pod.id == "pod1" and renting.said[1] == f"{A.described}: none is free"
    renting.shop.answers = [full, full]
    with pytest.raises(NoCapacityError) as error:
        renting.rent()
    (problem,) = error.value.problems
    assert problem.what == f"none of these is free now: {A.described}; {B.described}" and problem.source == "where=shop"
    assert str(problem.remedy).startswith("try again later, name other GPUs (where.gpu_types)")
    assert [one[7:] for one in renting.shop.asked if one.startswith("create")] == ["CLOUD A", "CLOUD B"] * 2
    states = renting.states(Ledger().entries(renting.run.id, gone=True)[-1].name)
    assert states[-1] == ("GONE", "not created: none is free")


def test_a_pod_that_does_not_become_ready_is_given_back_and_another_one_tried(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[tuple[float, float]] = []

    def bad(api: Any, pod: Pod, *, setup_s: float, bad_host_s: float, **_: Any) -> Pod:
        bounds.append((setup_s, bad_host_s))
        raise BadHostError(Problem(f"pod {pod.id} is bad"))

    monkeypatch.setattr(rent_pod, "wait_until_ready", bad)
    renting.shop.machines = [A, A]
    with pytest.raises(NoPodError) as error:
        renting.rent("where.setup_minutes=5", "where.bad_host_minutes=2")
    (problem,) = error.value.problems
    expected = f"no pod became ready: pod pod1 is bad; tried {A.described}"
    assert (problem.what, problem.source) == (expected, "where=shop")
    assert str(problem.remedy).startswith("try again later, name other GPUs (where.gpu_types)")
    assert bounds == [(300, 120)] * 4 and renting.shop.cloud.rented == {}
    assert renting.said.count("pod pod1 is bad; another one is tried") == 4
    assert all(entry.state == "GONE" for entry in Ledger().entries(renting.run.id, gone=True))


def test_what_no_other_machine_would_change_is_raised_at_once(renting: Renting) -> None:
    renting.shop.answers = [RefusedError(Problem("such a request is wrong"))]
    with pytest.raises(RefusedError, match="such a request is wrong"):
        renting.rent()
    assert renting.shop.times("create") == 1 and renting.entry().state == "GONE"


def test_a_pod_elsewhere_than_asked_for_is_given_back(renting: Renting) -> None:
    renting.shop.machines = [B]
    assert renting.rent().pod.id == "pod1"
    renting.shop.at = "Z"
    with pytest.raises(NoPodError, match="pod pod2 is in Z, not in X or Y"):
        renting.rent()
    assert [*renting.shop.cloud.rented] == ["pod1"]
    renting.shop.at = ""  # it is not said
    renting.rent()
    renting.shop.machines, renting.shop.at = [A], "Z"
    renting.rent()  # anywhere


def test_a_create_that_was_not_answered_is_looked_for_by_its_name(renting: Renting) -> None:
    renting.shop.answers = [UnclearError(Problem("the answer was lost"))]
    rented = renting.rent()
    assert renting.shop.times("create") == 1 and [*renting.shop.cloud.rented] == ["pod1"]
    assert ("CREATE_UNKNOWN", "the answer was lost") in renting.states(rented.name)
    assert f"the answer was lost: looking for {rented.name}" in renting.said


def test_of_a_create_that_was_carried_out_twice_one_pod_is_left(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    renting.shop.answers = ["double"]
    assert renting.rent().pod.id == "pod1" and [*renting.shop.cloud.rented] == ["pod1"]
    renting.shop.cloud.faults["list"] = ["down"]  # looked for again when the run is over
    renting.rent().release()
    assert "the request was carried out twice: pod pod2 is ended" in renting.said
    lost = UnclearError(Problem("the answer was lost"))
    new = Shop._new

    def twice(self: Shop, wanted: PodRequest) -> Pod:
        new(self, wanted)
        return new(self, wanted)

    monkeypatch.setattr(Shop, "_new", twice)
    renting.shop.answers = [lost]
    rented = renting.rent()
    assert [*renting.shop.cloud.rented] == ["pod1", rented.pod.id]


def test_a_create_of_which_nothing_appears_is_tried_again_and_said(renting: Renting, waiting: Waiting) -> None:
    lost = UnclearError(Problem("the answer was lost"))
    renting.shop.machines, renting.shop.answers = [A], [lost, lost]
    renting.shop.cloud.faults["list"] = ["ignored"] * 999
    with pytest.raises(NoPodError) as error:
        renting.rent()
    first, *unseen = error.value.problems
    names = [wanted.name for wanted in renting.shop.wanted]
    assert len(names) == 2 and [problem.what.split()[1] for problem in unseen] == names
    assert first.what.startswith(f"no pod became ready: no pod {names[1]} has appeared; tried")
    assert "no pod of that name has appeared so far" in unseen[0].what
    assert [entry.state for entry in Ledger().entries(renting.run.id)] == ["CREATE_UNKNOWN"] * 2


def test_a_lost_create_that_cannot_be_looked_for_or_recorded_is_said(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = UnclearError(Problem("the answer was lost"))
    renting.shop.answers, renting.shop.cloud.faults["list"] = [lost], ["down"] * 999
    with pytest.raises(StillThereError, match="is not known: the answer was lost; the cloud does not answer") as error:
        renting.rent()
    assert f"POD {renting.shop.wanted[-1].name} MAY" in str(error.value)
    renting.shop.answers, renting.shop.cloud.faults["list"] = [lost], ["ignored"] * 999
    monkeypatch.setattr(Ledger, "try_move", lambda *_, **__: False)
    with pytest.raises(StillThereError, match="the answer was lost, and the ledger cannot be written") as error:
        renting.rent()
    assert f"POD {renting.shop.wanted[-1].name} MAY" in str(error.value)


def interrupted_ends(monkeypatch: pytest.MonkeyPatch) -> list[KeyboardInterrupt]:
    """Interrupts of the next requests to terminate: one, and those that are added."""
    end, interrupts = termination.terminate, [KeyboardInterrupt()]

    def terminate(*words: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        end(*words)

    monkeypatch.setattr(termination, "terminate", terminate)
    return interrupts


def test_ctrl_c_leaves_no_pod(renting: Renting, monkeypatch: pytest.MonkeyPatch) -> None:
    renting.shop.answers = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        renting.rent()
    states = renting.states(renting.entry().name)
    assert renting.shop.cloud.rented == {} and states[-1] == ("GONE", "interrupted; confirmed")
    assert ("CREATE_UNKNOWN", "interrupted") in states
    interrupts = interrupted_ends(monkeypatch)
    monkeypatch.setattr(rent_pod, "wait_until_ready", lambda *_, **__: _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        renting.rent()  # a second Ctrl-C while it is given back: once more
    assert renting.shop.cloud.rented == {} and renting.said[-1] == "giving pod pod1 back: KeyboardInterrupt"
    interrupts += [KeyboardInterrupt(), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        renting.rent()
    assert interrupts == [] and len(renting.shop.cloud.rented) == 1


def test_two_interrupts_while_a_bad_pod_is_given_back_rent_no_other_one(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = interrupted_ends(monkeypatch)
    interrupts.append(KeyboardInterrupt())
    bad = BadHostError(Problem("pod pod1 is bad"))
    monkeypatch.setattr(rent_pod, "wait_until_ready", lambda *_, **__: _raise(bad))
    with pytest.raises(KeyboardInterrupt):
        renting.rent()
    assert renting.shop.times("create") == 1


def test_a_pod_that_cannot_be_recorded_any_more_is_said_where_the_renting_was(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented = renting.rent()
    monkeypatch.setattr(Ledger, "move", lambda *_, **__: _raise(LedgerError(Problem("the disk is full"))))
    rented.mark("RUNNING")
    assert "AND COST MONEY: python -m runner pods terminate pod1" in renting.said[-1]


def test_the_runs_own_stopped_pod_is_taken_before_another_is_asked_for(renting: Renting) -> None:
    renting.shop.machines = [replace(A, gpu_count=1)]
    renting.rent("where.keep=true").release(keep=True)
    again = renting.rent("where.keep=true")
    assert (again.pod.id, again.pod.status) == ("pod1", "RUNNING") and renting.shop.times("create") == 1


def _raise(error: BaseException) -> None:
    raise error


def test_nothing_is_asked_for_without_ssh_or_for_several_machines(
    renting: Renting, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = spec_of().model_copy(update={"hw": spec_of().hw.model_copy(update={"num_nodes": 2})})
    with pytest.raises(NotYetError, match=r"hw.num_nodes=2: this version rents one machine") as error:
        rent_pod.find_offers(renting.shop, several, PLAN)
    assert error.value.problems[0].source == "where=shop"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CannotRunError, match="is not installed") as without:
        rent_pod.find_offers(renting.shop, spec_of(), PLAN)
    assert "apt-get install openssh-client" in str(without.value.problems[0].remedy)
    assert renting.shop.asked == []


# ── a pod that is held ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def lease(shop: Shop, tmp_path: Path) -> Lease:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.plan(NAME, run_id="a", **FACTS)
    ledger.move(NAME, "RUNNING", "training", pod_id="pod1")
    meter = Meter(0.5, NOW - 3600, 0.0, 2.0, 0.25)
    return Lease(shop, ledger, NAME, shop.add(), NOW + 10, meter, "a", 50.0, shop.asked.append)


def state_of(lease: Lease) -> str:
    found = lease.ledger.entry(NAME)
    assert found is not None
    return found.state


def test_what_a_held_pod_costs(lease: Lease) -> None:
    assert lease.usd_per_hour == 0.5 and lease.usd() == 0.75 and lease.cap_usd == 1.75
    lease.meter.cap_usd = None
    assert lease.cap_usd is None and lease.kept_usd_per_day() == pytest.approx(50 * 0.2 / 730 * 24)


def test_a_state_that_cannot_be_recorded_is_said_with_the_command_that_ends_the_pod(
    lease: Lease, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease.mark("COLLECTING")
    assert lease.ledger.transitions(NAME)[-1] == ("RUNNING", "COLLECTING", "collecting") and shop.asked == []
    full = LedgerError(Problem("the disk is full", None, "make room"))
    monkeypatch.setattr(Ledger, "move", lambda *_, **__: _raise(full))
    lease.mark("RUNNING")
    first, second = shop.asked
    assert first == "Warning: the disk is full. Should this command be killed, POD pod1 MAY STILL BE RUNNING"
    assert second == "         AND COST MONEY: python -m runner pods terminate pod1. The ledger: make room"


def test_a_held_pod_is_gone_when_it_is_absent_three_times(lease: Lease, shop: Shop, waiting: Waiting) -> None:
    shop.pods = lambda: []  # type: ignore[method-assign]  # for this test
    for looks, there in (("p", True), ("x", True), ("ap", True), ("aap", True), ("apx", True), ("aaa", False)):
        shop.looks = looks
        found = lease.refresh()
        assert (found is not None) is there and shop.looks == ""
        assert found is None or found is lease.pod
        assert lease.pod.status == ("EXITED" if looks.endswith("x") else "RUNNING" if there else "EXITED")
    assert lease.ledger.transitions(NAME)[-1] == ("RUNNING", "PREEMPTED", "it vanished")


def test_a_pod_whose_last_look_finds_nothing_is_as_it_was_seen_last(lease: Lease, shop: Shop) -> None:
    shop.pods = lambda: []  # type: ignore[method-assign]  # for this test
    shop.looks = "apa"
    assert lease.refresh() is lease.pod and state_of(lease) == "RUNNING"


def test_a_key_is_refused_three_times_before_a_run_ends_for_it(lease: Lease, shop: Shop, waiting: Waiting) -> None:
    shop.looks = "kkp"
    assert lease.refresh() is not None and waiting.waits == [5.0, 5.0]
    assert shop.asked == ["look k", "look k", "look p"]  # the third look finds it: no second one is needed
    shop.looks = "kkk"
    with pytest.raises(WrongKeyError):
        lease.refresh()
    assert waiting.waits == [5.0] * 4
    shop.looks = "e"
    with pytest.raises(ApiDownError):
        lease.refresh()
    shop.base, shop.looks = "http://127.0.0.1:1", "kp"
    lease.refresh()
    assert waiting.waits[4:] == [0.25]


def test_what_a_lost_create_brings_forth_while_a_run_trains_is_ended(lease: Lease, shop: Shop) -> None:
    for run_id in ("a", "b"):
        lease.ledger.plan(f"runner-{run_id}-2", run_id=run_id, **FACTS)
        lease.ledger.move(f"runner-{run_id}-2", "CREATE_UNKNOWN", "lost", **NOBODY)
        shop.add(f"pod-{run_id}", f"runner-{run_id}-2")
    assert lease.refresh() is not None and sorted(shop.cloud.rented) == ["pod-b", "pod1"]


def test_a_lost_create_is_looked_for_a_minute_longer_when_the_run_is_over(
    lease: Lease, shop: Shop, waiting: Waiting
) -> None:
    lease.ledger.plan("runner-a-2", run_id="a", **FACTS)
    lease.ledger.move("runner-a-2", "CREATE_UNKNOWN", "lost", **NOBODY)
    assert lease.refresh() is not None and waiting.now == 0
    lease.release()
    assert waiting.now >= 60


@pytest.mark.parametrize("keep", [False, True])
def test_a_held_pod_is_given_back_with_its_doubles_and_lost_creates(
    lease: Lease, shop: Shop, waiting: Waiting, keep: bool
) -> None:
    lease.ledger.plan("runner-a-2", run_id="a", **FACTS)
    lease.ledger.move("runner-a-2", "CREATE_UNKNOWN", "lost", **NOBODY)
    shop.add("pod2")
    shop.add("pod3", "runner-a-2")
    shop.add("pod4", "runner-b-1")
    lease.ledger.plan("runner-b-1", run_id="b", **FACTS)
    lease.ledger.move("runner-b-1", "CREATE_UNKNOWN", "lost", **NOBODY)  # another run's, for its launcher to find
    lease.release(keep)
    assert sorted(shop.cloud.rented) == (["pod1", "pod4"] if keep else ["pod4"])
    assert state_of(lease) == ("STOPPED" if keep else "GONE")
    entry = lease.ledger.entry(NAME)
    assert entry is not None and entry.pid is None and entry.detail.startswith("the run is over; ")
    lease.release(keep)  # again is no error


def test_one_interrupt_does_not_leave_a_pod_behind_and_two_do(
    lease: Lease, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = interrupted_ends(monkeypatch)
    lease.release()
    assert shop.cloud.rented == {}
    interrupts += [KeyboardInterrupt(), KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        lease.release()
    assert interrupts == []


def test_a_list_that_is_down_at_the_end_is_left_to_the_next_command(
    lease: Lease, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(termination, "terminate_duplicates", lambda *_: _raise(ApiDownError(Problem("down"))))
    lease.release()
    entry = lease.ledger.entry(NAME)
    assert entry is not None and entry.pid is None


def test_a_pod_that_is_left_to_its_agent_waits_for_no_launcher(lease: Lease) -> None:
    lease.detach()
    entry = lease.ledger.entry(NAME)
    assert entry is not None and (entry.heartbeat_s, entry.pid, entry.state) == (None, None, "RUNNING")
