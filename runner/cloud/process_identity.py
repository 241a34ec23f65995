"""The process that owns a pod, identified by boot id, PID namespace, PID and start time.

A hostname changes with DHCP, and is another one in every container. A process that this one can see is looked up. One
of another container, or from before a reboot, has a lock in the state folder as long as it lives: the kernel gives it
back whatever ends the process. On a network file system locks are not always told to other machines
(mount option `nolock`): there an owner on another machine is taken for alive.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from runner.paths import state_dir
from runner.rundir.directory import is_alive, text_of

NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "virtiofs", "lustre", "ceph", "gpfs", "beegfs", "afs", "ocfs", "gfs")
"""Beginnings of the names of file systems that several machines may share."""
KEPT_S = 60 * 86_400
_held: dict[Path, IO[str]] = {}


def identity_columns(pid: int | None = None) -> dict[str, Any]:
    """Columns of the ledger for a process that can be seen from here, by default this one."""
    pid = os.getpid() if pid is None else pid
    return {
        "pid": pid,
        "host": "|".join((socket.gethostname(), machine_id(), boot_id(), pid_namespace())),
        "pid_started": start_ticks(pid),
    }


def hold_lock() -> None:
    """Hold this process's lock until its end. Without one, as on a full disk, it is only seen from this container."""
    with suppress(OSError):
        file = _lock(**identity_columns())
        if file in _held:
            return
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stream = file.open("w")
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held[file] = stream
        for old in file.parent.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_S and _is_held(old) is False:
                old.unlink()


def owner_is_alive(host: str | None, pid: int, pid_started: float | None) -> bool:
    """Return True if an owner is alive, or must be assumed to be."""
    name, *rest = (host or "").split("|")
    if len(rest) != 3:  # of an earlier version
        return name != socket.gethostname() or _runs(pid, pid_started)
    its_machine, its_boot, its_namespace = rest
    seen = (its_boot, its_namespace) == (boot_id(), pid_namespace())
    if seen and (its_boot or name == socket.gethostname()):
        return _runs(pid, pid_started)
    lock = _lock(host=str(host), pid=pid, pid_started=pid_started)
    held = _is_held(lock)
    if held is not None and (its_boot == boot_id() or not is_on_network(lock)):
        return held
    rebooted = its_machine != "" and its_machine == machine_id() and its_boot != boot_id()
    return held is True or not rebooted


def _runs(pid: int, pid_started: float | None) -> bool:
    return is_alive(pid) and start_ticks(pid) == pid_started


def _lock(host: str, pid: int, pid_started: float | None) -> Path:
    _, _, its_boot, its_namespace = host.split("|")
    return state_dir() / "owners" / f"{its_boot or 'boot'}-{its_namespace or 'ns'}-{pid}-{pid_started or 0:.0f}"


def _is_held(lock: Path) -> bool | None:
    """None where there is no such lock, or it cannot be asked."""
    try:
        with lock.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None


@cache
def machine_id() -> str:
    """Id of the installed system (machine-id(5)); empty in most containers."""
    return _first("/etc/machine-id", "/var/lib/dbus/machine-id")


@cache
def boot_id() -> str:
    """Id of the kernel's boot, the same in all containers (random(4)); empty on macOS."""
    return _first("/proc/sys/kernel/random/boot_id")


@cache
def pid_namespace() -> str:
    """Id of the namespace in which process ids are unique."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def start_ticks(pid: int) -> float | None:
    """Start time of a process in ticks since boot, which distinguishes reused process ids."""
    try:
        return float(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def is_on_network(file: Path) -> bool:
    """Return True if other machines may share the file; False if unknown (macOS)."""
    path, best, kind = file.resolve(), Path("/"), ""
    for line in text_of(Path("/proc/self/mountinfo")).splitlines():
        place, _, source = line.partition(" - ")
        point = Path(place.split()[4].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, source.split()[0]
    return kind.startswith(NETWORK)


def _first(*files: str) -> str:
    return next((text for file in files if (text := text_of(Path(file)).strip())), "")
