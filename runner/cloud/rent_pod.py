"""Rent a pod: recorded first, found again after a lost answer, checked, terminated if unusable.

    PLANNED → CREATING → PROVISIONING → SSH_READY → SYNCED → RUNNING → COLLECTING → TERMINATING → GONE
                  └→ CREATE_UNKNOWN ┘                          └→ PREEMPTED ┘          └→ STOPPED (where.keep)

`acquire` goes as far as SSH_READY; `Lease` (lease.py) is what the rest of a run does with the pod. In a sweep, a pod
whose run has ended well is PARKED, and SSH_READY again under the name of the next run.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from runner.cloud import budget, clock, provider_errors, reuse_pod, termination
from runner.cloud.budget import Meter, deadline_of, hours_of, spent
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Ledger
from runner.cloud.provider import Offer, Pod, PodRequest, Provider, place_of
from runner.cloud.provider_errors import (
    ApiDownError,
    BadHostError,
    NoCapacityError,
    NoPodError,
    StillThereError,
    TooDearError,
    UnclearError,
)
from runner.cloud.providers import provider_of
from runner.cloud.readiness import wait_for_name, wait_until_ready
from runner.cloud.reconcile import reconcile
from runner.config import pod_packages
from runner.errors import CannotRunError, NotYetError, Problem, RunnerError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec

Say = Callable[[str], None]
TRIES_PER_MACHINE = 2  # the second try of a GPU type mostly lands on another host


def acquire(
    run: RunDir, spec: RunSpec, plan: dict[str, object], public_key: str, say: Say, *, detached: bool = False,
    alone_minutes: float | None = None, env: dict[str, str] | None = None,
) -> Lease:  # fmt: skip
    """A pod for a run that answers by SSH, its own stopped one first, or an error with nothing left behind.

    It ends itself if no agent has come after `alone_minutes`, or when the cap is reached if that is sooner. `env` is
    added to the pod's variables: no secret may be in it. Errors before any pod: NoKeyError, WrongKeyError,
    RequestError, NoBalanceError, CannotRunError. After: NoCapacityError and NoPodError where every machine was tried,
    TooDearError, StillThereError where one could not be given back.
    """
    api, ledger = provider_of(spec), Ledger()
    for note in reconcile(api, ledger):
        say(note)
    machines = find_offers(api, spec, plan)
    if (again := reuse_pod.take_stopped(api, ledger, run, spec, machines, say, detached)) is not None:
        return again
    order = _Order(api, ledger, run, spec, public_key, say, detached, alone_minutes, env or {})
    try:
        return _first_of(order, machines)
    except RunnerError as error:
        raise type(error)(*error.problems, *order.unseen()) from None


def find_offers(api: Provider, spec: RunSpec, plan: dict[str, object]) -> list[Offer]:
    """Machines to ask for, best first. Nothing is rented; CannotRunError without ssh, NotYetError for several nodes."""
    source = f"where={spec.where.name}"
    if shutil.which("ssh") is None:
        what = "ssh, by which a run is sent to a pod, is not installed"
        raise CannotRunError(Problem(what, source, "install it: apt-get install openssh-client rsync"))
    if spec.hw.num_nodes > 1:
        what = f"hw.num_nodes={spec.hw.num_nodes}: this version rents one machine for a run"
        raise NotYetError(Problem(what, source, "take one machine with more GPUs, such as hw=h100x8"))
    return api.offers(spec, plan)


def _first_of(order: _Order, machines: list[Offer]) -> Lease:
    failures: list[RunnerError] = []
    for machine in machines:
        for _ in range(TRIES_PER_MACHINE):
            try:
                return order.rent(machine)
            except NoCapacityError as error:
                order.say(f"{machine.described}: none is free")
                failures.append(error)
                break
            except (BadHostError, UnclearError) as error:
                order.say(f"{error}; another one is tried")
                failures.append(error)
    raise _nothing(order.spec, machines, failures)


@dataclass
class _Order:
    """What all pods of one `acquire` share."""

    api: Provider
    ledger: Ledger
    run: RunDir
    spec: RunSpec
    public_key: str
    say: Say
    detached: bool
    alone_minutes: float | None
    env: dict[str, str]
    spent: float = 0.0
    told: tuple[str, float] | None = None
    """Pod and price that were said last."""
    unclear: list[str] = field(default_factory=list)
    """Names for which no pod has appeared yet."""

    def rent(self, machine: Offer) -> Lease:
        """Rent one pod and wait until it is ready. On any later error it is ended."""
        place = place_of(self.spec)
        self.spent = spent(self.ledger, self.run.id)
        name = f"{PREFIX}{self.run.id}-{secrets.token_hex(2)}"
        wanted = self._wanted(name, machine)
        disk = wanted.container_disk_gb + wanted.volume_gb
        self.ledger.plan(
            name, run_id=self.run.id, run_dir=str(self.run.path.absolute()), gpu=machine.gpu_id or machine.cpu_id,
            cloud=machine.cloud, usd_per_hour=machine.usd_per_hour, disk_gb=disk, keep=place.keeps,
            volume=wanted.volume_id, base=self.api.base, account=self.api.account,
            heartbeat_s=None if self.detached else place.heartbeat_minutes * 60,
        )  # fmt: skip
        self._afford(name, machine.usd_per_hour)
        self.say(f"asking for {machine.described}")
        began = clock.now()
        pod = self._create(wanted)
        try:
            meter = Meter(pod.usd_per_hour or machine.usd_per_hour, began, disk, place.max_usd, self.spent)
            deadline = deadline_of(place, meter)
            facts = {"pod_id": pod.id, "usd_per_hour": meter.usd_per_hour, "deadline": deadline}
            self.ledger.move(name, "PROVISIONING", f"created as {pod.id}", **facts)
            rented = Lease(self.api, self.ledger, name, pod, deadline, meter, self.run.id, wanted.volume_gb, self.say)
            self._check_price(rented, machine, pod)
            rented.pod = wait_until_ready(
                self.api, pod, setup_s=place.setup_minutes * 60, bad_host_s=place.bad_host_minutes * 60,
                say=self.say, seen=lambda seen: self._check_price(rented, machine, seen),
            )  # fmt: skip
            _check_place(rented.pod, machine)
            with suppress(ApiDownError):  # looked for again when the run is over
                for double in termination.terminate_duplicates(self.api, pod.id, name):
                    self.say(f"the request was carried out twice: pod {double} is ended")
            self.ledger.move(name, "SSH_READY", f"{rented.pod.ssh_host}:{rented.pod.ssh_port} says hello")
            return rented
        except BaseException as error:
            self._give_back(name, pod, error)
            raise

    def _create(self, wanted: PodRequest) -> Pod:
        """The pod, even if the answer was lost; UnclearError if there is none as far as can be seen."""
        name = wanted.name
        self.ledger.move(name, "CREATING", "asking")
        try:
            return self.api.create_pod(wanted)
        except UnclearError as error:
            self.say(f"{error}: looking for {name}")
            found = self._looked_for(name, str(error))
            for double in found[1:]:
                termination.confirm_gone(self.api, name, double.id)
            if found:
                return found[0]
            self.unclear.append(name)
            raise UnclearError(Problem(f"no pod {name} has appeared")) from None
        except RunnerError as error:  # the provider said no
            self.ledger.try_move(name, "GONE", f"not created: {error}")
            raise
        except BaseException:  # Ctrl-C in the middle of the request
            for pod in self._looked_for(name, "interrupted"):
                termination.terminate(self.api, self.ledger, name, pod.id, "interrupted")
            raise

    def _looked_for(self, name: str, why: str) -> list[Pod]:
        """Pods of a create that was not answered; StillThereError where the provider cannot be asked for them."""
        recorded = self.ledger.try_move(name, "CREATE_UNKNOWN", why)
        try:
            found = wait_for_name(self.api, name)
        except RunnerError as error:
            raise StillThereError(provider_errors.unseen_pod(self.api, name, f"{why}; {error}")) from None
        if not found and not recorded:
            raise StillThereError(
                provider_errors.unseen_pod(self.api, name, f"{why}, and the ledger cannot be written")
            )
        return found

    def unseen(self) -> list[Problem]:
        """Return warnings about pods that may still appear."""
        return [
            provider_errors.unseen_pod(self.api, name, "no pod of that name has appeared so far")
            for name in self.unclear
        ]

    def _give_back(self, name: str, pod: Pod, why: BaseException) -> None:
        """End a pod that is not used; a StillThereError takes the place of the error that led here."""
        reason = str(why) or type(why).__name__
        self.say(f"giving pod {pod.id} back: {reason}")
        for attempt in (1, 2):
            try:
                termination.terminate(self.api, self.ledger, name, pod.id, reason)
                with suppress(ApiDownError):
                    termination.terminate_duplicates(self.api, pod.id, name)
                return
            except KeyboardInterrupt:
                if attempt == 2:
                    raise

    def _wanted(self, name: str, machine: Offer) -> PodRequest:
        place = place_of(self.spec)
        env = {"PUBLIC_KEY": self.public_key, "SSH_KEY": self.public_key, "RUNNER_RUN_ID": self.run.id}
        env["RUNNER_RENTED"] = str(round(clock.now()))
        env["RUNNER_DEADLINE"] = str(round(clock.now() + hours_of(place) * 3600))
        volume_gb = 0 if machine.volume_id or machine.cpu_id else size_or_default(place.volume_gb)
        return PodRequest(
            name=name,
            image=machine.image,
            template=machine.template,
            cloud=machine.cloud,
            gpu_id=machine.gpu_id,
            gpu_count=machine.gpu_count,
            cpu_id=machine.cpu_id,
            num_vcpus=machine.num_vcpus,
            data_centers=machine.data_centers,
            container_disk_gb=size_or_default(place.container_disk_gb),
            volume_gb=volume_gb,
            volume_id=machine.volume_id,
            cuda_versions=() if machine.cpu_id else tuple(place.cuda_versions),
            min_cuda=pod_packages.least_cuda(self.spec),
            env={**env, **self.env},
            args=self._start_command(machine, size_or_default(place.container_disk_gb) + volume_gb),
            bid_usd=place.bid_usd if place.spot else None,
        )

    def _start_command(self, machine: Offer, disk_gb: float) -> str | None:
        """The image's own where the pod may be alone for ever. Afterwards it cannot be told its real price any more."""
        if self.alone_minutes is None:
            return None
        paid = budget.paid_minutes(place_of(self.spec), machine.usd_per_hour, disk_gb, self.spent)
        return self.api.start_command(
            self.run.id, self.alone_minutes if paid is None else min(self.alone_minutes, paid)
        )

    def _afford(self, name: str, usd_per_hour: float) -> None:
        """TooDearError where earlier pods have used the cap up."""
        try:
            budget.check_left(place_of(self.spec), usd_per_hour, self.spent)
        except TooDearError as error:
            self.ledger.move(name, "GONE", error.problems[0].what)
            raise

    def _check_price(self, rented: Lease, machine: Offer, seen: Pod) -> None:
        """The pod's own price against the cap, as soon as it is told: it has been half as high again as the list's."""
        if not seen.usd_per_hour or seen.usd_per_hour == rented.meter.usd_per_hour == machine.usd_per_hour:
            return
        real, place = seen.usd_per_hour, place_of(self.spec)
        if real != rented.meter.usd_per_hour:
            rented.meter.usd_per_hour = real
            rented.deadline = deadline_of(place, rented.meter)
            self.ledger.set(rented.name, usd_per_hour=real, deadline=rented.deadline)
        budget.check_real_price(place, seen.id, real, machine.usd_per_hour, self.spent)
        if real > machine.usd_per_hour * 1.01 and (seen.id, real) != self.told:
            self.told = (seen.id, real)
            self.say(f"pod {seen.id} costs ${real:.2f} an hour, not ${machine.usd_per_hour:.2f} as the catalogue says")


def _check_place(pod: Pod, machine: Offer) -> None:
    """BadHostError for a pod elsewhere than asked for: the data centres of a request may be preferences."""
    if pod.data_center and machine.data_centers and pod.data_center not in machine.data_centers:
        raise BadHostError(Problem(f"pod {pod.id} is in {pod.data_center}, not in {' or '.join(machine.data_centers)}"))


def size_or_default(value: int | str) -> int:
    """A size of a resolved run; what is open still gets 20."""
    return value if isinstance(value, int) else 20


def _nothing(spec: RunSpec, machines: list[Offer], failures: list[RunnerError]) -> RunnerError:
    """Every machine was tried."""
    tried = "; ".join(dict.fromkeys(machine.described for machine in machines))
    remedy = (
        "try again later, name other GPUs (where.gpu_types), or the other cloud (where.cloud): python -m runner gpus"
    )
    if all(isinstance(failure, NoCapacityError) for failure in failures):
        return NoCapacityError(Problem(f"none of these is free now: {tried}", f"where={spec.where.name}", remedy))
    last = failures[-1]
    return NoPodError(Problem(f"no pod became ready: {last}; tried {tried}", f"where={spec.where.name}", remedy))
