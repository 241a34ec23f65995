"""Injected faults, as reported by users of RunPod (docs/emulator.md)."""

from __future__ import annotations

import itertools
import threading
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from runner.emulator.answers import Json

KINDS = {
    "answer": "the request fails with `status` (401, 402, 403, 409, 429, 500, …; 502 is HTML) and has no effect",
    "lost": "the request takes effect (with `commit: false` it does not), and the connection closes without a response",
    "timeout": "the request takes effect (with `commit: false` it does not), and the response takes `seconds`",
    "double": "create makes two pods of the same name and returns one of them",
    "no_capacity": "create or start finds no machine, for a `gpu`, a `cloud`, a `data_center` or any",
    "slow_pull": "the image pull takes `seconds`",
    "no_pull": "the image cannot be pulled, the pod stays STARTING; `detail` is the registry's message in the log",
    "bad_host": "the pod never gets a machine and stays PROVISIONING",
    "no_ssh": "the pod runs, and its ssh server does not respond",
    "price": "the pod costs `factor` times the catalogue's price",
    "late_listing": "a created pod is missing from lists for `seconds`",
    "undead": "terminate succeeds, but the pod keeps running, for `seconds` or until the next terminate",
    "no_right": "the pod's own key has no permission to stop or terminate it",
    "restart": "the container restarts, `seconds` from now or after the pod has started",
    "preempt": "the pod loses its machine and is stopped; with `warning`, it gets SIGTERM 5 s before",
    "vanish": "the pod and its volume disk disappear",
    "skew": "the server's clock is ahead by `seconds`",
}
"""Kind → what it does."""
EVENTS = ("restart", "preempt", "vanish")
"""Kinds that hit a pod at a moment instead of a request."""
FOREVER = 0


@dataclass
class Fault:
    """A fault, injected `times` times into matching requests or pods."""

    kind: str
    on: str = "any"
    """Operation: create, list, get, terminate, stop, start, restart, logs, update, reads, any, or an operationId."""
    times: int = 1
    """How often; 0: always."""
    skip: int = 0
    """Number of matching requests that are let through first."""
    pod: str | None = None
    """Id or name of the pod."""
    gpu: str | None = None
    cloud: str | None = None
    data_center: str | None = None
    status: int = 500
    seconds: float = 0.0
    factor: float = 2.0
    commit: bool = True
    warning: bool = True
    retry_after: int | None = None
    detail: str | None = None
    id: int = field(default_factory=itertools.count(1).__next__)
    used: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no fault: {', '.join(KINDS)}")

    def matches(self, facts: Json) -> bool:
        """Return True if the fault applies to `facts`; an unknown fact does not match."""
        if self.times != FOREVER and self.used >= self.times:
            return False
        if self.on != "any" and "on" in facts and self.on not in facts["on"]:
            return False
        wanted = {"pod": self.pod, "gpu": self.gpu, "cloud": self.cloud, "data_center": self.data_center}
        return all(value is None or value in facts.get(name, ()) for name, value in wanted.items())


class Faults:
    """Active faults, oldest first."""

    def __init__(self) -> None:
        self._all: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        """Activate a fault."""
        with self._lock:
            self._all.append(fault)
        return fault

    def take(self, *kinds: str, **facts: object) -> Fault | None:
        """The first that matches, counted as used; facts are sets of names, by what they name."""
        with self._lock:
            for fault in self._all:
                if fault.kind in kinds and fault.matches(facts):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.used += 1
                    return fault
        return None

    def any(self, *kinds: str, **facts: object) -> bool:
        """Return True if a matching fault would apply next; it is not counted."""
        with self._lock:
            return any(f.kind in kinds and not f.skip and f.matches(facts) for f in self._all)

    def clear(self, identity: int | None = None) -> None:
        """Forget all, or one."""
        with self._lock:
            self._all = [fault for fault in self._all if identity is not None and fault.id != identity]

    def listed(self) -> list[Json]:
        """All of them, with how often each was used."""
        with self._lock:
            return [asdict(fault) for fault in self._all]


def parsed(text: str) -> Fault:
    """`no_capacity:gpu=NVIDIA L4,times=2` as the command line has it; ValueError with what is wrong."""
    kind, _, rest = text.partition(":")
    types = {f.name: str(f.type) for f in fields(Fault) if f.name not in ("kind", "id", "used")}
    values: Json = {}
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        name, equals, value = pair.partition("=")
        if name not in types or not equals:
            raise ValueError(f"{pair!r} is not one of {', '.join(f'{n}=…' for n in types)}")
        values[name] = _value(types[name], name, value)
    return Fault(kind.strip(), **values)


def _value(kind: str, name: str, text: str) -> Any:
    if kind == "bool":
        return text.lower() in ("true", "yes", "1")
    try:
        return int(text) if kind.startswith("int") else float(text) if kind == "float" else text
    except ValueError:
        raise ValueError(f"{name}={text} is no number") from None
