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

HOST_ETC = "/.host/etc"
"""Where the host's /etc is in a pod: the pod's own is made of links to it."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FOLDERS = {"workspace": 0o755, "root": 0o700, "tmp": 0o1777, "mnt": 0o755, "run/sshd": 0o755, "etc/ssh": 0o755}


@dataclass(frozen=True, slots=True)
class Places:
    """Paths as the pod's processes see them."""

    root: str
    """Empty in a namespace of its own, else the container disk."""

    @property
    def etc(self) -> str:
        """Folder of `rp_environment` and the ssh server's files."""
        return f"{self.root}/etc"

    @property
    def home(self) -> str:
        """Home of the one user."""
        return f"{self.root}/root"

    @property
    def path(self) -> str:
        """The image's own Python first, as Docker images have it."""
        return f"{self.root}/image/bin:{SYSTEM_PATH}"


def lay_out(disk: Path, places: Places, hostname: str, ssh_port: int | None, *, plain: bool = False) -> None:
    """Fill a container disk: folders, the start script (unless it is `plain`), an ssh server's settings, a Python that
    is this one."""
    for name, mode in FOLDERS.items():
        (disk / name).mkdir(parents=True, exist_ok=True)
        (disk / name).chmod(mode)
    if not places.root:
        _own_etc(disk / "etc", hostname)
    if not plain:
        start = Path(__file__).with_name("start.sh").read_text("utf-8")
        (disk / "start.sh").write_text(start, "utf-8")
    # As in Debian's: what follows in this file is not for a command sent by ssh.
    (disk / "root" / ".bashrc").write_text('[ -z "$PS1" ] && return\n', "utf-8")
    (disk / "root" / ".profile").write_text(". ~/.bashrc\n", "utf-8")
    (disk / "image" / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3"):  # no links: a virtual environment's Python knows itself by where it stands
        script = disk / "image" / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', "utf-8")
        script.chmod(0o755)
    if ssh_port:
        (disk / "etc" / "ssh" / "sshd_config").write_text(_sshd_config(ssh_port, places), "utf-8")


def _own_etc(folder: Path, hostname: str) -> None:
    """An /etc of links to the host's files, with its own users: root, without a password, and the host's servants."""
    host = Path("/etc")
    for entry in host.iterdir():
        if not os.path.lexists(folder / entry.name) and entry.name not in ("shadow", "passwd", "hostname"):
            is_relative = entry.is_symlink() and not os.readlink(entry).startswith("/")
            target = os.readlink(entry) if is_relative else f"{HOST_ETC}/{entry.name}"
            (folder / entry.name).symlink_to(target)
    servants = [line for line in (host / "passwd").read_text("utf-8").splitlines() if not line.startswith("root:")]
    lines = ["root:x:0:0:root:/root:/bin/bash", *servants]
    (folder / "passwd").write_text("\n".join(lines) + "\n", "utf-8")
    # `*` is no password; with a `!` sshd would refuse the key, too.
    shadow = "".join(f"{line.partition(':')[0]}:*:19000:0:99999:7:::\n" for line in lines)
    (folder / "shadow").write_text(shadow, "utf-8")
    (folder / "shadow").chmod(0o600)
    (folder / "hostname").write_text(f"{hostname}\n", "utf-8")


def _sshd_config(port: int, places: Places) -> str:
    """Configuration of a server with one user, by key. Only the path is set for commands: the variables are not, as
    there."""
    keys = f"{places.home}/.ssh/authorized_keys"
    return f"""Port {port}
ListenAddress 127.0.0.1
HostKey {places.etc}/ssh/ssh_host_ed25519_key
PidFile {places.root}/run/sshd.pid
AuthorizedKeysFile {keys}
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PrintMotd no
MaxStartups 100
MaxSessions 100
LogLevel ERROR
SetEnv PATH={places.path} RUNNER_RP_ENVIRONMENT={places.etc}/rp_environment RUNNER_AUTHORIZED_KEYS={keys}
Subsystem sftp internal-sftp
"""


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
    """This process may do all that a pod of its own namespaces takes: tried with one that does nothing."""
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
    """One container, created at each start and restart."""

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
        """User for ssh logins."""
        return "root" if namespaces() else getpass.getuser()

    @property
    def disk(self) -> Path:
        """Folder that a stop deletes."""
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
        """Send a signal to the main process, as `docker kill --signal` does."""
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
            self.signal(number)  # to nobody while unshare has not come to it yet
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.kill()
        process.wait()

    def wipe(self) -> None:
        """Delete the container disk."""
        shutil.rmtree(self.disk, ignore_errors=True)
