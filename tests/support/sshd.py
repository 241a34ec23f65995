"""A real ssh server on a loopback port, for one user, with the test's own key."""

from __future__ import annotations

import getpass
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.cloud.ssh import Connection
from runner.emulator.container import free_port, sshd


class Server:
    """It may be stopped and started again, at the same port or another one."""

    def __init__(self, root: Path, force: str = "") -> None:
        self.force = f"ForceCommand {force}\n" if force else ""
        self.root, self.key, self.port = root, root / "key", free_port()
        root.mkdir(parents=True, exist_ok=True)
        for name in ("key", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(root / name)], check=True)
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self, port: int | None = None) -> None:
        self.port = port or self.port
        config = self.root / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.root}/host\nPidFile {self.root}/pid\n"
            f"AuthorizedKeysFile {self.root}/key.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"PermitRootLogin prohibit-password\nMaxSessions 50\nMaxStartups 50\n{self.force}"
        )
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen([str(sshd()), "-D", "-f", str(config)], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("sshd does not answer")

    def cut(self) -> None:
        """End the server and every connection to it."""
        assert self.process is not None
        for pid in _descendants(self.process.pid):
            subprocess.run(["kill", "-9", str(pid)], check=False)
        self.process.kill()
        self.process.wait()

    def connection(self) -> Connection:
        return Connection("pod1", "127.0.0.1", self.port, self.key, getpass.getuser(), self.root / "hosts")

    def new_host_key(self) -> None:
        """As another machine has it, or a container that was made anew."""
        (self.root / "host").unlink()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.root / "host")], check=True)


def _descendants(pid: int) -> list[int]:
    try:
        own = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [p for child in own for p in [*_descendants(child), child]]


@contextmanager
def server(root: Path, force: str = "") -> Iterator[Server]:
    found = Server(root, force)
    try:
        yield found
    finally:
        found.cut()
