"""The emulator as a command: in the foreground, until it is told to stop."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from runner.emulator.container import sshd
from runner.emulator.faults import Fault, parsed
from runner.emulator.server import Emulator
from runner.errors import CannotRunError, Problem, RequestError

REALISTIC = {"provision_s": 8.0, "pull_s": 28.0, "runtime_s": 5.0, "ssh_delay_s": 6.0, "restart_s": 2.0}
"""With an image that the machine has already; without it the pull alone takes 9 to 13 minutes."""


def serve(console: Console, port: int, root: Path | None, faults: list[Fault], with_s3: bool, **settings: Any) -> int:
    """Exit code 0 after SIGINT or SIGTERM. RequestError for a port in use; CannotRunError without sshd."""
    if sys.platform != "linux":
        what = "an emulated pod is made of what only Linux has"
        raise CannotRunError(Problem(what, "emulate", "run it in a Linux container or virtual machine"))
    if sshd() is None:
        what = "there is no sshd on this machine, and an emulated pod is a real ssh server"
        raise CannotRunError(Problem(what, "emulate", "install it: apt-get install openssh-server rsync"))
    speed = settings.pop("speed", 1.0)
    with _folder(root) as folder, _started(folder, port, settings) as emulator:
        emulator.clock.set_speed(speed)
        for fault in faults:
            emulator.world.inject(fault)
        # Whole lines at any width: they are pasted into a shell.
        say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        for name, value in {**emulator.env, **(emulator.serve_s3() if with_s3 else {})}.items():
            say(f"export {name}={shlex.quote(value)}")
        say(f"# a RunPod on this machine, until Ctrl-C; faults: POST {emulator.url}/_emulator/faults")
        stop.wait()
        say(f"# billed {emulator.billed():.4f} US$ that nobody pays; {len(emulator.pods())} pods ended")
    return 0


def faults_of(texts: tuple[str, ...]) -> list[Fault]:
    """Of the command line; RequestError with all that are none."""
    found, problems = [], []
    for text in texts:
        try:
            found.append(parsed(text))
        except ValueError as error:
            problems.append(Problem(str(error), f"--fault {text}", "docs/emulator.md has them all"))
    if problems:
        raise RequestError(*problems)
    return found


@contextlib.contextmanager
def _folder(root: Path | None) -> Iterator[Path]:
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="runner-emulator-", ignore_cleanup_errors=True) as made:
        yield Path(made)


def _started(root: Path, port: int, settings: dict[str, Any]) -> Emulator:
    try:
        return Emulator(root, port, **settings)
    except OSError as error:
        what = f"port {port} of 127.0.0.1 cannot be listened on: {error.strerror}"
        raise RequestError(Problem(what, "--port", "leave --port out for any free one")) from None
