"""A connection to a pod by the system's own `ssh` and `rsync`: one login, many commands.

The run's key and a `known_hosts` of its own: nothing of the user's ~/.ssh is read or written. A pod's host key is kept
as long as it has its address, which the provider says, over TLS: another key at the same address is refused.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from runner.cloud import untrusted_files
from runner.cloud.provider import Pod
from runner.errors import CannotRunError, Problem, RunnerError
from runner.paths import state_dir

SSH_FAILED = 255
"""ssh(1): the connection failed; any other code is the command's."""
RSYNC_LOST = (10, 12, 20, 30, 35, 255)
"""rsync(1): error in socket I/O, in the protocol's stream, ended by a signal, timeouts; 255 is ssh's."""
ANSWER_SECONDS = 120.0
LONGEST_SOCKET = 80
"""Of 104 bytes that a Unix socket's path may have (108 on Linux) ssh adds 17 while it makes one."""
PASSED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TERM", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
"""What of this process's variables ssh and rsync get: neither needs a token, and ssh's master lives on for a minute."""
RECEIVE = ("-rt", "--no-links", "--no-devices", "--no-specials", "--no-inc-recursive")
"""Plain files and folders; no modes, owners or links of a stranger's. Every name is known, and checked by rsync, before
the first file is written (CVE-2024-12087 needs inc-recursive)."""
CHANGED = ("REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key verification failed")
SKIPPED = b'skipping non-regular file "'
PROGRESS = re.compile(rb"\s*([\d,]+)\s+\d+%\s")
STATS = (r"Total transferred file size: ([\d,]+) bytes", r"Number of regular files transferred: ([\d,]+)")
GREETING = "is your shell clean"
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
MAX_OUTPUT_BYTES = 64 << 20
"""Bytes that a command in the pod may say: a pod that never stops would fill this machine's memory."""


class LostError(RunnerError):
    """The connection could not be made, or broke: the command may have run."""


class HostKeyError(LostError):
    """Another machine answers at the pod's address: nothing is sent to it."""


class PodGoneError(RunnerError):
    """The pod is gone, or its files are."""


class CommandError(RunnerError):
    """A command in the pod failed."""


def check_installed() -> None:
    """CannotRunError without ssh or rsync on this machine."""
    for name, package in (("ssh", "openssh-client"), ("rsync", "rsync")):
        if shutil.which(name) is None:
            what = f"{name}, which carries the run to a pod, is not installed"
            raise CannotRunError(Problem(what, "where", f"install it: apt-get install {package}"))


def environment() -> dict[str, str]:
    """Environment variables of ssh and rsync."""
    return {name: value for name in PASSED if (value := os.environ.get(name)) is not None}


def hosts_dir() -> Path:
    """The folder of the host keys of pods, one file per pod and address."""
    return state_dir() / "hosts"


def forget_host_key(pod_id: str) -> None:
    """Delete the host key of a pod that is gone, or whose container is made anew."""
    with suppress(OSError):
        for file in hosts_dir().glob(f"{glob.escape(pod_id)}@*"):
            file.unlink()


def _folder() -> Path:
    """For the socket of one login: `$TMPDIR` may be too long for one."""
    place = None if len(os.fsencode(tempfile.gettempdir())) < LONGEST_SOCKET - 30 else "/tmp"
    return Path(tempfile.mkdtemp(prefix="runner-ssh-", dir=place))


@dataclass
class Connection:
    """An SSH connection to one pod. Commands raise LostError where the connection fails, CommandError where they do."""

    name: str
    """The pod's id, under which its host key is kept."""
    host: str
    port: int
    key: Path
    user: str = "root"
    hosts: Path = field(default_factory=hosts_dir)
    """Where the keys of pods are kept: one that changes between two commands, or years, is refused."""
    _folder: Path = field(default_factory=_folder)

    @property
    def known_hosts(self) -> Path:
        """Return the known-hosts file for this pod at this address."""
        return self.hosts / f"{self.name}@{self.host}:{self.port}"

    def words(self, *more: str) -> list[str]:
        """`ssh` with all options, up to the host."""
        with suppress(OSError):  # a full disk: ssh goes on, and knows the pod for this login alone
            self.hosts.mkdir(mode=0o700, parents=True, exist_ok=True)
        own = {
            **OPTIONS,
            "HostKeyAlias": self.name,
            "UserKnownHostsFile": '"' + str(self.known_hosts.absolute()).replace("%", "%%") + '"',
            "GlobalKnownHostsFile": "/dev/null",
            "ControlPath": str(self._folder / f"{self.port}").replace("%", "%%"),
        }
        options = [word for name, value in own.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "/dev/null", "-i", str(self.key), "-p", str(self.port), *options, *more]

    def moved(self, host: str, port: int) -> None:
        """The pod has another address now."""
        if (host, port) != (self.host, self.port):
            self._leave()
            self.host, self.port = host, port

    def run(self, command: str, *, stdin: bytes = b"", seconds: float = ANSWER_SECONDS, check: bool = True) -> str:
        """Run a command in the pod's shell and return its output. `stdin` carries what no argument list may show."""
        code, said, wrong = self.attempt(command, stdin=stdin, seconds=seconds)
        if check and code:
            first = command.strip().splitlines()[0][:80]
            raise CommandError(Problem(f"in the pod: `{first}` failed ({code}): {_last(wrong or said)}"))
        return said

    def attempt(self, command: str, *, stdin: bytes = b"", seconds: float = ANSWER_SECONDS) -> tuple[int, str, str]:
        """Exit code, output and error output of a command."""
        process = self.open(command, subprocess.PIPE)
        try:
            said, wrong = read_bounded(process, stdin, seconds)
        except subprocess.TimeoutExpired:
            self._leave()
            raise LostError(Problem(f"the pod did not answer within {seconds:.0f} s")) from None
        except OutputTooLongError as error:
            self._leave()
            raise CommandError(*error.problems) from None
        if process.returncode == SSH_FAILED:
            self._leave()
            raise self._lost(wrong, "the pod cannot be reached by SSH")
        return process.returncode, said, wrong

    def open(self, command: str, stderr: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        """Start a command with pipes; it is out of the reach of the terminal's Ctrl-C."""
        words = [*self.words(f"{self.user}@{self.host}"), command]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=stderr, start_new_session=True, env=environment()
        )

    def put(self, sources: Sequence[Path | str], target: str, options: Sequence[str] = ()) -> None:
        """Send files or folders; one that was broken off goes on where it was."""
        self._rsync(["-rlptD", *options, *map(str, sources), f"{self.user}@{self.host}:{target}"])

    def get(self, source: str, target: Path, options: Sequence[str] = (), most: int | None = None) -> list[str]:
        """Bring a file or folder here; the names of what was left there, for it is neither: links, devices.

        TooMuchError, before anything is written, where it is more than `most` bytes; also for a pod that says less
        and sends more.
        """
        words = [*RECEIVE, *options, f"{self.user}@{self.host}:{source}", str(target)]
        if most is not None:
            told: list[str] = []
            self._rsync(["--dry-run", "--stats", *words], told=told)
            size, files = (_number(pattern, told) for pattern in STATS)
            untrusted_files.check_size(size, files, most, target)
        return self._rsync(words, most=most, target=target)

    def _rsync(
        self, words: list[str], *, most: int | None = None, target: Path = Path(), told: list[str] | None = None
    ) -> list[str]:
        # --append-verify would trust a partial file's length; --partial compares its blocks.
        command = ["rsync", "--partial", "--timeout=60", "--protect-args", "--info=progress2", "--outbuf=N"]
        process = subprocess.Popen(
            [*command, "-e", shlex.join(self.words()), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, start_new_session=True, env=environment(),
        )  # fmt: skip
        with process:
            try:
                wrong = StderrTail(process.stderr)  # read all the while: a full pipe would stop the transfer for ever
                skipped, arrived = _tell(process, most, told)
                if most is not None and arrived > most:
                    raise untrusted_files.too_much_error("the pod sends more than it announced", most, target)
                complaint = wrong.text()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # rsync is two processes here
                raise
        code = process.returncode
        if GREETING in complaint:
            raise CommandError(greeting_problem("something"))
        if code in RSYNC_LOST:
            raise self._lost(complaint, "the connection broke while files were carried")
        if code:
            raise CommandError(Problem(f"rsync failed ({code}): {_last(complaint)}"))
        return skipped

    def _lost(self, wrong: str, what: str) -> LostError:
        if not any(words in wrong for words in CHANGED):
            return LostError(Problem(f"{what}: {_last(wrong)}"))
        what = f"pod {self.name} at {self.host}:{self.port} shows another host key than before: nothing was sent to it"
        remedy = "the connection may be intercepted; if you started the pod again by hand, delete the old key: rm "
        return HostKeyError(Problem(what, None, remedy + shlex.quote(str(self.known_hosts))))

    def close(self) -> None:
        """Log out, forget the pod."""
        self._leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _leave(self) -> None:
        with suppress(OSError, subprocess.TimeoutExpired):
            words = [*self.words("-O", "exit"), f"{self.user}@{self.host}"]
            subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, env=environment())


def connection_to(pod: Pod, key: Path) -> Connection:
    """A connection to a pod that has an address, by a run's private key; nothing is sent yet."""
    return Connection(pod.id, str(pod.ssh_host), int(pod.ssh_port or 22), key, pod.ssh_user)


def greeting_problem(what: str) -> Problem:
    """Problem: the pod's shell prints something before every command's own output, which breaks file transfers."""
    remedy = "let the image's ~/.bashrc say it in interactive shells alone; its first line: [[ $- == *i* ]] || return"
    return Problem(f"the pod's shell prints {what} before the output of every command", "where.image", remedy)


def _tell(process: subprocess.Popen[Any], most: int | None, told: list[str] | None) -> tuple[list[str], int]:
    """What rsync has skipped, and how many bytes have arrived by its progress (`12,345,678  45%  10.2MB/s  0:00:07`):
    reading ends with more than `most`. Its own words are added to `told`."""
    assert process.stdout is not None
    rest, skipped, arrived = b"", [], 0
    while block := process.stdout.read1(4096):  # type: ignore[attr-defined]  # a BufferedReader
        *lines, rest = re.split(rb"[\r\n]", rest[-LONGEST_SOCKET * 1024 :] + block)
        skipped += [
            ascii(line[len(SKIPPED) :].decode(errors="replace").strip('"')) for line in lines if SKIPPED in line
        ]
        shown = [line for line in lines if line.strip()]
        if told is not None:
            told += [line.decode(errors="replace") for line in shown if line[:1].isupper()]
        for line in shown:
            if found := PROGRESS.match(line):
                arrived = int(found[1].replace(b",", b""))
        if most is not None and arrived > most:
            break
    return skipped, arrived


def _number(pattern: str, lines: list[str]) -> int:
    return next((int(found[1].replace(",", "")) for line in lines if (found := re.match(pattern, line))), 0)


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no output"])[-1]


class OutputTooLongError(RunnerError):
    """A command in the pod says more than any answer has."""


class StderrTail:
    """The last 64 kB of a process's standard error, read as it comes."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._blocks: deque[bytes] = deque(maxlen=16)
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream, suppress(OSError, ValueError):
            while block := stream.read1(4096):  # type: ignore[attr-defined]  # a BufferedReader
                self._blocks.append(block)

    def text(self) -> str:
        """What was kept, once the process has closed the stream."""
        self._thread.join(10)
        return b"".join(self._blocks).decode(errors="replace")


def read_bounded(process: subprocess.Popen[bytes], stdin: bytes, seconds: float) -> tuple[str, str]:
    """Output and error output of a command; TimeoutExpired after so long, OutputTooLongError where it does not stop."""
    assert process.stdin is not None and process.stdout is not None
    said: list[bytes] = []

    def read(stream: IO[bytes]) -> None:
        with stream:
            said.append(stream.read(MAX_OUTPUT_BYTES + 1))
        if len(said[0]) > MAX_OUTPUT_BYTES:
            process.kill()

    def write(stream: IO[bytes]) -> None:
        with suppress(OSError), stream:
            stream.write(stdin)

    wrong = StderrTail(process.stderr)
    threads = [threading.Thread(target=read, args=(process.stdout,), daemon=True),
               threading.Thread(target=write, args=(process.stdin,), daemon=True)]  # fmt: skip
    try:
        for thread in threads:
            thread.start()
        process.wait(seconds)
        threads[0].join(10)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if said and len(said[0]) > MAX_OUTPUT_BYTES:
        raise OutputTooLongError(
            Problem(f"the pod says more than {MAX_OUTPUT_BYTES >> 20} MiB where it was asked a question")
        )
    return b"".join(said).decode(errors="replace"), wrong.text()
