"""Hostfiles in DeepSpeed's form, a line `worker-1 slots=4` per machine: how many there are, and where they meet.

With the network addresses of this machine, as the other machines see them.
"""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import Problem, RequestError
from runner.spec import HardwareSpec

PORT = 29500
"""Port of the rendezvous where `hw.rendezvous` names none: torchrun's and DeepSpeed's default."""
# The name goes to ssh: one that begins with a dash would be an option of it.
_LINE = re.compile(r"([A-Za-z0-9_][^\s=]*)\s+slots=([0-9]{1,6})")


@dataclass(frozen=True)
class Host:
    """One line."""

    name: str
    """Argument of ssh: a host name, an address, a name of ~/.ssh/config, or user@one."""
    slots: int
    """Processes on it: its GPUs."""
    place: str
    """`file:line`, for errors."""

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]


def read_hostfile(file: str) -> list[Host]:
    """The machines in the file's order; RequestError with every line that is wrong."""
    try:
        lines = Path(file).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        remedy = "name a file with a line such as `worker-1 slots=4` per machine"
        raise RequestError(Problem(f"hw.hostfile={file} cannot be read: {why}", None, remedy)) from None
    hosts: list[Host] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, 1):
        text, place = line.partition("#")[0].strip(), f"{file}:{number}"
        found = _LINE.fullmatch(text)
        if found is None or not int(found[2]):
            if text:
                problems.append(Problem(f"cannot read {text!r}", place, "write NAME slots=N, with N of at least 1"))
            continue
        host = Host(found[1], int(found[2]), place)
        if any(host.name == other.name for other in hosts):
            remedy = "give a machine one line with all its slots"
            problems.append(Problem(f"{host.name} is listed twice", place, remedy))
        elif hosts and host.slots != hosts[0].slots:
            what = f"{host.name} has {host.slots} slots, and {hosts[0].name} has {hosts[0].slots}"
            remedy = "every machine runs as many processes as the others: write one number"
            problems.append(Problem(what, place, remedy))
        else:
            hosts.append(host)
    if not hosts and not problems:
        problems.append(Problem("there is no machine in it", file, "write a line such as `worker-1 slots=4` for each"))
    if problems:
        raise RequestError(*problems)
    return hosts


def hosts_of(hw: HardwareSpec) -> list[Host]:
    """The machines of a resolved run in the order of their numbers; empty where there is no hostfile."""
    return read_hostfile(hw.hostfile)[: hw.num_nodes] if hw.hostfile else []


def apply(asked: HardwareSpec, found: HardwareSpec) -> HardwareSpec:
    """`found` (what `detect.resolve` made of `asked`) with the number of machines, their processes and the rendezvous
    that the hostfile gives. `hw.num_nodes`, where it is written, takes the first so many lines.

    RequestError where what was written and the file do not agree.
    """
    if not found.hostfile:
        return found
    hosts = read_hostfile(found.hostfile)
    num_nodes = asked.num_nodes if "num_nodes" in asked.model_fields_set else len(hosts)
    slots, first, place = hosts[0].slots, hosts[0].address, hosts[0].place
    written = asked.num_processes or (asked.num_gpus or None)
    problems = []
    if num_nodes > len(hosts):
        what = f"hw.num_nodes={num_nodes}, and {found.hostfile} has {len(hosts)} machines"
        problems.append(Problem(what, None, f"write hw.num_nodes={len(hosts)}, or the other machines into the file"))
    if written is not None and written != slots:
        key = "hw.num_processes" if asked.num_processes else "hw.num_gpus"
        what = f"slots={slots}, and {found.name} has {key}={written}"
        problems.append(Problem(what, place, f"write {key}={slots}, or slots={written}"))
    if problems:
        raise RequestError(*problems)
    facts: dict[str, Any] = {"num_nodes": num_nodes}
    if num_nodes > 1 and found.rendezvous is None:
        facts["rendezvous"] = f"[{first}]:{PORT}" if ":" in first else f"{first}:{PORT}"
    if written is None:
        facts["num_gpus" if found.accelerator == "cuda" else "num_processes"] = slots
    return found.model_copy(update=facts)


ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737): the way there is the default route."""


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[address]:port`, which the schema has checked."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def is_own(host: str) -> bool:
    """The name or address is this machine's: one that is not cannot be bound to (bind(2), EADDRNOTAVAIL)."""
    for family, kind, protocol, _, address in _resolved(host):
        with suppress(OSError), socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
            return True
    return False


def interface(endpoint: str, address: str | None = None) -> str | None:
    """Name of the network interface on which this machine meets the others, such as `eth0`; None if it cannot be told.

    It is the one that has `address`, else the one on the way to the rendezvous. On the first machine its own name may
    stand for a loopback address (Debian's /etc/hosts: 127.0.1.1), where nobody else finds it: then the default route's.
    """
    import psutil  # comes with training, and this is asked only then

    own = [a[4][0] for a in _resolved(address)] if address else [_towards(split(endpoint)[0]), _towards(ELSEWHERE)]
    names = {a.address.partition("%")[0]: name for name, some in psutil.net_if_addrs().items() for a in some}
    found = (names.get(str(one)) for one in own if one and not str(one).startswith("127.") and one != "::1")
    return next((name for name in found if name), None)


def _towards(host: str) -> str | None:
    """The address that this machine sends from; nothing is sent: a UDP socket only picks its route when connected."""
    for family, _, _, _, address in _resolved(host):
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.connect((address[0], 9, *address[2:]))
            return str(trial.getsockname()[0])
    return None


def _resolved(host: str) -> list[tuple[int, int, int, str, tuple[str | int, ...]]]:
    try:
        return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)  # type: ignore[return-value]  # IPv4 or 6
    except OSError:
        return []
