"""Adopt the pod of an earlier command, found by the run's id through the API."""

from __future__ import annotations

from pathlib import Path

from runner.cloud import clock
from runner.cloud.budget import Meter
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Entry, Ledger
from runner.cloud.provider import OVER, Pod, Provider
from runner.cloud.providers import connect
from runner.errors import CannotRunError, Problem, RequestError

UNKNOWN_DEADLINE_S = 24 * 3600.0
"""For a pod that this machine's ledger does not know: its agent knows better."""


class NoPodOfRunError(RequestError):
    """The run's pod is gone, or it never had one."""


def run_id_of(words: str) -> str:
    """`runs/<id>`, `runs/<id>/spec.json` or `<id>`."""
    path = Path(words)
    return path.parent.name if path.name == "spec.json" else path.name


def adopt(run_id: str, folder: Path) -> Lease:
    """The run's pod, held by this process. RequestError where there is none, CannotRunError where another command
    holds it."""
    api, (ledger, _) = connect(), Ledger.or_copy()
    pod = _found(api, ledger, run_id)
    own = [entry for entry in ledger.entries(run_id) if entry.pod_id == pod.id]
    entry = own[-1] if own else ledger.entry(pod.name) or _entered(api, ledger, run_id, folder, pod)
    if not ledger.take(entry.name):
        what = f"another command looks after pod {pod.id}: process {entry.pid} on {str(entry.host).partition('|')[0]}"
        raise CannotRunError(Problem(what, run_id, "python -m runner logs -f and status may look on"))
    meter = Meter(entry.usd_per_hour, entry.created, entry.disk_gb)
    deadline = entry.deadline or clock.now() + UNKNOWN_DEADLINE_S
    return Lease(api, ledger, entry.name, pod, deadline, meter, run_id, pod.volume_gb)


def look(run_id: str) -> Pod:
    """The run's pod, and nothing is held. RequestError where there is none."""
    return _found(connect(), Ledger.or_copy()[0], run_id)


def _found(api: Provider, ledger: Ledger, run_id: str) -> Pod:
    """By its name; but a pod that was handed on within a sweep has the name of its first run, and is its last one's."""
    start, entries = f"{PREFIX}{run_id}-", ledger.entries()
    mine, others = ({e.pod_id for e in entries if (e.run_id == run_id) is own} for own in (True, False))
    pods = [p for p in api.pods() if p.status not in OVER and (p.id in mine or p.name.startswith(start))]
    pods = [pod for pod in pods if pod.id not in others]
    if not pods:
        remedy = "resume goes on with what is here; python -m runner pods lists what there is"
        raise NoPodOfRunError(Problem(f"{api.title} has no pod of run {run_id}", "command line", remedy))
    return max(pods, key=lambda pod: pod.created or 0.0)


def _entered(api: Provider, ledger: Ledger, run_id: str, folder: Path, pod: Pod) -> Entry:
    """An entry for a pod that another machine has rented."""
    ledger.plan(
        pod.name, run_id=run_id, run_dir=str(folder.absolute()), gpu=pod.gpu_id, cloud=pod.cloud,
        usd_per_hour=pod.usd_per_hour, disk_gb=pod.volume_gb, keep=False, volume=pod.volume_id, base=api.base,
        account=api.account, heartbeat_s=None,
    )  # fmt: skip
    deadline = clock.now() + UNKNOWN_DEADLINE_S
    why = "rented on another machine"
    ledger.move(pod.name, "RUNNING", why, pod_id=pod.id, deadline=deadline, created=pod.created or clock.now())
    entry = ledger.entry(pod.name)
    assert entry is not None
    return entry
