"""A cloud in this process's memory: a `Provider` from outside of the package, with faults on demand.

    cloud = MemoryCloud()
    cloud.faults["create"] = ["lost"]     # the next create is carried out, and not answered

`MemoryAccount` is the provider; each command connects anew, so that what is rented is kept in `MemoryCloud`.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from runner.cloud.provider import OVER, Offer, Pod, PodRequest, Provider
from runner.cloud.provider_errors import ApiDownError, NoCapacityError, UnclearError
from runner.errors import Problem
from runner.spec import RunSpec

USD = 0.5
OFFERS = (
    Offer("floating", USD, "CLOUD A", 1, image="debian"),
    Offer("floating", 2 * USD, "CLOUD B", 1, image="debian"),
)


@dataclass
class MemoryCloud:
    """What its accounts share: the pods, and what goes wrong next."""

    rented: dict[str, Pod] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Method → its next faults: `lost`, `double`, `full`, `down`, `ignored`, `dear`."""
    calls: list[str] = field(default_factory=list)
    ids: Iterator[int] = field(default_factory=itertools.count)

    def fault(self, method: str) -> str:
        """The next fault of a method; ApiDownError for one that is down."""
        self.calls.append(method)
        found = self.faults[method].pop(0) if self.faults[method] else ""
        if found == "down":
            raise ApiDownError(Problem("the cloud does not answer"))
        return found

    def alive(self) -> list[str]:
        """Ids of pods that cost something."""
        return [pod.id for pod in self.rented.values() if pod.status not in OVER]


class MemoryAccount:
    """One account of it: the whole of what a provider has to do."""

    title, key_variable, billing_page = "Memory", "MEMORY_API_KEY", "https://cloud.example/billing"
    base, account, secret = "https://localhost/cloud", "account", "secret"
    calls: ClassVar[dict[str, Any]] = {
        "id": "MEMORY_POD_ID",
        "key": "MEMORY_POD_KEY",
        "default_base": base,
        "path": "/pods/{id}",
    }
    cloud: MemoryCloud

    def check_key(self, spec: RunSpec) -> None:
        self.cloud.fault("check_key")

    def offers(self, spec: RunSpec, plan: dict[str, Any]) -> list[Offer]:
        return list(OFFERS)

    def create_pod(self, wanted: PodRequest) -> Pod:
        fault = self.cloud.fault("create")
        if fault == "full":
            raise NoCapacityError(Problem("none is free"))
        for _ in range(2 if fault == "double" else 1):
            made = self._made(wanted, USD * (10 if fault == "dear" else 1))
        if fault == "lost":
            raise UnclearError(Problem("the answer was lost"))
        return made

    def _made(self, wanted: PodRequest, usd: float) -> Pod:
        made = Pod(
            f"pod{next(self.cloud.ids)}", wanted.name, "RUNNING", usd, wanted.gpu_id, wanted.gpu_count, wanted.cloud,
            None, str(wanted.image), "127.0.0.1", 22, time.time(), "machine", wanted.volume_id,
            volume_gb=wanted.volume_gb, env=wanted.env,
        )  # fmt: skip
        self.cloud.rented[made.id] = made
        return made

    def pods(self) -> list[Pod]:
        return [] if self.cloud.fault("list") == "ignored" else list(self.cloud.rented.values())

    def pod(self, pod_id: str) -> Pod | None:
        self.cloud.fault("get")
        return self.cloud.rented.get(pod_id)

    def terminate(self, pod_id: str) -> None:
        if self.cloud.fault("terminate") != "ignored":
            self.cloud.rented.pop(pod_id, None)

    def stop(self, pod_id: str) -> None:
        self.cloud.fault("stop")
        self.cloud.rented[pod_id] = replace(self.cloud.rented[pod_id], status="EXITED", usd_per_hour=0.0)

    def start(self, pod_id: str) -> None:
        self.cloud.fault("start")
        self.cloud.rented[pod_id] = replace(self.cloud.rented[pod_id], status="RUNNING", usd_per_hour=USD)

    def start_command(self, run_id: str, minutes: float) -> str:
        return f"end-after {minutes} {run_id}"

    def time(self) -> float | None:
        return time.time()

    def logs(self, pod_id: str, *, source: str | None = None, tail: int = 100, follow: bool = False) -> Iterator[str]:
        yield from ()

    def balance(self) -> float | None:
        return None

    def page(self, pod_id: str | None = None) -> str:
        return f"https://cloud.example/pods/{pod_id or ''}"


def account_of(cloud: MemoryCloud) -> type[Provider]:
    """The class that `PROVIDERS` has for a cloud."""
    return type("Memory", (MemoryAccount,), {"cloud": cloud})
