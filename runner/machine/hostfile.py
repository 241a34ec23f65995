"""Hostfiles in DeepSpeed's form, a line `worker-1 slots=4` per machine: how many there are, and where they meet."""

from __future__ import annotations

import re
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
            problems.append(Problem(f"{host.name} stands there twice", place, remedy))
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
