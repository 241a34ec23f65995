"""One pod per run: a run that has one gets no second, and a stopped one is started again."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from runner.cloud import clock, ssh, termination
from runner.cloud.budget import Meter, deadline_of, spent
from runner.cloud.errors import BadHostError, CloudError, NoCapacityError, NoKeyError
from runner.cloud.fleet import run_of
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Entry, Ledger
from runner.cloud.provider import OVER, Offer, Pod, Provider, place_of
from runner.cloud.providers import connect
from runner.cloud.readiness import poll_s, until_ready
from runner.cloud.reconcile import ARMED, reconcile
from runner.cloud.transfer import Say
from runner.errors import Problem, RequestError, RunnerError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec

STARTING_S = 120.0
"""For a pod that was told to start to say anything else than that it is stopped."""


def refuse_second(run_id: str, *, rents: bool) -> list[str]:
    """RequestError where a pod has the run already, by ledger or provider; else notes of what was settled.

    `rents`: the run goes on in a pod again, for which a stopped one is no obstacle.
    """
    ledger, _ = Ledger.or_copy()
    notes: list[str] = []
    listed: list[Pod] = []
    if rents:
        try:
            api = connect()
            notes = reconcile(api, ledger)
            listed = api.pods()
        except (NoKeyError, CloudError):  # said when the pod is rented
            pass
    entries = ledger.entries(run_id)
    problems = [problem for entry in entries if (problem := _busy(entry, rents))]
    known = {entry.pod_id for entry in ledger.entries()}
    for pod in listed:
        mine = pod.name.startswith(PREFIX) and run_of(pod) == run_id
        if mine and pod.id not in known and pod.status not in OVER:
            problems.append(_has(run_id, pod.id, f"{pod.status}, rented elsewhere"))
    if problems:
        raise RequestError(*problems)
    return notes


def _busy(entry: Entry, rents: bool) -> Problem | None:
    if entry.owned and not entry.owned_here:
        what = f"{entry.run_id} is at work in pod {entry.pod_id or entry.name}: process {entry.pid} looks after it"
        remedy = f"python -m runner logs {entry.run_id} -f looks on; pods terminate {entry.run_id} ends the pod"
        return Problem(what, "command line", remedy)
    if entry.state in ARMED:
        return _has(entry.run_id, str(entry.pod_id), entry.state.lower())
    if entry.state == "STOPPED" and not rents and not entry.keep:
        what = f"pod {entry.pod_id} has stopped itself with what is newest of {entry.run_id}"
        return Problem(what, "command line", f"python -m runner fetch {entry.run_id}, then resume it")
    return None


def _has(run_id: str, pod_id: str, state: str) -> Problem:
    what = f"{run_id} is in pod {pod_id} ({state}): a second one would do the same again"
    return Problem(what, "command line", f"python -m runner attach {run_id}, or fetch {run_id}")


def taken(
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
        termination.end(api, ledger, entry.name, str(entry.pod_id), "it was kept, and is gone")
        return None
    _check_kind(run, entry, pod, machines)
    before = spent(ledger, run.id)
    name, place = f"{PREFIX}{run.id}-{secrets.token_hex(2)}", place_of(spec)
    own = ledger.hand_over(
        entry.name, name, run_id=run.id, run_dir=str(run.path.absolute()),
        heartbeat_s=None if detached else place.heartbeat_minutes * 60,
    )  # fmt: skip
    if own is None:
        raise RequestError(Problem(f"another command has taken pod {pod.id} of {run.id}", "command line"))
    meter = Meter(entry.usd_per_hour, clock.now(), entry.disk_gb, place.max_usd, before)
    rented = Lease(api, ledger, name, pod, deadline_of(place, meter), meter, run.id, pod.volume_gb, say)
    say(f"Starts  pod {pod.id}, which was kept for {run.id}")
    try:
        ledger.set(name, deadline=rented.deadline, pod_id=pod.id)
        rented.pod = until_ready(
            api, restart(api, pod), setup_s=place.setup_minutes * 60, bad_host_s=place.bad_host_minutes * 60, say=say,
            seen=lambda seen: None,
        )  # fmt: skip
        ledger.move(name, "SSH_READY", f"{rented.pod.ssh_host}:{rented.pod.ssh_port} says hello")
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
    ssh.forget(pod.id)
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


def _check_kind(run: RunDir, entry: Entry, pod: Pod, machines: Sequence[Offer]) -> None:
    for machine in machines:
        if entry.gpu == (machine.gpu_id or machine.cpu_id) and (machine.cpu_id or machine.gpu_count == pod.gpu_count):
            return
    what = f"{run.id} has a stopped pod, {pod.id}, with {pod.gpu_count or ''} {entry.gpu}: not what is asked for"
    remedy = f"python -m runner pods terminate {run.id}, then resume; or ask for what it has"
    raise RequestError(Problem(what, "hw", remedy))
