"""Worker processes of a sweep, forked on a CPU from one process that has torch and transformers loaded.

A run of three steps of a tiny model takes 9 s on two cores, of which 6 are imports (`python -m benchmarks sweep`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TextIO

from runner.launcher.supervisor import Process
from runner.launcher.torchrun import process_environment
from runner.plan.worker_environment import several
from runner.rundir import lock
from runner.rundir.directory import RunDir, is_alive
from runner.spec import RunSpec

LOST = -signal.SIGKILL
"""The exit code of a worker whose end nobody saw: the process that forked it was killed, and took it along."""
LEAVING_SECONDS = 60.0
"""A worker that lost the process it came from saves a checkpoint, and is killed where it takes longer."""


def can_fork(spec: RunSpec) -> bool:
    """Return True for one process on a CPU, on a Linux that can wait for it. CUDA does not survive a fork."""
    if (
        spec.where.name != "local"
        or spec.hw.accelerator != "cpu"
        or spec.hw.num_nodes > 1
        or several(spec)
        or sys.platform != "linux"
    ):
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:  # Linux before 5.3, or a sandbox that does not know the call
        return False
    return True


@dataclass
class _Warm:
    """The process that forks."""

    process: subprocess.Popen[Any]
    connection: socket.socket
    environment: dict[str, str]

    @classmethod
    def started(cls, variables: dict[str, str]) -> _Warm:
        here, there = socket.socketpair()
        with there:
            process = subprocess.Popen(
                [sys.executable, "-m", "runner.train.fork_server", str(there.fileno())],
                env=variables,
                start_new_session=True,
                pass_fds=(there.fileno(),),
            )
        return cls(process, here, variables)

    def close(self) -> None:
        """End it; a worker that is still there gets SIGTERM from the kernel."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


@dataclass
class WarmWorkers:
    """Starts the runs of a sweep one after the other; a run whose environment differs gets a new process."""

    say: Callable[[str], None] = lambda line: None
    """Told what the user is waiting for."""
    _warm: _Warm | None = field(default=None, init=False)

    def __reduce__(self) -> tuple[type[WarmWorkers], tuple[()]]:
        """Without its process: Hydra launchers that use processes of their own pickle what they run."""
        return WarmWorkers, ()

    def prepare(self, spec: RunSpec) -> None:
        """Have the process for such a run import its libraries, while the sweep's other points are being checked."""
        if not can_fork(spec):
            return
        variables = process_environment(spec)
        if self._warm is not None and (self._warm.environment != variables or self._warm.process.poll() is not None):
            self.close()
        if self._warm is None:
            self.say("Loading torch and transformers, once for all runs of the sweep …")
            self._warm = _Warm.started(variables)

    def start(self, run: RunDir, spec: RunSpec, stdout: TextIO | None, cold: Callable[[], Process]) -> Process:
        """A worker for `run`, by `cold` where it cannot be forked."""
        self.prepare(spec)
        if self._warm is None or not can_fork(spec):
            return cold()
        order = {"argv": [str(run.spec_file)], "cwd": os.getcwd()}
        handles = [1 if stdout is None else stdout.fileno(), 2, *lock.inherited_locks()]
        try:
            socket.send_fds(self._warm.connection, [json.dumps(order).encode()], handles)
        except OSError:  # it has just died
            self.close()
            return cold()
        return _Forked(self._warm, cold)

    def close(self) -> None:
        """End the process that forks."""
        if self._warm is not None:
            self._warm.close()
            self._warm = None


class _Forked:
    """A worker that is a child of the warm process."""

    def __init__(self, warm: _Warm, cold: Callable[[], Process]) -> None:
        self._warm, self._start_cold = warm, cold
        self._cold: Process | None = None
        self._child: int | None = None
        self._code: int | None = None
        self._read = b""

    @property
    def pid(self) -> int:
        """Its own, or that of the process that is about to fork it."""
        if self._cold is not None:
            return self._cold.pid
        return self._warm.process.pid if self._child is None else self._child

    def wait(self, timeout: float | None = None) -> int:
        """As of a `subprocess.Popen`."""
        if self._cold is not None:
            return self._cold.wait(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            left = None if end is None else max(0.0, end - time.monotonic())
            self._warm.connection.settimeout(left or (None if left is None else 1e-3))
            try:
                words = self._warm.connection.recv(4096)
            except TimeoutError:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0) from None
            except OSError:
                words = b""
            if not words:
                self._code = self._lost()
                if self._code is None:
                    self._cold = self._start_cold()
                    return self._cold.wait(timeout)
                return self._code
            self._read += words
            *lines, self._read = self._read.split(b"\n")
            for facts in map(json.loads, lines):
                self._child = facts.get("pid", self._child)
                self._code = facts.get("code", self._code)
        return self._code

    def _lost(self) -> int | None:
        """The exit code where the warm process is gone, and with it the worker, whom the kernel asked to leave. None
        where there was none yet, and no signal of ours was the reason: it failed at an import, which a worker reports.
        """
        code = self._warm.process.wait()
        if self._child is None:
            return code if code in (-signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL) else None
        end = time.monotonic() + LEAVING_SECONDS
        while is_alive(self._child) and time.monotonic() < end:
            time.sleep(0.1)
        if is_alive(self._child):
            os.kill(self._child, signal.SIGKILL)
        return LOST

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self._cold is not None:
            self._cold.kill()
        elif self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
