"""Join a run that another machine has created: start this machine's ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote

from rich.console import Console

from runner.errors import InterruptedRun, Problem, RequestError, Rewind, RunFailedError, RunnerError
from runner.launcher import local, supervisor, torchrun
from runner.launcher.explain_failure import (
    failed_by_itself,
    failed_report,
    how_to_resume,
    slowest_rank,
    torchrun_problem,
)
from runner.plan.worker_environment import MEETING_SECONDS
from runner.report.text import print_problems
from runner.rundir.directory import RunDir, display_path, is_alive, run_folder, write_atomically
from runner.spec import RunSpec

WAITING = ("created", "rewinding")
"""States of a run whose first machine waits for the others."""


def join(run_dir: Path, address: str | None, node: int | None, attached: bool, console: Console) -> int:
    """Take part in the run until it ends; this machine's exit code, 130 where the run was interrupted.

    `node` is given by the first machine, which knows the others from its hostfile and holds this process's standard
    input as long as it lives (`attached`). RequestError for a run that is not there, or that waits for nobody.
    """
    run = RunDir(run_folder(run_dir).absolute())
    spec = _read(run, display_path(run_dir))
    if not attached:
        _check_waiting(run, spec)
    local.check_here(spec)
    if attached:
        threading.Thread(target=_end_with_input, daemon=True).start()
    with _number(run, spec, node) as number:
        each = spec.hw.processes_per_node
        what = f"machine {number + 1} of {spec.hw.num_nodes}, {each} process{'es' * (each > 1)}"
        console.print(f"Joins   {display_path(run.path)}: {what}", highlight=False, soft_wrap=True)
        while True:
            supervisor.remove_reports(run, torchrun.ranks_of(spec, number))
            code = _attempt(run, spec, number, address)
            if code != Rewind.exit_code:
                return code


def _read(run: RunDir, typed: str) -> RunSpec:
    """The run as the first machine resolved it."""
    if not run.spec_file.is_file():
        what = f"there is no run {typed} on {socket.gethostname()}"
        remedy = (
            "start it on the first machine, which prints its folder; "
            "run.output_dir must be one that all machines share, at the same place"
        )
        raise RequestError(Problem(what, "command line", remedy))
    try:
        return run.spec
    except RequestError:
        remedy = "use the same version on all machines"
        raise RequestError(Problem(f"{typed}/spec.json is not a run of this version", "command line", remedy)) from None


def _check_waiting(run: RunDir, spec: RunSpec) -> None:
    nodes, state = spec.hw.num_nodes, run.status.get("state")
    if nodes == 1:
        remedy = "several machines: hw.num_nodes=2 hw.rendezvous=HOST:29500, on the first one"
        raise RequestError(Problem(f"{run.id} is a run of one machine", "command line", remedy))
    if state not in WAITING:
        remedy = f"on the first machine: python -m runner resume {quote(display_path(run.path))}; then type this again"
        raise RequestError(Problem(f"{run.id} waits for no machine: it is {state}", "command line", remedy))


@contextmanager
def _number(run: RunDir, spec: RunSpec, given: int | None) -> Iterator[int]:
    """This machine's number: the given one, else the first that nobody has claimed with a file in the run's folder."""
    if given is not None:
        yield given
        return
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    taken = []
    for number in range(1, spec.hw.num_nodes):
        file = run.path / "logs" / f"node{number}.json"
        try:
            with file.open("x", encoding="utf-8") as stream:
                json.dump(here, stream)
        except FileExistsError:
            holder = RunDir(file.parent).read(file.name)
            if holder.get("host") != here["host"] or is_alive(holder.get("pid")):
                taken.append(str(holder.get("host", "another machine")))
                continue
            write_atomically(file, json.dumps(here))
        try:
            yield number
        finally:
            file.unlink(missing_ok=True)
        return
    what = f"all {spec.hw.num_nodes} machines are there: the first one and {', '.join(taken)}"
    raise RequestError(Problem(what, "command line", "hw.num_nodes says how many there are"))


def _attempt(run: RunDir, spec: RunSpec, node: int, address: str | None) -> int:
    """Until this machine's processes end; its exit code, or `Rewind`'s."""
    own, began = torchrun.ranks_of(spec, node), time.monotonic()
    ending, who = local.start_and_watch(run, spec, node=node, address=address)
    met = ending.ranks or time.monotonic() - began < MEETING_SECONDS
    if run.status.get("state") == "rewinding" and met:
        return Rewind.exit_code
    states = {sign["state"] for sign in ending.ranks}
    if ending.code == 0:
        return InterruptedRun.exit_code if "interrupted" in states else 0
    if not any(map(failed_by_itself, ending.ranks)) and ("interrupted" in states or ending.interrupted):
        return InterruptedRun.exit_code
    if not any(map(failed_by_itself, [*ending.ranks, *supervisor.failed_elsewhere(run, own)])):
        _speak(run, ending, own, node, who() == "kernel")
    print_problems(Console(stderr=True), _error(run, own), started=True)
    return RunFailedError.exit_code


def _speak(run: RunDir, ending: supervisor.Ending, own: range, node: int, by_kernel: bool) -> None:
    """A word for the process that could say none: the first machine reads it where the process would have left it."""
    ended = [rank for rank, number in ending.killed.items() if number == signal.SIGKILL]
    killed = [rank for rank in ended if rank not in ending.stopped]
    silent = killed or [sign["rank"] for sign in ending.ranks if sign["state"] == "alive"]
    how = "ended by SIGKILL" if killed else "gone without a message"
    if killed and by_kernel:
        how = "killed by the kernel for want of memory"
    if ending.hung is not None:
        rank, problem = ending.hung["rank"], slowest_rank(run, ending).problems[0]
    elif silent:
        rank, problem = (
            silent[0],
            Problem(f"rank {silent[0]} was {how}; the others were stopped", None, how_to_resume(run)),
        )
    elif not ending.ranks:
        rank, problem = own[0], torchrun_problem(run, ending, torchrun.log_of(node))
    else:
        return
    problem = replace(problem, source=f"machine {node + 1}, {socket.gethostname()}")
    error = {"what": problem.what, "problems": [vars(problem)], "exit_code": RunFailedError.exit_code}
    facts = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "state": "failed", "ended": time.time()}
    write_atomically(run.path / "logs" / f"rank{rank}.json", json.dumps({**facts, "error": error}))


def _error(run: RunDir, own: range) -> RunnerError:
    """The first error, here or on another machine."""
    said = [
        *(s for s in supervisor.rank_reports(run, own) if s["state"] == "failed"),
        *supervisor.failed_elsewhere(run, own),
    ]
    said = [s for s in said if s["state"] == "failed"]
    if not said:
        return RunFailedError(Problem("another machine ended the run", None, "its terminal says why"))
    return failed_report(run, min(said, key=lambda sign: (not failed_by_itself(sign), float(sign["ended"]))))


def _end_with_input() -> None:
    """SIGTERM to this process, as from a user, when the first machine has let go of it."""
    while os.read(0, 1024):  # not through sys.stdin: its lock, held here, would make the interpreter abort at its end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
