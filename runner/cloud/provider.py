"""`Provider`: the calls that renting needs from a cloud, and the records they exchange.

A class with these methods is a cloud; `providers.py` names it. Everything else in this folder (ledger, renting,
budget, transfer, the agent in the pod) is written against it alone. A provider raises the errors of
`provider_errors.py`, and translates its own words: a pod's `status` is one of those below, a price is in US$, a time in
seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from runner.spec import RentedPlace, RunSpec

OVER = ("TERMINATED",)
"""Statuses in which a pod is as good as gone: it costs nothing and cannot come back."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A rented machine (a container with GPUs) as the provider described it last."""

    id: str
    name: str
    status: str
    """PROVISIONING, STARTING, RUNNING, EXITED (stopped, its disk is kept), ERROR or TERMINATED."""
    usd_per_hour: float
    """Of all its GPUs; 0 while it is stopped."""
    gpu_id: str | None
    gpu_count: int
    cloud: str
    """The part of the provider's offer it is from, such as `secure` or `community`."""
    data_center: str | None
    image: str
    ssh_host: str | None
    ssh_port: int | None
    """Both None until port 22 is mapped; they may change with every restart."""
    created: float | None
    """By the provider's clock."""
    machine_id: str | None
    """Known once a machine was assigned: until then nothing happens on it."""
    volume_id: str | None
    """Network volume."""
    ssh_user: str = "root"
    started: float | None = None
    """When it was started last, by the provider's clock."""
    disk_gb: float = 0.0
    """Of the container."""
    volume_gb: float = 0.0
    """Of its own volume disk, which outlives a stop; 0 without one."""
    num_vcpus: int | None = None
    """Of a pod without GPUs."""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def has_machine(self) -> bool:
        """A pod without one for minutes is on a bad host."""
        return self.machine_id is not None or self.status in ("STARTING", "RUNNING")


@dataclass(frozen=True, slots=True)
class Offer:
    """A machine that can be asked for, with what is to run on it."""

    cloud: str
    usd_per_hour: float
    """Of all its GPUs, as the provider's catalogue says it."""
    gpu_id: str | None = None
    gpu_count: int = 0
    cpu_id: str | None = None
    num_vcpus: int = 0
    data_centers: tuple[str, ...] = ()
    """Any of these; empty means anywhere."""
    image: str | None = None
    template: str | None = None
    """The provider's template, in place of an image."""
    volume_id: str | None = None
    """Network volume to mount, in place of a disk of its own."""

    @property
    def described(self) -> str:
        """`3 × NVIDIA H100 80GB HBM3 in EU-RO-1 (secure cloud, $9.87 an hour)`."""
        what = f"{self.gpu_count} × {self.gpu_id}" if self.gpu_id else f"{self.cpu_id} with {self.num_vcpus} vCPUs"
        place = f" in {' or '.join(self.data_centers)}" if self.data_centers else ""
        return f"{what}{place} ({self.cloud} cloud, ${self.usd_per_hour:.2f} an hour)"


@dataclass(frozen=True, slots=True)
class PodRequest:
    """A pod to ask for: either GPUs or a CPU flavour, either an image or a template.

    A provider without templates, bids or network volumes raises RefusedError where one is named.
    """

    name: str
    """Unique: by it a pod is found again whose create was never answered."""
    image: str | None
    cloud: str
    gpu_id: str | None = None
    gpu_count: int = 1
    cpu_id: str | None = None
    num_vcpus: int = 2
    template: str | None = None
    data_centers: tuple[str, ...] = ()
    container_disk_gb: int = 20
    volume_gb: int = 0
    volume_id: str | None = None
    cuda_versions: tuple[str, ...] = ()
    """Exactly these of the host's driver; empty means any since the image's own, where its tag says which that is."""
    min_cuda: str | None = None
    """CUDA version that the host's driver has to serve for the run's packages, whatever the image needs."""
    ports: tuple[str, ...] = ("22/tcp",)
    env: dict[str, str] = field(default_factory=dict)
    """Seen by whoever may look at the pod: never a secret."""
    args: str | None = None
    """Start command, in place of the image's own."""
    bid_usd: float | None = None
    """Bid per GPU and hour, for an interruptible machine."""


class Provider(Protocol):
    """One account of one cloud.

    Every method may raise ApiDownError, where the provider was not reached after several tries, and WrongKeyError; no
    wait is without a bound. WrongKeyError never means that a pod is gone.
    """

    title: str
    """Its name in messages."""
    key_variable: str
    """Environment variable with the account's key: it is never sent into a pod."""
    billing_page: str
    """Address where a person adds funds."""
    base: str
    """Address of its API, which the ledger keeps with every pod."""
    calls: dict[str, Any]
    """How a pod ends itself, as `CALLS` of `agent/agent.py`: variables that have its id and key, and requests."""
    account: str
    """Fingerprint of the key, which the ledger keeps with every pod."""

    @property
    def secret(self) -> str:
        """The account's key, from which the SSH keys of its runs are derived."""

    def check_key(self, spec: RunSpec) -> None:
        """WrongKeyError where the key may not do what the run needs, as far as that can be asked without renting."""

    def offers(self, spec: RunSpec, plan: dict[str, object]) -> list[Offer]:
        """Machines for a run, best first; RequestError and CannotRunError say why there is none. Nothing is rented."""

    def create_pod(self, wanted: PodRequest) -> Pod:
        """Ask for a pod, once. NoCapacityError where none is free; UnclearError where the answer was lost: it may
        exist, or appear later, under the name that was asked for."""

    def pods(self) -> list[Pod]:
        """Every pod of the account, of this project or not."""

    def pod(self, pod_id: str) -> Pod | None:
        """One pod; None only where the provider itself says that there is none."""

    def terminate(self, pod_id: str) -> None:
        """Ask for its end; one that is gone already is no error. Accepted is not done: the caller looks afterwards."""

    def stop(self, pod_id: str) -> None:
        """Stop it and keep its volume disk; one that is stopped already is no error."""

    def start(self, pod_id: str) -> None:
        """Start a stopped pod: NoCapacityError where its machine has no GPU left."""

    def start_command(self, run_id: str, minutes: float) -> str:
        """Start command that ends the pod after so many minutes without an agent, starts the agent again after a
        restart of the container, and ends the pod where the agent falls silent."""

    def time(self) -> float | None:
        """The provider's own clock; None where it does not say."""

    def logs(self, pod_id: str, *, source: str | None = None, tail: int = 100, follow: bool = False) -> Iterator[str]:
        """Lines of the container's log, or of the `system` that pulls its image; nothing where there is no log."""

    def balance(self) -> float | None:
        """Account balance in US$; None where it is not known."""

    def page(self, pod_id: str | None = None) -> str:
        """Address where a person sees and ends a pod, or all pods."""


def place_of(spec: RunSpec) -> RentedPlace:
    """The part `where` of a run that is rented."""
    assert isinstance(spec.where, RentedPlace)
    return spec.where


def gpu_id_of(spec: RunSpec) -> str | None:
    """Return the provider's id of the GPU of `hw`: the key `hw.<provider>_gpu_id`."""
    found: str | None = getattr(spec.hw, f"{spec.where.name}_gpu_id", None)
    return found
