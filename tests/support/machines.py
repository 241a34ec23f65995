"""Machines for a test: network namespaces with an address and a host name of their own, joined by a virtual cable."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

# As in many a container: no name server, and a host name that does not resolve.
_ENTER = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
exec "$@"
"""


@dataclass(frozen=True)
class Machine:
    """One of them."""

    name: str
    """Host name."""
    namespace: str
    address: str
    folder: Path
    """For its own files: `hosts`, `resolv.conf`, `bin/` at the front of its PATH."""

    def command(self, *words: str) -> list[str]:
        """The words as something to be executed there; the process keeps its id."""
        enter = _ENTER.format(name=self.name, folder=shlex.quote(str(self.folder)))
        inside = ["unshare", "--uts", "--mount", "sh", "-ec", enter, "sh", *words]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        """`python -m runner …` there."""
        paths = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            self.command(sys.executable, "-m", "runner", *words), cwd=ROOT, text=True, start_new_session=True,
            env={**os.environ, "PATH": paths, "COLUMNS": "160", **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


def why_not() -> str | None:
    """Why there can be none here; None if there can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "iproute2 and util-linux are needed"
    name = f"runner{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def two(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach each other and nobody else; their processes are ended with the block."""
    first, second = (_machine(folder, k) for k in (1, 2))
    try:
        for machine in (first, second):
            _ip("netns", "add", machine.namespace)
        cable = ["link", "add", "lan0", "netns", first.namespace, "type", "veth"]
        _ip(*cable, "peer", "name", "lan0", "netns", second.namespace)
        for machine in (first, second):
            _ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "lan0")
            for device in ("lo", "lan0"):
                _ip("-n", machine.namespace, "link", "set", device, "up")
        yield first, second
    finally:
        for machine in (first, second):
            found = subprocess.run(["ip", "netns", "pids", machine.namespace], capture_output=True, text=True)
            for pid in map(int, found.stdout.split()):
                os.kill(pid, 9)
            subprocess.run(["ip", "netns", "del", machine.namespace], capture_output=True)


def _machine(folder: Path, number: int) -> Machine:
    name = f"worker-{number}"
    own = folder / name
    (own / "bin").mkdir(parents=True)
    (own / "hosts").write_text("127.0.0.1 localhost\n", "utf-8")
    (own / "resolv.conf").write_text("", "utf-8")
    return Machine(name, f"runner{os.getpid()}-{number}", f"10.77.0.{number}", own)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def reachable_by_ssh(first: Machine, second: Machine) -> subprocess.Popen[str] | None:
    """Let `first` call commands on `second` by `ssh ADDRESS COMMAND`; the sshd, or None where a script stands in."""
    program = first.folder / "bin" / "ssh"
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        there = shlex.join(second.command("sh", "-c"))
        program.write_text(f'#!/bin/sh\nfor word; do command=$word; done\nexec {there} "$command"\n', "utf-8")
        program.chmod(0o755)
        return None
    keys = second.folder
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / key)], check=True)
    kind, public, *_ = (keys / "host.pub").read_text("utf-8").split()
    (keys / "known_hosts").write_text(f"{second.address} {kind} {public}\n", "utf-8")
    (keys / "sshd_config").write_text(
        f"HostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n",
        "utf-8",
    )
    (keys / "ssh_config").write_text(f"IdentityFile {keys}/user\nUserKnownHostsFile {keys}/known_hosts\n", "utf-8")
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {keys}/ssh_config "$@"\n', "utf-8")
    program.chmod(0o755)
    # It insists on its own folder in /run, which a machine without a running sshd does not have.
    serve = f"mount -t tmpfs tmpfs /run; mkdir /run/sshd; exec {sshd} -D -e -f {keys}/sshd_config"
    return subprocess.Popen(
        second.command("sh", "-ec", serve), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(keys / "sshd.log").open("w"),
    )  # fmt: skip
