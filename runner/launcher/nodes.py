"""Other machines of a hostfile: checked before the run, started over ssh, ended with the run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from runner import __version__
from runner.errors import CannotRunError, Problem
from runner.machine import hostfile
from runner.machine.hostfile import Host
from runner.rundir.directory import RunDir, display_path, text_of
from runner.spec import RunSpec

# No questions: nobody is there to answer. 10 s for a machine that does not answer, where TCP waits for two minutes; and
# a connection that is dead for a minute is given up.
OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=20")
CARRIED = ("PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "RUNNER_CACHE")
"""Variables that say where things are, for machines whose folders are the same. No keys: those stand in the other
machine's own environment, and never in an argument list."""
PROBE_SECONDS = 60.0
LEAVE_SECONDS = 15.0
"""Seconds for the other machines to end by themselves after a successful run, and after a signal."""
BROKEN_SECONDS = 3.0
"""The same after any other end, which they may not have noticed: they may still wait to meet."""
SSH_FAILED = 255
"""ssh(1): the connection failed; any other code is the command's."""


@dataclass
class RemoteNodes:
    """The machines besides the first, each behind its ssh."""

    run: RunDir | None = None
    hosts: list[tuple[int, Host, subprocess.Popen[Any]]] = field(default_factory=list)
    """Number, line of the hostfile, process."""
    well: bool = False
    """The run ended well: they will, too."""

    def lost(self) -> Problem | None:
        """The first that has ended otherwise than well."""
        for node, host, process in self.hosts:
            if process.poll() not in (None, 0, 130) and self.run is not None:
                return _ended(self.run.path / "logs" / log_of(node), host, int(process.returncode))
        return None


NOBODY = RemoteNodes()


def log_of(node: int) -> str:
    """The file in `logs/` with what a machine that was started by ssh says."""
    return f"node{node}.log"


def check_nodes(spec: RunSpec) -> None:
    """CannotRunError where this is not the hostfile's first machine, or another one cannot be reached and used."""
    hosts = hostfile.hosts_of(spec.hw)
    if len(hosts) > 1:
        _check(tuple(hosts), str(spec.hw.hostfile), os.getcwd())


@cache
def _check(hosts: tuple[Host, ...], file: str, folder: str) -> None:
    """Once for all points of a sweep."""
    first = hosts[0]
    if not hostfile.is_own(first.address):
        what = f"this machine is not {first.name}, the first of {file}"
        raise CannotRunError(Problem(what, first.place, f"type the command on {first.name}, or put this machine first"))
    if shutil.which("ssh") is None:
        what = "ssh, which starts the other machines, is not installed"
        remedy = "install it (apt-get install openssh-client), or write hw.num_nodes and hw.rendezvous and join by hand"
        raise CannotRunError(Problem(what, "hw.hostfile", remedy))
    words = [sys.executable, "-m", "runner", "--version"]
    probes = [(host, _start(host, words, folder, subprocess.PIPE)) for host in hosts[1:]]
    problems = [problem for host, process in probes if (problem := _unfit(host, process, folder))]
    if problems:
        raise CannotRunError(*problems)


def _unfit(host: Host, process: subprocess.Popen[Any], folder: str) -> Problem | None:
    """Why a machine cannot take part, by what it answered; None where it can."""
    try:
        answer = process.communicate(timeout=PROBE_SECONDS)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        answer = f"no answer within {PROBE_SECONDS:.0f} s"
    said = _last(answer)
    if process.returncode == SSH_FAILED or process.returncode < 0:
        by_hand = shlex.join(["ssh", "-o", "BatchMode=yes", host.name, "true"])
        remedy = f"make `{by_hand}` work: a key without a passphrase (ssh-copy-id), the host's own key known"
        return Problem(f"{host.name} cannot be reached by ssh: {said}", host.place, remedy)
    if process.returncode:
        remedy = f"the folder {folder} and the Python {sys.executable} must be there, too: on a shared disk, say"
        return Problem(f"{host.name} cannot start the runner: {said}", host.place, remedy)
    if not said.endswith(f" {__version__}"):
        what = f"{host.name} has another version of the runner: {said}, and here it is {__version__}"
        return Problem(what, host.place, "install the same on both")
    return None


@contextmanager
def started_nodes(run: RunDir, spec: RunSpec) -> Iterator[RemoteNodes]:
    """The other machines at work on `run`, until the block ends; none where there is no hostfile."""
    others = RemoteNodes(run)
    try:
        for node, host in enumerate(hostfile.hosts_of(spec.hw)[1:], 1):
            folder = str(run.path.absolute())
            words = [sys.executable, "-m", "runner", "join", folder, "--node", str(node), "--attached"]
            with (run.path / "logs" / log_of(node)).open("wb") as log:
                others.hosts.append((node, host, _start(host, words, os.getcwd(), log)))
        yield others
    finally:
        _end([process for _, _, process in others.hosts], LEAVE_SECONDS if others.well else BROKEN_SECONDS)


def _start(host: Host, words: list[str], folder: str, output: Any) -> subprocess.Popen[Any]:
    """A command on another machine. It ends when its standard input does, which is as long as this process lives."""
    carried = [f"{name}={os.environ[name]}" for name in CARRIED if os.environ.get(name)]
    command = f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *carried, *words])}"
    return subprocess.Popen(
        ["ssh", *OPTIONS, host.name, command],
        stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for the workers, who agree on the step after which they save
    )  # fmt: skip


def _end(processes: list[subprocess.Popen[Any]], seconds: float) -> None:
    """They end with the run by themselves; those that do not are told to by the end of their input, then left."""
    _wait(processes, seconds)
    for process in processes:
        with suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
    _wait(processes, LEAVE_SECONDS)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _wait(processes: list[subprocess.Popen[Any]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))


def _ended(log: Path, host: Host, code: int) -> Problem:
    lost, ended = f"the connection to {host.name} was lost", f"{host.name} ended with exit code {code}"
    how = lost if code == SSH_FAILED else ended
    return Problem(f"{how}: {_last(text_of(log))}", host.place, f"what it said is in {display_path(log)}")


def _last(text: str) -> str:
    """The last line that says something; a remedy belongs to the line before."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("•")]
    return (told or lines or ["no output"])[-1].removeprefix("•").strip()
