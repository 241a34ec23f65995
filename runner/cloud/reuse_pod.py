"""Reuse of existing pods: a run's own stopped one, `where.pod`, and `pods start`.

A pod is taken in one transaction of the ledger, so that it has one owner; its dead-man's switch then holds the new
order before anything is sent. A person's own running pod is theirs again after the run; whatever goes wrong, a pod is
stopped, and its disk is kept.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.cloud import budget, clock, fleet, handover, pod_shell, ssh, ssh_keys, termination, transfer
from runner.cloud.budget import Meter, deadline_of, spent
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Entry, Ledger
from runner.cloud.provider import OVER, Offer, Pod, Provider, gpu_id_of, place_of
from runner.cloud.provider_errors import BadHostError, NoCapacityError
from runner.cloud.providers import name_of, provider_of
from runner.cloud.readiness import poll_s, wait_until_ready
from runner.cloud.session import Session
from runner.cloud.transfer import PodRunFolder, Say
from runner.errors import Problem, RequestError, RunFailedError, RunnerError
from runner.paths import state_dir
from runner.rundir.directory import RunDir, display_path
from runner.spec import RentedPlace, RunSpec

OWN = "-own-"
LEAST_S = 60.0
"""A pod that ends itself sooner is not handed back."""
SETUP_S, BAD_HOST_S = 20 * 60.0, 3 * 60.0
"""For a pod of a person's own, as `where.setup_minutes` and `where.bad_host_minutes` by default."""
STARTING_S = 120.0
"""For a pod that was told to start to say anything else than that it is stopped."""


@dataclass(frozen=True)
class ReusablePod:
    """A pod that may be taken."""

    entry: Entry
    pod: Pod

    @property
    def described(self) -> str:
        """Description for the question before renting."""
        state = "stopped" if self.entry.state == "STOPPED" else "running"
        return f"pod {self.pod.id} ({state}), {self.pod.gpu_count or ''} {self.entry.gpu}".replace("  ", " ")


def owner_folder(run_id: str) -> Path:
    """Return the ledger's run directory for a pod without a run."""
    return state_dir() / "pods" / run_id


def find_named(api: Provider, ledger: Ledger, spec: RunSpec, own: str | None = None) -> ReusablePod:
    """The pod that `where.pod` names; `own` is the run that takes it.

    RequestError for one that is not there, at work, or of another kind.
    """
    place = place_of(spec)
    source = f"where.pod={place.pod}"
    name, pod_id, run_id = fleet.find_pod(api, ledger, str(place.pod))
    entry, pod = ledger.entry(name), api.pod(pod_id)
    if entry is None or pod is None:
        what, remedy = f"pod {pod_id} was rented from another machine", "use it there; or stop it: pods stop, and again"
        raise RequestError(Problem(what, source, f"{remedy}: python -m runner pods stop {pod_id}"))
    if entry.owned and not entry.owned_here:
        what = f"{run_id} is running in pod {pod_id}: process {entry.pid} follows it"
        raise RequestError(Problem(what, source, f"python -m runner logs {run_id} -f looks on; leave out where.pod"))
    if entry.state == "STOPPED":
        if pod.status != "EXITED":
            raise RequestError(Problem(f"pod {pod_id} is {pod.status}, and not stopped", source, "try again"))
        over = RunDir(Path(entry.run_dir)).state() in ("done", "failed", "interrupted")
        if run_id != own and not _is_a_persons(entry) and not over:
            what = f"pod {pod_id} has what is newest of {run_id}, which is not here"
            raise RequestError(Problem(what, source, f"python -m runner fetch {run_id} brings it, and ends the pod"))
    elif entry.state != "RUNNING" or not _is_a_persons(entry):
        what = f"{run_id} is in pod {pod_id} ({entry.state.lower()})"
        raise RequestError(Problem(what, source, f"python -m runner attach {run_id}, or fetch {run_id}, first"))
    _check_kind(spec, entry, pod, source)
    return ReusablePod(entry, pod)


def take_named(run: RunDir, spec: RunSpec, pair: ssh_keys.KeyPair, say: Say, detached: bool) -> Lease:
    """The pod that `where.pod` names, started if it was stopped, serving this run from here on.

    Errors as `find` has them, NoCapacityError or BadHostError where it does not start, TooDearError over the cap.
    """
    api, ledger, place = provider_of(spec), Ledger(), place_of(spec)
    found = find_named(api, ledger, spec, run.id)
    old = found.entry
    rented = _taken(
        api, ledger, found, run.id, run.path.absolute(), say, place.max_usd, spent(ledger, run.id),
        None if detached else 60 * place.heartbeat_minutes,
    )  # fmt: skip
    rented.deadline = deadline_of(place, rented.meter)
    rented.before = old if old.state == "RUNNING" and place.keep is None else None
    say(f"Takes   {found.described}, of {old.run_id}")
    try:
        ledger.set(rented.name, deadline=rented.deadline, keep=place.keeps)
        if old.state == "STOPPED":
            start_again(rented, place, say)
        budget.check_taken(place, rented.pod.id, rented.usd_per_hour, rented.meter.before_usd)
        _hand_on(rented, old, Session(run, spec, rented, pair, say), detached)
        return rented
    except BaseException:
        rented.release(keep=True)
        raise


def hand_back(session: Session) -> float | None:
    """Make a person's own running pod theirs again, under its former deadline, which is returned. None where there is
    nothing to hand back, its time is over, or the pod does not take the order: then it is to be stopped."""
    rented, at = session.rented, session.at
    old, now = rented.before, clock.now()
    if old is None or at is None or old.deadline is None or old.deadline < now + LEAST_S:
        return None
    run_id = f"{old.run_id.partition(OWN)[0]}{OWN}{secrets.token_hex(2)}"  # the first part still finds it
    name = f"{PREFIX}{run_id}-{secrets.token_hex(2)}"
    order = transfer.agent_order(
        run_id, rented.pod.id, deadline=old.deadline, started=now, usd_per_hour=rented.usd_per_hour, budget_usd=None,
        heartbeat_minutes=None, boarding_minutes=None, keep=old.keep, uncollected="stop" if old.keep else "terminate",
        public_key=ssh_keys.key_pair(run_id, name_of(rented.api)).public, calls=rented.api.calls,
    )  # fmt: skip
    try:
        there = PodRunFolder(at.connection, at.workspace, run_id)
        _scripts(there)
        handover.serve_next(at, there, order | {"fresh": False})
        at.connection.run(f"rm -f /dev/shm/runner-{shlex.quote(session.run.id)}.env", check=False)
        rented.ledger.move(rented.name, "PARKED", "handed back", deadline=old.deadline)
        rented.ledger.hand_over(rented.name, name, run_id=run_id, run_dir=str(owner_folder(run_id)), heartbeat_s=None)
        rented.ledger.set(name, deadline=old.deadline, keep=old.keep)
        rented.ledger.move(name, "RUNNING", "it is a person's own until its deadline")
        rented.ledger.leave(name)
    except RunnerError as error:
        rented.say(f"Pod {rented.pod.id} could not be handed back, and is stopped: {error}")
        return None
    return old.deadline


def start(api: Provider, ledger: Ledger, word: str, hours: float, say: Say, env: dict[str, str]) -> Lease:
    """Start a stopped pod for a person: it ends itself after so many hours, stopped. RequestError for one that runs."""
    name, pod_id, run_id = fleet.find_pod(api, ledger, word)
    entry, pod = ledger.entry(name), api.pod(pod_id)
    if entry is None:
        entry = fleet.adopt(api, ledger, pod_id, run_id)
    if pod is None or pod.status != "EXITED":
        what = f"pod {pod_id} is {pod.status.lower() if pod else 'gone'}, and not stopped"
        raise RequestError(Problem(what, "command line", f"python -m runner pods ssh {pod_id}"))
    if entry.state != "STOPPED":
        ledger.move(entry.name, "STOPPED", "as the provider says")
        ledger.leave(entry.name)
    rented = _taken(api, ledger, ReusablePod(entry, pod), run_id, owner_folder(run_id), say, None, 0.0, None)
    rented.deadline = clock.now() + 3600 * hours
    try:
        ledger.set(rented.name, deadline=rented.deadline, keep=True)
        start_again(rented, None, say)
        at = transfer.login(rented.pod, run_id, ssh_keys.key_pair(run_id, name_of(api)), say)
        try:
            order = transfer.agent_order(
                run_id, rented.pod.id, deadline=rented.deadline, started=rented.meter.started,
                usd_per_hour=rented.usd_per_hour, budget_usd=None, heartbeat_minutes=None, boarding_minutes=None,
                keep=True, uncollected="stop", calls=api.calls,
            )  # fmt: skip
            transfer.arm_agent(at, order | {"fresh": False}, say)
            if env:
                pod_shell.place_env(at.connection, run_id, env)
        finally:
            at.connection.close()
        rented.mark("RUNNING", "it is a person's own until its deadline")
        rented.detach()
        return rented
    except BaseException:
        rented.release(keep=True)
        raise


def _is_a_persons(entry: Entry) -> bool:
    """Of `pods up` or `pods start`: no run's result is in it that nobody has."""
    return Path(entry.run_dir or "/").parent == state_dir() / "pods"


def _check_kind(spec: RunSpec, entry: Entry, pod: Pod, source: str) -> None:
    """RequestError for a pod without what the plan counts on."""
    hw, place = spec.hw, place_of(spec)
    wanted = place.gpu_types or ([own] if (own := gpu_id_of(spec)) else [])
    gpus = hw.num_gpus if hw.accelerator == "cuda" else 0
    if gpus and (entry.gpu not in wanted or pod.gpu_count != gpus):
        has = f"{pod.gpu_count or 'no'} × {entry.gpu}"
        what = f"pod {pod.id} has {has}, and the run needs {gpus} × {' or '.join(wanted)}"
        raise RequestError(Problem(what, source, "name the hardware that it has: hw=…"))


def _taken(
    api: Provider, ledger: Ledger, found: ReusablePod, run_id: str, folder: Path, say: Say, cap: float | None,
    before: float, heartbeat_s: float | None,
) -> Lease:  # fmt: skip
    """The pod, owned by this process from here on; RequestError where another one was faster."""
    entry, pod = found.entry, found.pod
    name = f"{PREFIX}{run_id}-{secrets.token_hex(2)}"
    own = ledger.hand_over(
        entry.name, name, run_id=run_id, run_dir=str(folder), heartbeat_s=heartbeat_s, running=_is_a_persons(entry)
    )
    if own is None:
        raise RequestError(Problem(f"another command has taken pod {pod.id}", "command line"))
    meter = Meter(entry.usd_per_hour, clock.now(), entry.disk_gb, cap, before)
    return Lease(api, ledger, name, pod, clock.now() + 3600, meter, run_id, pod.volume_gb, say)


def start_again(rented: Lease, place: RentedPlace | None, say: Say) -> None:
    """Start a stopped pod, until it answers; its real price from then on, and the deadline where the cap is reached."""
    setup, bad = (60 * place.setup_minutes, 60 * place.bad_host_minutes) if place else (SETUP_S, BAD_HOST_S)
    pod = restart(rented.api, rented.pod)
    rented.pod = wait_until_ready(rented.api, pod, setup_s=setup, bad_host_s=bad, say=say, seen=lambda seen: None)
    if rented.pod.usd_per_hour and rented.pod.usd_per_hour != rented.meter.usd_per_hour:
        rented.meter.usd_per_hour = rented.pod.usd_per_hour
        rented.deadline = deadline_of(place, rented.meter) if place else rented.deadline
        rented.ledger.set(rented.name, usd_per_hour=rented.pod.usd_per_hour, deadline=rented.deadline)


def _hand_on(rented: Lease, old: Entry, new: Session, detached: bool) -> None:
    """Have the pod's switch serve the new run. One that has none, of `pods up`, gets it where the pod's start command
    looks for it after a restart."""
    at = transfer.login(rented.pod, old.run_id, ssh_keys.key_pair(old.run_id, name_of(rented.api)), rented.say)
    try:
        if old.run_id == new.run.id:  # the order of its own folder is renewed as the run is sent
            return
        order = new.order(detached)
        if at.connection.attempt(f"test -e {shlex.quote(at.folder)}/agent.json")[0]:
            _scripts(at)
            at.place("agent.json", order | {"run_id": old.run_id, "public_key": None})
        there = PodRunFolder(at.connection, at.workspace, new.run.id)
        handover.serve_next(at, there, order)
        at.connection.run(f"rm -f /dev/shm/runner-{shlex.quote(old.run_id)}.env", check=False)
    finally:
        at.connection.close()


def _scripts(at: PodRunFolder) -> None:
    """Send the agent to a folder that has none yet."""
    at.connection.run(f"mkdir -p {shlex.quote(at.folder)}/logs")
    at.connection.put([Path(str(module.__file__)) for module in transfer.SCRIPTS], f"{at.folder}/")


def unavailable_error(run: RunDir, pod: str) -> RunFailedError:
    """A pod that was named is not replaced by another one."""
    what = f"pod {pod} was named by where.pod, and no other one is rented in its place"
    remedy = f"python -m runner resume {shlex.quote(display_path(run.path))} where.pod=null rents one"
    return RunFailedError(Problem(what, f"where.pod={pod}", remedy))


def take_stopped(
    api: Provider, ledger: Ledger, run: RunDir, spec: RunSpec, machines: Sequence[Offer], say: Say, detached: bool
) -> Lease | None:
    """The run's stopped pod, started; None where it has none. RequestError for one of another kind than is asked for,
    NoCapacityError where its host has no GPU left. Whatever goes wrong, it is stopped again, and its disk is kept.
    """
    stopped = [entry for entry in ledger.entries(run.id) if entry.state == "STOPPED" and entry.pod_id]
    if not stopped:
        return None
    entry = stopped[-1]
    pod = api.pod(str(entry.pod_id))
    if pod is None or pod.status in OVER:
        termination.terminate(api, ledger, entry.name, str(entry.pod_id), "it was kept, and is gone")
        return None
    _check_same_machine(run, entry, pod, machines)
    place = place_of(spec)
    rented = _taken(
        api, ledger, ReusablePod(entry, pod), run.id, run.path.absolute(), say, place.max_usd, spent(ledger, run.id),
        None if detached else 60 * place.heartbeat_minutes,
    )  # fmt: skip
    rented.deadline = deadline_of(place, rented.meter)
    say(f"Starts  pod {pod.id}, which was kept for {run.id}")
    try:
        ledger.set(rented.name, deadline=rented.deadline)
        start_again(rented, place, say)
        ledger.move(rented.name, "SSH_READY", f"{rented.pod.ssh_host}:{rented.pod.ssh_port} says hello")
        return rented
    except BaseException as error:
        rented.release(keep=True)
        if isinstance(error, (NoCapacityError, BadHostError)):
            remedy = f"try again later; or python -m runner pods terminate {run.id}, and resume in another pod"
            raise NoCapacityError(Problem(f"pod {pod.id} of {run.id} does not start: {error}", None, remedy)) from None
        raise


def restart(api: Provider, pod: Pod) -> Pod:
    """Start a stopped pod; the pod as soon as it is not said to be stopped any more. Its container, and with it its
    host key, is made anew."""
    ssh.forget_host_key(pod.id)
    api.start(pod.id)
    end = time.monotonic() + STARTING_S
    while time.monotonic() < end:
        try:
            found = api.pod(pod.id)
        except RunnerError:  # asked again
            found = pod
        if found is None or found.status != "EXITED":
            return found or pod
        time.sleep(poll_s(api))
    raise BadHostError(Problem(f"it is still stopped after {STARTING_S:.0f} s"))


def _check_same_machine(run: RunDir, entry: Entry, pod: Pod, machines: Sequence[Offer]) -> None:
    for machine in machines:
        if entry.gpu == (machine.gpu_id or machine.cpu_id) and (machine.cpu_id or machine.gpu_count == pod.gpu_count):
            return
    what = f"{run.id} has a stopped pod, {pod.id}, with {pod.gpu_count or ''} {entry.gpu}: not what the run needs"
    remedy = f"python -m runner pods terminate {run.id}, then resume; or ask for what it has"
    raise RequestError(Problem(what, "hw", remedy))
