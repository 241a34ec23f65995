"""The container of an emulated pod: a process tree that ends with this process, with an ssh server in it.

As root it has its own mount and PID namespace (`unshare`), so that killing its first process leaves nothing behind.
Without that right it is a process group on the host's file system, with $RUNNER_WORKSPACE in place of /workspace.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from runner.emulator.image import Places, lay_out

# Below 32768, where Linux begins to hand out ports to clients: none of those can take one that was found free.
PORTS = range(20000, 32000)
INSIDE = Path(__file__).with_name("init_process.py")
UNSHARE = ("unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child")
PROJECT = Path(__file__).resolve().parents[2]
"""Where this package was read from; a pod may, too."""
ENDING_S = 5.0
"""For a killed container to be gone; it takes milliseconds."""
OPEN_SSHD = ("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd")


def sshd() -> str | None:
    """The ssh server of this machine. It must be started by its full path."""
    return next((path for path in OPEN_SSHD if Path(path).exists()), None) or shutil.which("sshd")


@cache
def namespaces() -> bool:
    """Whether this process may do all that a pod of its own namespaces takes: tried with one that does nothing."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        disk = {"disk": folder, "folders": [], "hostname": "probe"}
        order_file = Path(folder, "order.json")
        order_file.write_text(json.dumps({**disk, "namespace": True, "env": {}, "command": ["/bin/true"]}), "utf-8")
        command = [*UNSHARE, sys.executable, "-I", "-S", str(INSIDE), str(order_file)]
        quiet = subprocess.DEVNULL
        env = {"PATH": os.environ.get("PATH", "")}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, env=env) as probe:
            return probe.wait() == 0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Container:
    """One life of a container: made anew by every start and restart."""

    folder: Path
    """Of the pod, on the host; the container disk is `disk` below it."""
    hostname: str
    env: dict[str, str]
    command: list[str]
    """The main process; the image's /start.sh where it is empty."""
    volumes: dict[str, Path]
    """Path in the pod → folder of the host."""
    visible: list[Path]
    """Folders of the host that are where they are in the pod, too, and may be written there."""
    ssh_port: int | None
    ssh_delay_s: float
    on_line: Callable[[str], None]
    """Called with every line that the main process writes."""
    plain: bool = False
    """The image is not made for RunPod: it has no /start.sh, and without a command of its own it ends at once."""
    ended: int | None = None
    """Exit code of the main process, once it has one."""
    started: float = field(default_factory=time.monotonic)
    _process: subprocess.Popen[str] | None = None
    _killed: bool = False

    @property
    def user(self) -> str:
        """Who may come in by ssh."""
        return "root" if namespaces() else getpass.getuser()

    @property
    def disk(self) -> Path:
        """What a stop deletes."""
        return self.folder / "disk"

    def start(self) -> None:
        """Begin. The container ends when its standard input does, and so with this process, however that ends."""
        isolated = namespaces()
        places = Places("" if isolated else str(self.disk))
        self.disk.mkdir(parents=True, exist_ok=True)
        if not isolated and os.geteuid() == 0:  # where sshd, as root, shuts itself in
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        lay_out(self.disk, places, self.hostname, self.ssh_port, plain=self.plain)
        order_file = self.folder / "order.json"
        order_file.touch(0o600)
        order_file.write_text(json.dumps(self._order(places, isolated)), "utf-8")
        inside = [sys.executable, "-I", "-S", str(INSIDE), str(order_file)]
        self._process = subprocess.Popen(
            [*(UNSHARE if isolated else ()), *inside],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True, cwd="/", env={"PATH": os.environ.get("PATH", "")},
        )  # fmt: skip
        threading.Thread(target=self._read, name=f"log of {self.hostname}", daemon=True).start()

    def _order(self, places: Places, isolated: bool) -> dict[str, object]:
        env = {
            "PATH": places.path, "HOME": places.home, "HOSTNAME": self.hostname, "LANG": "C.UTF-8", **self.env,
            "EMULATED_ROOT": places.root, "EMULATED_ETC": places.etc, "EMULATED_SSHD": sshd() or "sshd",
            "EMULATED_SSH_DELAY": str(self.ssh_delay_s),
        }  # fmt: skip
        if self.ssh_port:
            env["EMULATED_SSH_PORT"] = str(self.ssh_port)
        if not isolated:
            env["RUNNER_WORKSPACE"] = str(next(iter(self.volumes.values()), self.disk / "workspace"))
        python = {sys.prefix, sys.base_prefix, str(Path(os.path.realpath(sys.executable)).parents[1]), str(PROJECT)}
        visible = [path.absolute() for path in self.visible if path.is_dir()]
        return {
            "namespace": isolated,
            "disk": str(self.disk),
            "folders": [
                *((folder, folder, False) for folder in sorted(python)),
                *((str(folder), str(folder), True) for folder in visible),
                *((place, str(folder), True) for place, folder in self.volumes.items()),
            ],
            "hostname": self.hostname,
            "env": env,
            "command": self.command or ["/bin/bash", f"{places.root}/start.sh"],
        }

    def _read(self) -> None:
        process = self._process
        assert process is not None and process.stdout is not None and process.stdin is not None
        with process.stdin, process.stdout as stream:
            for line in stream:
                if not self._killed:  # after that it is unshare, which complains
                    self.on_line(line.rstrip("\n"))
        self.ended = process.wait()

    def signal(self, number: int) -> None:
        """To the main process, as `docker kill --signal` does."""
        for pid in self._first():
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def _first(self) -> list[int]:
        """The container's first process, as the host numbers it; none when it is over."""
        process = self._process
        if process is None or process.poll() is not None:
            return []
        if not namespaces():
            return [process.pid]
        try:
            return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        except OSError:
            return []

    def kill(self) -> None:
        """End everything in it, now. When this returns nothing of it is left."""
        process = self._process
        if process is None:
            return
        self._killed = True
        # The rest of a PID namespace is dead before its first process can be waited for. Without one, init_process.py
        # kills what descends from it.
        number = signal.SIGKILL if namespaces() else signal.SIGUSR1
        end = time.monotonic() + ENDING_S
        while process.poll() is None and time.monotonic() < end:
            for pid in self._first():  # none while unshare has not come to it yet
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.kill()
        process.wait()

    def wipe(self) -> None:
        """Delete the container disk."""
        shutil.rmtree(self.disk, ignore_errors=True)


def command_of(args: str) -> list[str]:
    """The words of a pod's `args`, which replace the image's command."""
    return shlex.split(args)
