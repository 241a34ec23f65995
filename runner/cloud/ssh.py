"""A connection to a pod by the system's own `ssh` and `rsync`: one login, many commands.

The run's key and a `known_hosts` of its own: nothing of the user's ~/.ssh is read or written. A pod is known by its id
and not by its address, for its port changes with every restart.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from runner.errors import CannotRunError, Problem, RunnerError

SSH_FAILED = 255
"""ssh(1): the connection failed; any other code is the command's."""
RSYNC_LOST = (10, 12, 20, 30, 35, 255)
"""rsync(1): error in socket I/O, in the protocol's stream, ended by a signal, timeouts; 255 is ssh's."""
ANSWER_SECONDS = 120.0
OPTIONS = {
    "BatchMode": "yes",  # no questions: nobody is there to answer
    "IdentitiesOnly": "yes",
    "IdentityAgent": "none",
    "StrictHostKeyChecking": "accept-new",
    "UpdateHostKeys": "no",
    "LogLevel": "ERROR",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",  # a connection that is dead for 20 s is given up
    "ServerAliveCountMax": "4",
    "ControlMaster": "auto",
    "ControlPersist": "60",
}


class LostError(RunnerError):
    """The connection could not be made, or broke: the command may have run."""


class CommandError(RunnerError):
    """A command in the pod failed."""


def check() -> None:
    """CannotRunError without ssh or rsync on this machine."""
    for name, package in (("ssh", "openssh-client"), ("rsync", "rsync")):
        if shutil.which(name) is None:
            what = f"{name}, which carries the run to a pod, is not installed"
            raise CannotRunError(Problem(what, "where=runpod", f"install it: apt-get install {package}"))


def user_of(raw: dict[str, Any]) -> str:
    """Who may come in, as RunPod's answer about a pod says it."""
    direct = (raw.get("ssh") or {}).get("direct") or {}
    return str(direct.get("username") or "root")


@dataclass
class Connection:
    """To one pod. Commands raise LostError where the connection fails, CommandError where they do."""

    name: str
    """The pod's id, under which its host key is kept."""
    host: str
    port: int
    key: Path
    user: str = "root"
    _folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="runner-ssh-")))

    def words(self, *more: str) -> list[str]:
        """`ssh` with all options, up to the host."""
        own = {
            **OPTIONS,
            "HostKeyAlias": self.name,
            "UserKnownHostsFile": str(self._folder / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null",
            "ControlPath": str(self._folder / f"{self.port}"),
        }
        options = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "/dev/null", "-i", str(self.key), "-p", str(self.port), *options, *more]

    def moved(self, host: str, port: int) -> None:
        """The pod has another address now; a container that was made anew has another host key, too."""
        if (host, port) != (self.host, self.port):
            self._leave()
            (self._folder / "known_hosts").unlink(missing_ok=True)
            self.host, self.port = host, port

    def run(self, command: str, *, stdin: bytes = b"", seconds: float = ANSWER_SECONDS, check: bool = True) -> str:
        """What a command of the pod's shell says. `stdin` is the way for what no argument list may show."""
        code, said, wrong = self.attempt(command, stdin=stdin, seconds=seconds)
        if check and code:
            first = command.strip().splitlines()[0][:80]
            raise CommandError(Problem(f"in the pod: `{first}` failed ({code}): {_last(wrong or said)}"))
        return said

    def attempt(self, command: str, *, stdin: bytes = b"", seconds: float = ANSWER_SECONDS) -> tuple[int, str, str]:
        """Exit code, output and error output of a command."""
        words = [*self.words(f"{self.user}@{self.host}"), command]
        try:
            done = subprocess.run(words, input=stdin, capture_output=True, timeout=seconds, start_new_session=True)
        except subprocess.TimeoutExpired:
            self._leave()
            raise LostError(Problem(f"the pod did not answer within {seconds:.0f} s")) from None
        wrong = done.stderr.decode(errors="replace")
        if done.returncode == SSH_FAILED:
            self._leave()
            raise LostError(Problem(f"the pod cannot be reached by SSH: {_last(wrong)}"))
        return done.returncode, done.stdout.decode(errors="replace"), wrong

    def open(self, command: str, stderr: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """A command that is talked with; it is out of the reach of the terminal's Ctrl-C."""
        words = [*self.words(f"{self.user}@{self.host}"), command]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True)

    def put(self, sources: Sequence[Path | str], target: str, say: Callable[[str], None] | None = None,
            options: Sequence[str] = ()) -> None:  # fmt: skip
        """Send files or folders; one that was broken off goes on where it was."""
        self._rsync([*options, *map(str, sources), f"{self.user}@{self.host}:{target}"], say)

    def get(self, source: str, target: Path, say: Callable[[str], None] | None = None,
            options: Sequence[str] = ()) -> None:  # fmt: skip
        """Bring a file or folder here."""
        self._rsync([*options, f"{self.user}@{self.host}:{source}", str(target)], say)

    def _rsync(self, words: list[str], say: Callable[[str], None] | None) -> None:
        carrier = shlex.join(self.words())
        # --append-verify would trust a partial file's length; --partial compares its blocks.
        command = ["rsync", "-rlptD", "--partial", "--timeout=60", "--protect-args", "--info=progress2", "-e", carrier]
        process = subprocess.Popen(
            [*command, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                _tell(process, say)
                assert process.stderr is not None
                wrong = process.stderr.read().decode(errors="replace")
            except BaseException:
                process.kill()
                raise
        code = process.returncode
        if code in RSYNC_LOST:
            raise LostError(Problem(f"the connection broke while files were carried: {_last(wrong)}"))
        if code:
            raise CommandError(Problem(f"rsync failed ({code}): {_last(wrong)}"))

    def close(self) -> None:
        """Log out, forget the pod."""
        self._leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _leave(self) -> None:
        with suppress(OSError, subprocess.TimeoutExpired):
            words = [*self.words("-O", "exit"), f"{self.user}@{self.host}"]
            subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=5)


def _tell(process: subprocess.Popen[Any], say: Callable[[str], None] | None) -> None:
    """rsync's progress, such as `12,345,678  45%  10.2MB/s  0:00:07`, as it comes."""
    assert process.stdout is not None
    rest = b""
    while block := process.stdout.read1(4096):  # type: ignore[attr-defined]  # a BufferedReader
        *lines, rest = re.split(rb"[\r\n]", rest + block)
        shown = [line for line in lines if line.strip()]
        if say is not None and shown:
            say(" ".join(shown[-1].decode(errors="replace").split()[:4]))


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1]
