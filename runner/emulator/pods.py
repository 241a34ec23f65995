"""An emulated pod: request, state, cost, and its JSON."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.emulator.answers import Json
from runner.emulator.container import Container
from runner.emulator.settings import Clock, stamp

ACTIONS = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
    "TERMINATED": [],
}
"""What may be asked of a pod, by its status."""
LOG_LINES = 20_000
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass
class Segment:
    """A stretch of billed time."""

    kind: str
    """gpu, cpu or disk."""
    usd_per_hour: float
    start: float
    """On the billing clock, in seconds."""
    end: float | None = None

    def usd(self, now: float, since: float = 0.0) -> float:
        """What it has cost between `since` and `now`."""
        end = now if self.end is None else min(self.end, now)
        return self.usd_per_hour * max(0.0, end - max(self.start, since)) / 3600


@dataclass(frozen=True)
class LogLine:
    """A line of a log."""

    number: int
    time: float
    source: str
    """container or system."""
    text: str


class PodLog:
    """Log of a container and its machine, with a way to wait for more lines."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._numbers = clock, itertools.count(1)
        self._lines: deque[LogLine] = deque(maxlen=LOG_LINES)
        self._lock = threading.Lock()

    def add(self, source: str, text: str) -> None:
        """One more line, now."""
        with self._lock:
            self._lines.append(LogLine(next(self._numbers), self._clock.now(), source, text))

    def lines(self, after: int = 0) -> list[LogLine]:
        """Those with a higher number."""
        with self._lock:
            return [line for line in self._lines if line.number > after]


@dataclass
class Pod:
    """One pod. `config` has image, args, disk, ports, env, registry, mounts as the API shows them."""

    name: str
    config: Json
    cloud: str
    compute: Json
    """`{"gpu": {…}}` or `{"cpu": {…}}`, as the API shows it."""
    usd_per_hour: float
    data_centers: list[str]
    """Where it may be placed."""
    folder: Path
    clock: Clock
    log: PodLog
    public_key: str = ""
    start_jupyter: bool = False
    locked: bool = False
    global_networking: bool = False
    interruptible: bool = False
    id: str = field(default_factory=lambda: "".join(secrets.choice(ALPHABET) for _ in range(14)))
    key: str = field(default_factory=lambda: "rpa_" + secrets.token_hex(20).upper())
    """The key that the pod finds in its environment: for itself only."""
    status: str = "PROVISIONING"
    data_center: str | None = None
    created: float = 0.0
    started: float | None = None
    due: float = 0.0
    """time.monotonic() at which the next status is reached."""
    listed_from: float = 0.0
    """time.monotonic() from which on it is in lists."""
    running_since: float | None = None
    pull_s: float = 0.0
    ssh_delay_s: float = 0.0
    bad_host: bool = False
    no_pull: str | None = None
    """What the registry says, in place of the image."""
    gone: float | None = None
    """When it was terminated, on the billing clock."""
    terminate_at: float | None = None
    """time.monotonic() at which an accepted terminate is carried out."""
    container: Container | None = None
    restarts: int = 0
    events: list[tuple[float, Any]] = field(default_factory=list)
    """(time.monotonic(), Fault): what is going to happen to it."""
    segments: list[Segment] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """Names of the pod in a fault's `pod`."""
        return {self.id, self.name}

    @property
    def gpu_id(self) -> str | None:
        """Type of its GPUs."""
        found: str | None = self.compute.get("gpu", {}).get("id")
        return found

    def persistent(self) -> Json | None:
        """Its volume disk, if it has one."""
        found: Json | None = self.config["mounts"].get("persistent")
        return found

    def network(self) -> Json | None:
        """Its network volume, if it has one."""
        found = self.config["mounts"].get("network")
        return found[0] if found else None

    def bill(self, kind: str, usd_per_hour: float) -> None:
        """Begin a segment."""
        if usd_per_hour > 0:
            self.segments.append(Segment(kind, usd_per_hour, self.clock.billed()))

    def close_bill(self) -> None:
        """End all segments."""
        now = self.clock.billed()
        for segment in self.segments:
            segment.end = now if segment.end is None else segment.end

    def usd(self, *kinds: str) -> float:
        """What it has cost so far; of some kinds of segment, or of all."""
        now = self.clock.billed()
        return sum(s.usd(now) for s in self.segments if not kinds or s.kind in kinds)

    def is_up(self, runtime_s: float) -> bool:
        """Return True if the API knows about the container yet: RUNNING comes first."""
        alive = self.container is not None and self.container.ended is None
        since = self.running_since
        return self.status == "RUNNING" and alive and since is not None and time.monotonic() - since >= runtime_s

    def answer(self, runtime_s: float) -> Json:
        """The schema `Pod`."""
        up = self.is_up(runtime_s)
        return {
            "id": self.id, "name": self.name, **self.config, "status": self.status,
            "actions": ACTIONS[self.status], **self.compute, "cloud": self.cloud, "dataCenterId": self.data_center,
            "cudaVersion": "12.8" if self.data_center and "gpu" in self.compute else None, "ssh": self._ssh(up),
            "template": None, "cost": 0.0 if self.status in ("EXITED", "TERMINATED") else round(self.usd_per_hour, 4),
            "locked": self.locked, "globalNetworking": {"enabled": self.global_networking},
            "runtime": self._runtime() if up else None,
            "createdAt": stamp(self.created), "startedAt": stamp(self.started),
        }  # fmt: skip

    def _ssh(self, up: bool) -> Json:
        proxy = None
        if self.data_center:
            user = f"{self.id}-{self.key[-8:].lower()}"
            proxy = {"host": "ssh.runpod.io", "port": 22, "username": user, "command": f"ssh {user}@ssh.runpod.io"}
        direct = None
        if up and self.container is not None and self.container.ssh_port:
            user, port = self.container.user, self.container.ssh_port
            command = f"ssh {user}@127.0.0.1 -p {port}"
            direct = {"host": "127.0.0.1", "port": port, "username": user, "command": command}
        return {"proxy": proxy, "direct": direct}

    def _runtime(self) -> Json:
        container = self.container
        assert container is not None
        count = self.compute.get("gpu", {}).get("count", 0)
        return {
            "uptime": int(time.monotonic() - container.started),
            "gpus": [{"util": 0, "memoryUtil": 0} for _ in range(count)],
            "cpu": {"util": 1},
            "memory": {"util": 1},
            "ports": [self._port(text, container.ssh_port) for text in self.config["ports"]],
        }

    def _port(self, text: str, ssh_port: int | None) -> Json:
        """22/tcp has a port of its own; the others are the host's, whose network all pods share."""
        number, _, kind = text.partition("/")
        private = int(number)
        public = None if kind == "http" else ssh_port if private == 22 else private
        return {"private": private, "public": public, "type": kind, "ip": None if kind == "http" else "127.0.0.1"}
