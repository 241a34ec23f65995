"""State of an emulated RunPod: one account with its keys, pods and volumes, and the engine that moves the pods on.

The engine has statuses, containers, events and bills in its hands: one thread, 50 times a second.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json
from runner.emulator.container import Container, free_port
from runner.emulator.faults import EVENTS, Fault, Faults
from runner.emulator.pods import ALPHABET, Pod
from runner.emulator.settings import Clock, Settings

TICK_S = 0.02
PULL_AGAIN_S = 5.0
"""A host whose pull was refused tries again and again."""


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
        return sum(pod.usd() for pod in self.engine.all_pods() if pod_id in (pod.id, pod.name))

    def volume_usd(self, volume: str) -> float:
        """Return the cost of a network volume so far."""
        content = self.volumes[volume]
        kind = "network" if content["type"] == "STANDARD" else "network_high_performance"
        hours = (self.clock.billed() - self.volume_since[volume]) / 3600
        return hardware_catalog.storage_usd_per_hour(kind, content["size"]) * hours

    def clear(self) -> None:
        """Remove all faults."""
        self.faults.clear()
        self.clock.skew_s = 0.0

    def close(self) -> None:
        """End every pod."""
        self.engine.close()


def volume_folder(root: Path, identity: str) -> Path:
    """Return the local folder of a network volume."""
    return root / "volumes" / identity


def new_id(length: int = 10) -> str:
    """Return a random id in RunPod's format."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


class Engine:
    """Owns the pods. Every public method may be called from any thread."""

    def __init__(self, root: Path, settings: Settings, clock: Clock, faults: Faults) -> None:
        self.root, self.settings, self.clock, self.faults = root, settings, clock, faults
        self.base_url = ""
        self.lock = threading.RLock()
        self.pods: dict[str, Pod] = {}
        self.past: list[Pod] = []
        """Terminated ones, for their bills."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="emulated pods", daemon=True)
        self._thread.start()

    # --- what the API asks for

    def add(self, pod: Pod) -> Pod:
        """A new pod begins to be provisioned."""
        now = time.monotonic()
        price = self.faults.take("price", **_facts(pod))
        if price:
            pod.usd_per_hour *= price.factor
        late = self.faults.take("late_listing", **_facts(pod))
        pod.listed_from = now + (late.seconds if late else 0.0)
        pod.bad_host = self.faults.take("bad_host", **_facts(pod)) is not None
        slow = self.faults.take("slow_pull", **_facts(pod))
        pod.pull_s = slow.seconds if slow else self.settings.pull_s
        if refused := self.faults.take("no_pull", **_facts(pod)):
            image = pod.config["image"]
            pod.no_pull = refused.detail or f"manifest for {image} not found: manifest unknown: manifest unknown"
        silent = self.faults.take("no_ssh", **_facts(pod))
        pod.ssh_delay_s = 1e6 if silent else self.settings.ssh_delay_s
        pod.created, pod.due = self.clock.now(), now + self.settings.provision_s
        pod.log.add("system", f"create pod {pod.name}")
        with self.lock:
            self.pods[pod.id] = pod
        return pod

    def stop(self, pod: Pod) -> None:
        """Release the machine; only volumes stay."""
        with self.lock:
            self._end_container(pod, wipe=True)
            pod.close_bill()
            pod.status, pod.running_since = "EXITED", None
            if persistent := pod.persistent():
                pod.bill("disk", hardware_catalog.storage_usd_per_hour("stopped", persistent["size"]))
            pod.log.add("system", "stop container")

    def start(self, pod: Pod) -> None:
        """Start an EXITED pod on the same machine, whose GPUs may be taken."""
        facts = _facts(pod) | {"data_center": {pod.data_center}}
        if fault := self.faults.take("no_capacity", on={"start"}, **facts):
            message = "There are not enough free GPUs on the host machine to start this pod."
            raise ApiProblem(400, fault.detail or message)
        with self.lock:
            pod.close_bill()
            pod.status, pod.due = "PROVISIONING", time.monotonic() + self.settings.provision_s
            pod.log.add("system", "start container")

    def restart(self, pod: Pod) -> None:
        """The container in place; with a new port, since those change."""
        with self.lock:
            self._end_container(pod, wipe=True)
            pod.restarts += 1
            pod.log.add("system", "restart container")
            self._launch(pod)

    def terminate(self, pod: Pod) -> None:
        """The end, unless a fault keeps it alive behind a good answer."""
        if fault := self.faults.take("undead", **_facts(pod)):
            if fault.seconds:
                pod.terminate_at = time.monotonic() + fault.seconds
            return
        self.remove(pod)

    def remove(self, pod: Pod) -> None:
        """Delete a pod and its disks, but not its network volume."""
        with self.lock:
            if self.pods.pop(pod.id, None) is None:
                return
            self._end_container(pod, wipe=False)
            pod.close_bill()
            pod.status, pod.gone = "TERMINATED", self.clock.billed()
            self.past.append(pod)
        shutil.rmtree(pod.folder, ignore_errors=True)

    def happen(self, fault: Fault) -> list[str]:
        """Let an event come over the pods that match now, `seconds` from now; their ids."""
        with self.lock:
            pods = [pod for pod in self.pods.values() if fault.matches(_facts(pod))]
            for pod in pods[: fault.times or None]:
                fault.used += 1
                pod.events.append((time.monotonic() + fault.seconds, fault))
        return [pod.id for pod in pods]

    def all_pods(self) -> list[Pod]:
        """Return ended pods, then existing ones."""
        with self.lock:
            return [*self.past, *self.pods.values()]

    def usd(self, *kinds: str) -> float:
        """Return the cost of all pods, ended ones included."""
        return sum(pod.usd(*kinds) for pod in self.all_pods())

    @property
    def closing(self) -> bool:
        """The emulator is being ended."""
        return self._closing.is_set()

    def close(self) -> None:
        """End every pod and the thread."""
        self._closing.set()
        self._thread.join()
        with self.lock:
            for pod in self.pods.values():
                self._end_container(pod, wipe=False)

    # --- what happens by itself

    def _run(self) -> None:
        while not self._closing.wait(TICK_S):
            with self.lock:
                for pod in list(self.pods.values()):
                    self._advance(pod, time.monotonic())
                if self.usd() > self.settings.balance_usd:
                    self._broke()

    def _advance(self, pod: Pod, now: float) -> None:
        if pod.terminate_at is not None and now >= pod.terminate_at:
            self.remove(pod)
        elif pod.status == "PROVISIONING" and now >= pod.due and not pod.bad_host:
            self._place(pod, now)
        elif pod.status == "STARTING" and now >= pod.due and pod.no_pull is not None:
            pod.due = now + PULL_AGAIN_S
            pod.log.add("system", f"error pulling image: Error response from daemon: {pod.no_pull}")
        elif pod.status == "STARTING" and now >= pod.due:
            pod.log.add("system", f"start container for {pod.config['image']}: begin")
            pod.status, pod.started = "RUNNING", self.clock.now()
            self._launch(pod)
            while fault := self.faults.take("restart", "preempt", "vanish", **_facts(pod)):
                pod.events.append((now + fault.seconds, fault))
        elif pod.status == "RUNNING":
            self._look_after(pod, now)
        for due, fault in [event for event in pod.events if now >= event[0]]:
            pod.events.remove((due, fault))
            self._strike(pod, fault, now)

    def _place(self, pod: Pod, now: float) -> None:
        """A machine is found, and the bill begins."""
        pod.data_center = pod.data_center or pod.data_centers[0]
        pod.status, pod.due = "STARTING", now + pod.pull_s
        pod.bill("gpu" if "gpu" in pod.compute else "cpu", pod.usd_per_hour)
        disks = pod.config["disk"] + (pod.persistent() or {"size": 0})["size"]
        pod.bill("disk", hardware_catalog.storage_usd_per_hour("running", disks))
        pod.log.add("system", f"create container {pod.config['image']}")
        pod.log.add("system", f"{pod.config['image']} Pulling")

    def _look_after(self, pod: Pod, now: float) -> None:
        """RunPod starts a container again whose main process has ended: exiting is not stopping."""
        container = pod.container
        if container is not None and container.ended is not None:
            pod.log.add("system", f"container ended with exit code {container.ended}: start it again")
            self._end_container(pod, wipe=True)
            pod.due = now + self.settings.restart_s * min(2**pod.restarts, 32)
            pod.restarts += 1
        elif container is None and now >= pod.due:
            self._launch(pod)

    def _strike(self, pod: Pod, fault: Fault, now: float) -> None:
        """An event's hour has come."""
        if fault.kind == "preempt" and fault.warning and pod.container is not None:
            pod.container.signal(signal.SIGTERM)
            last = Fault("preempt", warning=False)
            pod.events.append((now + self.settings.warning_s, last))
        elif fault.kind == "preempt" and pod.status in ("STARTING", "RUNNING"):
            self.stop(pod)
        elif fault.kind == "vanish":
            self.remove(pod)
        elif fault.kind == "restart" and pod.container is not None:
            pod.container.kill()  # and _look_after does the rest

    def _broke(self) -> None:
        for pod in list(self.pods.values()):
            if not pod.network():
                self.remove(pod)
            elif pod.status != "EXITED":
                self.stop(pod)

    # --- containers

    def _launch(self, pod: Pod) -> None:
        """ERROR where that cannot be: no memory, no disk, a command that is none."""
        try:
            self._start(pod)
        except (OSError, ValueError) as error:
            pod.container, pod.status = None, "ERROR"
            pod.log.add("system", f"cannot start container: {error}")

    def _start(self, pod: Pod) -> None:
        port = free_port() if "22/tcp" in pod.config["ports"] else None
        pod.container = Container(
            folder=pod.folder,
            hostname=pod.id,
            env=self._env(pod, port),
            command=shlex.split(pod.config["args"]),
            volumes=self._volumes(pod),
            visible=list(self.settings.visible),
            ssh_port=port,
            ssh_delay_s=pod.ssh_delay_s,
            on_line=lambda line: pod.log.add("container", line),
            plain=pod.config["image"].partition(":")[0] in hardware_catalog.content()["plain_images"],
        )
        pod.running_since = time.monotonic()
        pod.container.start()

    def _volumes(self, pod: Pod) -> dict[str, Path]:
        persistent, network = pod.persistent(), pod.network()
        if persistent is None and network is None:
            return {}
        folder = volume_folder(self.root, network["volumeId"]) if network else pod.folder / "volume"
        folder.mkdir(parents=True, exist_ok=True)
        return {(network or persistent or {})["path"]: folder}

    def _env(self, pod: Pod, port: int | None) -> dict[str, str]:
        """What RunPod puts in, and the address at which the pod finds this emulator in RunPod's place."""
        network = pod.network()
        env = {
            "RUNPOD_POD_ID": pod.id, "RUNPOD_POD_HOSTNAME": pod.id, "RUNPOD_API_KEY": pod.key,
            "RUNPOD_API_BASE_URL": self.base_url, "RUNPOD_DC_ID": pod.data_center or "",
            "RUNPOD_PUBLIC_IP": "127.0.0.1", "RUNPOD_CPU_COUNT": "8", "RUNPOD_MEM_GB": "64",
            "RUNPOD_GPU_COUNT": str(pod.compute.get("gpu", {}).get("count", 0)),
        }  # fmt: skip
        if port:
            env["RUNPOD_TCP_PORT_22"] = str(port)
        if network:
            env["RUNPOD_VOLUME_ID"] = network["volumeId"]
        if pod.public_key:
            env["PUBLIC_KEY"] = pod.public_key
        if pod.start_jupyter:
            env["JUPYTER_PASSWORD"] = pod.key[-12:].lower()
        return {**env, **pod.config["env"]}

    def _end_container(self, pod: Pod, wipe: bool) -> None:
        if pod.container is not None:
            pod.container.kill()
            if wipe:
                pod.container.wipe()
            pod.container = None


def _facts(pod: Pod) -> dict[str, set[str | None]]:
    """What a fault can ask of a pod."""
    place = {pod.data_center} if pod.data_center else set(pod.data_centers)
    return {"pod": {*pod.names}, "gpu": {pod.gpu_id}, "cloud": {pod.cloud}, "data_center": {*place}}
