"""State of an emulated RunPod: one account with its keys, pods and volumes."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json
from runner.emulator.engine import Engine
from runner.emulator.faults import EVENTS, Fault, Faults
from runner.emulator.pods import ALPHABET, Pod
from runner.emulator.settings import Clock, Settings


@dataclass(frozen=True)
class Exchange:
    """A request that was made, and what it was answered."""

    method: str
    path: str
    query: str
    body: Any
    status: int
    """0: the connection was closed without an answer."""
    answer: Any
    media_type: str = ""
    faulty: bool = False
    """It was answered so by a fault."""


@dataclass
class World:
    """State of the emulator; the pods are the engine's."""

    root: Path
    settings: Settings = field(default_factory=Settings)
    clock: Clock = field(default_factory=Clock)
    faults: Faults = field(default_factory=Faults)
    ssh_keys: list[str] = field(default_factory=list)
    volumes: dict[str, Json] = field(default_factory=dict)
    volume_since: dict[str, float] = field(default_factory=dict)
    """When each network volume's bill began, on the billing clock."""
    templates: dict[str, Json] = field(default_factory=dict)
    endpoints: dict[str, Json] = field(default_factory=dict)
    exchanges: deque[Exchange] = field(default_factory=lambda: deque(maxlen=10_000))

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.engine = Engine(self.root, self.settings, self.clock, self.faults)

    def pod(self, identity: str) -> Pod:
        """404 where there is none."""
        pod = self.engine.pods.get(identity)
        if pod is None:
            raise ApiProblem(404, "pod not found")
        return pod

    def pod_of_key(self, key: str) -> Pod | None:
        """The pod whose own key it is."""
        return next((pod for pod in list(self.engine.pods.values()) if secrets.compare_digest(pod.key, key)), None)

    def inject(self, fault: Fault) -> list[str]:
        """Put a fault in force; for an event that struck pods which are there, their ids."""
        if fault.kind == "skew":
            self.clock.skew_s = fault.seconds
            return []
        self.faults.add(fault)
        return self.engine.happen(fault) if fault.kind in EVENTS else []

    def billed(self, pod_id: str | None = None) -> float:
        """US$ so far: of one pod, dead or alive, or of everything."""
        if pod_id is None:
            return self.engine.usd() + sum(self.volume_usd(volume) for volume in self.volumes)
        pods = [*self.engine.pods.values(), *self.engine.past]
        return sum(pod.usd() for pod in pods if pod_id in (pod.id, pod.name))

    def volume_usd(self, volume: str) -> float:
        """Return the cost of a network volume so far."""
        content = self.volumes[volume]
        kind = "network" if content["type"] == "STANDARD" else "network_high_performance"
        hours = (self.clock.billed() - self.volume_since[volume]) / 3600
        return hardware_catalog.storage_usd_per_hour(kind, content["size"]) * hours

    def close(self) -> None:
        """End every pod."""
        self.engine.close()


def new_id(length: int = 10) -> str:
    """Return a random id in RunPod's format."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
