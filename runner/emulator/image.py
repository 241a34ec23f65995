"""The "image" of an emulated pod: files on its container disk before its first process."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

HOST_ETC = "/.host/etc"
"""Where the host's /etc is in a pod: the pod's own is made of links to it."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
FOLDERS = {"workspace": 0o755, "root": 0o700, "tmp": 0o1777, "mnt": 0o755, "run/sshd": 0o755, "etc/ssh": 0o755}


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are, as the pod's processes see them."""

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
    """Of a server that knows one user, by key. Only the path is set for commands: the variables are not, as there."""
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
