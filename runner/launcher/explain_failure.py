"""Explain, once, why a run's processes ended: which rank failed, the cause and the remedy."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from runner.errors import InterruptedRun, Problem, Rewind, RunFailedError, RunnerError
from runner.launcher.oom_report import write_report
from runner.launcher.supervisor import GRACE_SECONDS, LAUNCHER_LOG, Ending, failed_elsewhere, has_failed
from runner.launcher.torchrun import ranks_of
from runner.machine.processes import Killer
from runner.plan.worker_environment import several
from runner.report.failure_causes import GPU_MEMORY, SECONDARY, cause_of
from runner.report.text import print_problems
from runner.rundir import checkpoints
from runner.rundir.directory import ACTIVE, RunDir, display_path, text_of
from runner.rundir.json_files import Heartbeat
from runner.spec import RunSpec

TAIL = 20_000
"""Characters at the end of a log in which a cause is looked for."""


def report_ending(run: RunDir, spec: RunSpec, ending: Ending, killer: Callable[[], Killer]) -> int:
    """The run's exit code; says why it failed, unless the worker did, and keeps that in `status.json`."""
    state = run.status.get("state")
    if ending.code == 0 and state == "interrupted":  # torchrun would call any other code of a worker's a failure
        told = [failed_report(run, sign) for sign in ending.ranks if sign["state"] == "interrupted"]
        print_problems(Console(stderr=True), told[0] if told else InterruptedRun("interrupted"))
        return InterruptedRun.exit_code
    if ending.code == 0 or ending.code == Rewind.exit_code or state == "rewinding":
        return Rewind.exit_code if state == "rewinding" else 0
    if state == "done" and ending.ranks and all(sign["state"] == "done" for sign in ending.ranks):
        return 0  # a signal that came while Python was leaving: everything is written
    if spec.hw.num_nodes > 1:
        ending = _with_others(run, spec, ending)
    if ending.hung is not None:
        return _say(run, slowest_rank(run, ending))
    if run.status.get("oom"):
        print_problems(Console(stderr=True), write_report(run, spec))
        return 1
    if several(spec):
        return _of_several(run, spec, ending, killer)
    if ending.code < 0 and ending.interrupted:
        return _interrupted(run)
    if ending.code == -signal.SIGKILL:
        print_problems(Console(stderr=True), write_report(run, spec, killer()))
        return 1
    if ending.code < 0:  # killed from outside: the worker could not say so itself
        what = f"the worker was ended by {signal.Signals(-ending.code).name}"
        return _say(run, RunFailedError(Problem(what, None, how_to_resume(run))))
    if run.state() in (*ACTIVE, "killed"):
        if ending.code == InterruptedRun.exit_code:  # by a second signal: the worker left without a word
            return _interrupted(run)
        run.set_status("failed", exit_code=ending.code, error=f"the worker ended with exit code {ending.code}")
    return ending.code


def _with_others(run: RunDir, spec: RunSpec, ending: Ending) -> Ending:
    """With what was said on other machines: the cause may be there, where this one only lost the connection."""
    deadline = time.monotonic() + (0 if ending.lost or ending.interrupted else GRACE_SECONDS)
    while True:
        others = failed_elsewhere(run, ranks_of(spec, 0))
        if any(failed_by_itself(sign) for sign in [*ending.ranks, *others]) or time.monotonic() > deadline:
            return replace(ending, ranks=[*ending.ranks, *others])
        time.sleep(0.2)


def _interrupted(run: RunDir) -> int:
    """By a signal for which the processes did not stop together."""
    error = checkpoints.interrupted(run)
    run.set_status("interrupted", exit_code=error.exit_code, error=str(error))
    print_problems(Console(stderr=True), error)
    return error.exit_code


def _say(run: RunDir, error: RunnerError) -> int:
    run.set_status("failed", exit_code=error.exit_code, error=str(error))
    print_problems(Console(stderr=True), error, started=True)
    return error.exit_code


def _of_several(run: RunDir, spec: RunSpec, ending: Ending, killer: Callable[[], Killer]) -> int:
    """The process that failed first, or was killed; the others only lost it."""
    ended = {rank: number for rank, number in ending.killed.items() if rank not in ending.stopped}
    killed = [rank for rank, number in ended.items() if number == signal.SIGKILL]
    spoken = [sign for sign in ending.ranks if sign["state"] == "failed"]
    own = sorted((sign for sign in spoken if failed_by_itself(sign)), key=lambda sign: float(sign["ended"]))
    silent = [sign["rank"] for sign in ending.ranks if has_failed(sign) and sign["state"] == "alive"]
    silent = [rank for rank in silent if rank not in ending.stopped]
    if not own and (ending.interrupted or any(sign["state"] == "interrupted" for sign in ending.ranks)):
        return _interrupted(run)
    if own:
        return _say(run, failed_report(run, own[0]))
    if ending.lost:
        return _say(run, RunFailedError(ending.lost))
    if killed and killer() == "kernel":
        print_problems(Console(stderr=True), write_report(run, spec, "kernel"))
        return 1
    # NCCL's watchdog and bitsandbytes end the process themselves: all there is are their words on standard error.
    said = text_of(run.path / "logs" / LAUNCHER_LOG)[-TAIL:].splitlines()
    full = next((line.strip() for line in said if GPU_MEMORY.search(line)), "")
    if full:
        run.set_status("failed", exit_code=1, error=full, oom={"kind": "cuda", "message": full})
        print_problems(Console(stderr=True), write_report(run, spec))
        return 1
    if silent or killed:
        rank = (killed or silent)[0]  # torchrun's SIGTERM may have reached one before it could say what it lost
        number = ended.get(rank)
        how = f"was ended by {signal.Signals(number).name}" if number else "ended without a message"
        return _say(
            run, RunFailedError(Problem(f"rank {rank} {how}; the others were stopped", None, how_to_resume(run)))
        )
    if spoken:
        return _say(run, failed_report(run, spoken[0]))
    return _say(run, RunFailedError(torchrun_problem(run, ending, LAUNCHER_LOG)))


def torchrun_problem(run: RunDir, ending: Ending, name: str) -> Problem:
    """The error in torchrun's log, where no process has reported one."""
    log = run.path / "logs" / name
    cause = cause_of(text_of(log)[-TAIL:])
    what = cause.what if cause else f"torchrun ended with exit code {ending.code}"
    remedy = f"{cause.remedy}; " if cause else ""
    return Problem(what, None, f"{remedy}see {display_path(log)}")


def failed_report(run: RunDir, sign: Heartbeat) -> RunnerError:
    """The error that a failed process reported."""
    error, rank = sign["error"], sign["rank"]
    log = run.path / "logs" / f"rank{rank}.log"
    if error["problems"]:  # in our own words
        problems = [Problem(**problem) for problem in error["problems"]]
        found = RunnerError(*(Problem(p.what, p.source or f"rank {rank}", p.remedy) for p in problems))
        found.exit_code = error["exit_code"]
        return found
    cause = cause_of(f"{error['what']}\n{text_of(log)[-TAIL:]}")
    what = f"rank {rank}: {cause.what + ': ' if cause else ''}{error['what']}"
    trace = display_path(run.path / "logs" / f"rank{rank}.traceback.txt")
    return RunFailedError(Problem(what, None, f"{cause.remedy + '; ' if cause else ''}the stack trace is in {trace}"))


def slowest_rank(run: RunDir, ending: Ending) -> RunnerError:
    """The error for the slowest rank, when a hang was detected."""
    sign = ending.hung
    assert sign is not None
    rank = sign["rank"]
    where = f"{sign.get('phase', 'starting')}" + (f", after step {sign['step']}" if sign.get("step") else "")
    ranks = f"rank {rank}" if len(ending.ranks) > 1 else "the worker"
    what = f"{ranks} hangs: no heartbeat for {ending.silent_seconds / 60:.1f} minutes ({where})"
    log = display_path(run.path / "logs" / (f"rank{rank}.stack.txt" if ending.ranks else LAUNCHER_LOG))
    stood = f"where it stood is in {log}" if ending.ranks else f"it never began; see {log}"
    return RunFailedError(
        Problem(what, None, f"{stood}; {how_to_resume(run)}; train.hang_minutes sets how long to wait")
    )


def how_to_resume(run: RunDir) -> str:
    """Return the remedy: resume, or start again."""
    done = checkpoints.complete(run)
    folder = shlex.quote(display_path(run.path))
    if done:
        return f"python -m runner resume {folder} continues after step {done[-1]}"
    return f"python -m runner {folder}/spec.json starts anew; train.save_every_minutes=5 would keep a checkpoint sooner"


def failed_by_itself(sign: Heartbeat) -> bool:
    """The process failed by itself, and did not only lose another one."""
    if sign["state"] != "failed":
        return False
    return bool(sign["error"]["problems"]) or not SECONDARY.search(sign["error"]["what"])
