"""The first process of an emulated pod: builds its file system and reaps processes.

Run as a file by `unshare --mount --pid --uts --fork`, with the order's path as its argument; standard library only.
The pod sees the host's /usr, /opt, … read-only; /workspace, /root, /tmp, /run, /mnt, /dev/shm, /etc and the files in /
are its own. Where there is no right to do that (`namespace: false`), it starts the main process and does nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

# mount(2), of <sys/mount.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
OWN = ("workspace", "root", "tmp", "run", "etc", "proc", "dev", "mnt", "media", "srv", "image", ".host", "lost+found")
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str | None, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2); OSError when it is refused."""
    arguments = [text.encode() if text is not None else None for text in (source, target, kind)]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() if data else None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def build(disk: Path, folders: list[tuple[str, str, bool]], hostname: str) -> None:
    """Turn `disk` into this process's root, with `folders`: place in the pod, folder of the host, may it be written."""
    if os.getpid() != 1:
        raise SystemExit("not the first process of a namespace: nothing is mounted")
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    # Opened first: what lies below /root or /tmp cannot be named any more once the pod has its own.
    held = [(place, os.open(folder, os.O_PATH), written) for place, folder, written in folders]
    _host(disk)
    (disk / "proc").mkdir(exist_ok=True)
    mount("proc", str(disk / "proc"), "proc", MS_NOSUID | MS_NODEV)
    (disk / "dev").mkdir(exist_ok=True)
    mount("/dev", str(disk / "dev"), None, MS_BIND | MS_REC)
    mount("tmpfs", str(disk / "dev" / "shm"), "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    for place, fd, written in held:
        target = disk / place.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        _bind(f"/proc/self/fd/{fd}", target, written)
    socket.sethostname(hostname)
    os.chroot(disk)
    os.chdir("/")
    os.closerange(3, 1024)


def _host(disk: Path) -> None:
    """The folders of the host's /, read-only."""
    for entry in sorted(Path("/").iterdir()):
        target = disk / entry.name
        if entry.name in OWN or (os.path.lexists(target) and not target.is_dir()):
            continue
        if entry.is_symlink():
            target.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            target.mkdir(exist_ok=True)
            with suppress(OSError):  # a folder that may not be bound is not there, then
                _bind(str(entry), target)
    (disk / ".host" / "etc").mkdir(parents=True, exist_ok=True)
    _bind("/etc", disk / ".host" / "etc")


def _bind(source: str, target: Path, written: bool = False) -> None:
    mount(source, str(target), None, MS_BIND | MS_REC)
    if not written:
        mount(None, str(target), None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def be_init(command: list[str], env: dict[str, str], cwd: str, stop_by: int) -> int:
    """Start the main process, hand signals on to it, bury the dead; its exit code when it ends.

    Docker, too, sends SIGTERM to the main process alone. `stop_by`: what orphans get at the end, where no namespace
    takes them along (0: nothing).
    """
    if stop_by:
        signal.signal(signal.SIGUSR1, lambda number, frame: _end(stop_by))
    try:
        main = subprocess.Popen(command, env=env, cwd=cwd, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"exec {command[0]}: {error.strerror}", flush=True)
        return 127
    signal.signal(signal.SIGTERM, lambda number, frame: main.send_signal(number))
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except InterruptedError:
            continue
        if pid == main.pid:
            if stop_by:
                _end_all(stop_by)
            return os.waitstatus_to_exitcode(status)


def _end_with_the_emulator(namespace: bool) -> None:
    """It holds the other end of the standard input, as long as it lives. The rest of a namespace ends with its first
    process."""
    os.read(0, 1)
    if not namespace:
        _end_all(signal.SIGKILL)
    os._exit(128 + signal.SIGKILL)


def _end(number: int) -> None:
    _end_all(number)
    os._exit(128 + number)


def _end_all(number: int) -> None:
    """All that descends from this process; again until there is none, since the killed leave orphans to it."""
    for _ in range(200):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text("ascii").split()
        if not children:
            return
        for pid in children:
            with suppress(OSError):
                os.kill(int(pid), number)
        with suppress(OSError):
            os.waitpid(-1, 0)


def main(order_file: str) -> int:
    """Be the pod that the order describes."""
    order: dict[str, Any] = json.loads(Path(order_file).read_text("utf-8"))
    threading.Thread(target=_end_with_the_emulator, args=(order["namespace"],), daemon=True).start()
    if order["namespace"]:
        build(Path(order["disk"]), order["folders"], order["hostname"])
        return be_init(order["command"], order["env"], "/", 0)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return be_init(order["command"], order["env"], order["disk"], signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
