"""The fork server of a sweep: imports the worker's libraries once and forks a worker per run.

`python -m runner.train.fork_server FD`, where FD is one end of a Unix socket. An order is one JSON line with the file
descriptors of the run (standard output, standard error, its lock); the answers are `{"pid": …}` and, at the run's end,
`{"code": …}`, negative for a signal. The process ends with the socket, and its worker with it (SIGTERM).
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from runner.machine.processes import die_with_parent
from runner.train.__main__ import main, quiet_environment

MOST_BYTES, MOST_FDS = 65536, 16
IMPORTS = (
    "runner.train.worker", "runner.train.preload", "runner.report.summary", "runner.train.trainers.callbacks",
    "runner.train.heartbeat", "matplotlib.pyplot",
    "deepspeed",  # TRL imports it wherever it is installed: 0.4 s, as much as the plot's library
)  # fmt: skip


def serve(front: socket.socket) -> list[str] | None:
    """Fork a worker for every order; the arguments of `main` in a worker, None where there are no more orders."""
    whole = True
    while True:
        words, handles, _, _ = socket.recv_fds(front, MOST_BYTES, MOST_FDS)
        if not words:
            return None
        order = json.loads(words)
        with suppress(OSError):  # which is the worker's to say
            os.chdir(order["cwd"])  # paths in the spec are relative to it
        whole = whole and _prepared(order["argv"][0])
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            front.close()
            os.setsid()
            die_with_parent(parent)
            os.dup2(handles[0], 1)
            os.dup2(handles[1], 2)
            for handle in handles[:2]:
                os.close(handle)
            os.chdir(order["cwd"])
            argv: list[str] = order["argv"]
            if _spoilt() or not whole:
                for handle in handles[2:]:
                    os.set_inheritable(handle, True)
                os.execv(sys.executable, [sys.executable, "-m", "runner.train", *argv])
            return argv
        for handle in handles:  # the lock belongs to the worker: it is free when the worker is gone
            os.close(handle)
        _answer(front, pid=pid)
        if not _ended(pid, front):
            return None
        _answer(front, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _prepared(spec_file: str) -> bool:
    """Load what the run would, if it can be shared; False where this process can no longer be forked."""
    name = "runner.train.preload"
    if name not in sys.modules:  # torch could not be imported: the worker says why
        return True
    whole: bool = sys.modules[name].prepare(Path(spec_file))
    gc.collect()
    gc.freeze()
    return whole


def _spoilt() -> bool:
    """A library asked for CUDA before the fork, so that this process can have no GPU: it has to start from nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda._is_in_bad_fork())


def _answer(front: socket.socket, **facts: int) -> None:
    with suppress(OSError):  # nobody listens any more: the next read says so
        front.sendall(json.dumps(facts).encode() + b"\n")


def _ended(pid: int, front: socket.socket) -> bool:
    """Wait for the worker's end; False where the one that gave the order has gone before."""
    handle = os.pidfd_open(pid)
    try:
        return handle in select.select([handle, front.fileno()], [], [])[0]
    finally:
        os.close(handle)


def _load() -> None:
    """Import before the first fork. What fails here fails again in the worker, which says so."""
    quiet_environment()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    for name in IMPORTS:
        with suppress(Exception):
            import_module(name)
    gc.collect()
    gc.freeze()  # what is shared stays shared: a collection writes into every object it looks at


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent(os.getppid(), signal.SIGKILL)
    _load()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        asked = serve(connection)
    if asked is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main(asked))
