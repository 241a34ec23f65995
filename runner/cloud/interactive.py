"""Rent a pod without a run: SSH and Jupyter, with the deadline and price guard of a run."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from runner.cloud import budget, clock, pod_shell, ssh_keys
from runner.cloud.lease import Lease
from runner.cloud.provider import Offer, Provider, place_of
from runner.cloud.providers import DEFAULT
from runner.cloud.rent_pod import acquire, find_offers
from runner.cloud.reuse_pod import owner_folder
from runner.cloud.ssh import connection_to
from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.spec.where import LONGEST_HOURS


@dataclass(frozen=True)
class InteractivePod:
    """A pod that is a person's own until its deadline."""

    run_id: str
    pod_id: str
    usd_per_hour: float
    deadline: float
    """Epoch: then it ends itself."""
    jupyter_token: str

    @property
    def described(self) -> str:
        """Instructions for using the pod."""
        jupyter = f"      http://127.0.0.1:8888/?token={self.jupyter_token}"
        return describe(self.pod_id, self.usd_per_hour, self.deadline, "ends", jupyter)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(pod_id: str, usd_per_hour: float, deadline: float, how: str, jupyter: str = "") -> str:
    """Commands for a pod of one's own, with its price and deadline."""
    until = datetime.fromtimestamp(deadline)
    return (
        f"pod {pod_id}, ${usd_per_hour:.2f} an hour, {how} itself at {until:%H:%M on %Y-%m-%d}\n"
        f"  python -m runner pods ssh {pod_id}\n"
        f"  python -m runner pods tunnel {pod_id}{jupyter}\n"
        f"  python -m runner … where={DEFAULT} where.pod={pod_id}\n"
        f"  python -m runner pods terminate {pod_id}"
    )


def check_hours(hours: float) -> None:
    """RequestError for more hours than a year has."""
    if hours > LONGEST_HOURS:
        what = f"--hours {hours:g}: no pod is rented for more than {LONGEST_HOURS} hours, a year"
        raise RequestError(Problem(what, "command line", f"write --hours {LONGEST_HOURS}, or less"))


def spec_for(spec: RunSpec, hours: float) -> RunSpec:
    """A resolved spec, with the hours as its deadline."""
    check_hours(hours)
    return spec.model_copy(update={"where": place_of(spec).model_copy(update={"deadline_hours": hours})})


def first_offer(api: Provider, spec: RunSpec, hours: float) -> Offer:
    """The offer that would be asked for first; CannotRunError where so many hours of it cost more than is allowed."""
    first, *_ = find_offers(api, spec, {})
    budget.check_hours(place_of(spec), first.usd_per_hour, hours)
    return first


def rent_interactive(
    spec: RunSpec, hours: float, say: Callable[[str], None], env: dict[str, str] | None = None
) -> InteractivePod:
    """Rent a pod, put secret variables into its memory, and release it: its start command ends it in time."""
    run_id = f"pod-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    token = secrets.token_urlsafe(12)  # of a server that listens inside the pod alone; nobody's key
    began, pair = clock.now(), ssh_keys.key_pair(run_id, spec.where.name)
    rented = acquire(
        RunDir(owner_folder(run_id)), spec, {"hours": hours}, pair.public, say, detached=True,
        alone_minutes=60 * hours, env={"JUPYTER_PASSWORD": token},
    )  # fmt: skip
    try:
        if env:
            _send_env(rented, pair, env)
        rented.deadline = min(rented.deadline, began + hours * 3600)
        rented.ledger.set(rented.name, deadline=rented.deadline)
        rented.mark("RUNNING", "it is a person's own until its deadline")
        rented.detach()
    except BaseException:
        rented.release()
        raise
    return InteractivePod(run_id, rented.pod.id, rented.usd_per_hour, rented.deadline, token)


def _send_env(rented: Lease, pair: ssh_keys.KeyPair, env: dict[str, str]) -> None:
    """Put variables into the pod's memory."""
    pod = rented.pod
    connection = connection_to(pod, pair.private)
    try:
        pod_shell.place_env(connection, rented.run_id, env)
    finally:
        connection.close()
