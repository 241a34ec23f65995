"""The executor of rented runs: rent, send, train, download, terminate."""

from __future__ import annotations

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from shlex import quote
from typing import Any

from rich.console import Console

from runner.cloud import clock, rent_pod, reuse_pod, ssh, ssh_keys, termination
from runner.cloud.confirm_rental import confirm
from runner.cloud.follow import Display, News
from runner.cloud.lease import Lease
from runner.cloud.ledger import HeldError
from runner.cloud.provider import place_of
from runner.cloud.provider_errors import StillThereError
from runner.cloud.providers import provider_of
from runner.cloud.session import FINISHED, Session, before_its_end
from runner.cloud.ssh import PodGoneError
from runner.cloud.sweep_pool import Pool
from runner.errors import InterruptedRun, Problem, RequestError, RunFailedError, RunnerError
from runner.report.failure_causes import cause_of
from runner.report.run_report.write import write_report
from runner.report.text import print_problems
from runner.rundir import checkpoints
from runner.rundir.directory import Outcome, RunDir, display_path, text_of
from runner.rundir.launch_options import DEFAULT_OPTIONS, LaunchOptions
from runner.spec import RunSpec

__all__ = ["account", "check", "confirm", "execute", "finish", "follow"]

OF_THIS_MACHINE = (OSError, MemoryError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
LOG_CHARS = 20_000
START_AGAIN_SECONDS = 300.0
"""A pod that is stopped is not started, so shortly before its deadline or the cap, for a result."""
STOPPING_SECONDS = 60.0
"""From a pod's word that it stops itself until it is said to be stopped."""
BOOT_FACTOR = 2
"""A pod to which no agent has come after so many times `where.setup_minutes` ends itself."""


def check(spec: RunSpec, launch_options: LaunchOptions = DEFAULT_OPTIONS) -> None:
    """Refuse what cannot be rented, before anything is made: no key, no ssh, nobody to confirm."""
    ssh.check_installed()
    provider_of(spec)  # NoKeyError
    place = place_of(spec)
    if launch_options.detach and place.spot and place.volume is None and spec.push.to is None:
        what = "a detached run on an interruptible pod would lose everything when the pod is taken away"
        raise RequestError(Problem(what, "--detach", "add where.volume=NAME, or push.to=org/name"))
    if not launch_options.yes and not sys.stdin.isatty():
        what = "renting a pod costs money, and there is no terminal to confirm it on"
        raise RequestError(Problem(what, f"where={spec.where.name}", "add --yes"))


def execute(
    run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: LaunchOptions = DEFAULT_OPTIONS
) -> Outcome:  # fmt: skip
    """Rent, run and give back; the outcome is the training's. Errors of renting as `rent_pod.acquire` has them."""
    display = Display(Console(stderr=quiet_stdout))
    pair = ssh_keys.key_pair(run.id, spec.where.name)
    lost = 0
    with _terminated_is_interrupted():
        while True:
            rented = _rent(run, spec, pair, display, launch_options, again=lost > 0)
            session = Session(run, spec, rented, pair, display.say)
            try:
                with display:
                    return _run_in_pod(session, display, launch_options)
            except PodGoneError as error:
                if (last := _brought_from_stopped(session, error)) is not None:
                    return finish(session, last, display, launch_options.pool)
                lost += 1
                rented.mark("PREEMPTED", str(error))
                rented.release(keep=place_of(spec).pod is not None)  # somebody's own, with what else is on its disk
                _replaceable(session, error, lost)
                step, most = checkpoints.newest(run) or 0, place_of(spec).max_replacements
                resumes = f"continues after step {step}" if step else "begins anew"
                display.say(f"{error}: pod {lost} of {most} in its place; the run {resumes}")
            except OF_THIS_MACHINE as error:  # where the run is over, its pod still has the result
                verb = f"fetch {run.id}" if session.over else f"resume {quote(display_path(run.path))}"
                raise RunFailedError(_failed_here(error, "", verb)) from None
            finally:
                session.close()


def _rent(
    run: RunDir, spec: RunSpec, pair: ssh_keys.KeyPair, display: Display, launch_options: LaunchOptions, again: bool
) -> Lease:
    """A pod of its own, or one of the sweep's; what another run waits for is not taken `again`."""
    pool = launch_options.pool
    try:
        rented = pool.take(run, spec, pair, display.say) if pool and not again else None
        if place_of(spec).pod:
            rented = reuse_pod.take_named(run, spec, pair, display.say, launch_options.detach)
        rented = rented or rent_pod.acquire(
            run, spec, run.read("plan.json"), pair.public, display.say, detached=launch_options.detach,
            alone_minutes=BOOT_FACTOR * place_of(spec).setup_minutes, env=pool.variables() if pool else None,
        )  # fmt: skip
    except HeldError:  # the status is the other process's
        raise
    except BaseException as error:
        with _local_disk_may_fail(display.say):
            run.set_status("failed", exit_code=getattr(error, "exit_code", 130), error=str(error) or "interrupted")
        raise
    return rented


@contextmanager
def _local_disk_may_fail(say: Callable[[str], None]) -> Iterator[None]:
    """Warn about a local disk that takes no write, so that it hides neither another error nor a pod."""
    try:
        yield
    except OSError as error:
        say(f"Warning: what became of the run cannot be written here: {error}")


def _write_pod_json(run: RunDir, rented: Lease) -> None:
    """Write `pod.json`."""
    run.write("pod.json", {
        "name": rented.name, "pod_id": rented.pod.id, "gpu": rented.pod.gpu_id, "cloud": rented.pod.cloud,
        "data_center": rented.pod.data_center, "usd_per_hour": rented.usd_per_hour, "rented": rented.meter.started,
        "deadline": rented.deadline,
    })  # fmt: skip


def _run_in_pod(session: Session, display: Display, launch_options: LaunchOptions) -> Outcome:
    """Run in one pod, to its end. It is terminated unless it has a result that exists nowhere else."""
    run, rented, begun = session.run, session.rented, False
    try:
        _write_pod_json(run, rented)
        session.load(launch_options.detach)
        begun = True
        if launch_options.detach:
            rented.detach()
            run.set_status("created", host=rented.name, pid=None)
            display.say(f"Detached  python -m runner attach {run.id}; logs -f, status and fetch take the id, too")
            return Outcome(run, 0)
        display.say(f"Trains  in pod {rented.pod.id}, ${rented.usd_per_hour:.2f} an hour")
        if session.spec.track.name == "tensorboard":
            display.say(f"Board   python -m runner pods tunnel {run.id} -p 6006")
        last = follow(session, display)
        if last.get("state") == "ending" and last.get("how") == "stop" and _may_start_again(rented):
            raise PodGoneError(Problem(f"the pod has stopped itself ({last.get('message')})"))
    except PodGoneError:
        raise
    except BaseException as error:
        here = begun and isinstance(error, OF_THIS_MACHINE)  # it ends no training there
        until = None if here else reuse_pod.hand_back(session)
        session.close()
        if here:
            rented.ledger.leave(rented.name)
            still = f", and pod {rented.pod.id} still has the run"
            raise RunFailedError(_failed_here(error, still, f"attach {run.id}")) from None
        if until is None:
            rented.release(keep=place_of(session.spec).keeps and bool(place_of(session.spec).pod))
        account(run, rented, error)
        if isinstance(error, KeyboardInterrupt):  # before anybody followed it, who would have told
            display.say(f"Interrupted by you; ending pod {rented.pod.id}")
        raise
    return finish(session, last, display, launch_options.pool)


def _failed_here(error: BaseException, still: str, verb: str) -> Problem:
    """Problem: this machine's disk, memory or limits do not let a run in a pod be followed; what is `still` so, and the
    verb that goes on."""
    said = getattr(error, "strerror", None) or str(error) or "no memory"
    if getattr(error, "errno", None) in NO_ROOM:
        return Problem(f"{said}: nothing can be written here{still}", None, f"make room, then: python -m runner {verb}")
    return Problem(f"{said}: this machine could not continue{still}", None, f"python -m runner {verb} goes on")


def follow(session: Session, display: Display, leave: bool = False) -> dict[str, Any]:
    """`Session.follow` with its news on the terminal, and the meter's warnings."""

    def tell(news: News) -> None:
        display.tell(news)
        if news.kind == "tick" and (warning := session.rented.meter.warning(clock.now())):
            display.say(f"Warning: {warning}")

    return session.follow(tell, leave)


def finish(session: Session, last: dict[str, Any], display: Display, pool: Pool | None = None) -> Outcome:
    """Download the run, terminate the pod (after a run that ended well it may go to the sweep's `pool`), print what it
    cost; the outcome of the training."""
    run, rented, spec = session.run, session.rented, session.spec
    if last.get("state") == "ending":
        raise _ended_by_itself(session, last)
    display.say("Fetches the run")
    code = int(last["exit_code"]) if isinstance(last.get("exit_code"), int) else 1
    shared = pool if code == 0 else None
    try:
        session.collect(part=shared is None and rented.before is None)
    except PodGoneError:
        raise
    except BaseException:  # the pod keeps what it has, and its agent ends it when nobody is heard of
        rented.ledger.leave(rented.name)
        display.say(f"Pod {rented.pod.id} still has the result: python -m runner fetch {run.id}")
        raise
    if shared is not None and _park(session, shared):
        _close(run, rented, account(run, rented), last, display, "waits for the next run")
        return Outcome(run, code)
    until = reuse_pod.hand_back(session)
    session.close()
    if code and run.status.get("state") not in ("failed", "interrupted"):
        if last.get("stopped_for"):  # before there was a training, which would say so itself
            code, last = InterruptedRun.exit_code, {**last, "message": None}
            with _local_disk_may_fail(display.say):
                run.set_status("interrupted", exit_code=code, error=f"stopped: {last['stopped_for']}")
        else:
            with _local_disk_may_fail(display.say):
                run.set_status("failed", exit_code=code, error=last.get("message") or f"the training ended with {code}")
    keep = place_of(spec).keeps
    try:
        rented.release(keep) if until is None else None
    except StillThereError as error:
        account(run, rented, error)
        raise
    cost = account(run, rented)
    ssh_keys.delete_key(run.id) if not keep else None
    became = "is stopped" if keep else "is gone, which was confirmed"
    if until is not None:
        became = f"is yours again, until {datetime.fromtimestamp(until):%H:%M on %Y-%m-%d}"
    _close(run, rented, cost, last, display, became)
    if last.get("uploaded"):
        display.say(f"Pushed  {run.read('pushed.json').get('url')}")
    elif last.get("uploaded") is False:
        code = code or RunFailedError.exit_code
    if keep and until is None:
        per_day = f"${rented.kept_usd_per_day():.2f} a day"
        display.say(f"Kept    its disk costs {per_day}: python -m runner pods terminate {run.id}")
    return Outcome(run, code, last.get("stopped_for"))


def _park(session: Session, pool: Pool) -> bool:
    """Give the pod to the pool; False where it takes none: the pod is told that it is needed no more."""
    try:
        if pool.park(session):
            session.close()
            return True
        with suppress(RunnerError):
            session.dismiss_pod()
        return False
    except BaseException:
        session.rented.release()
        raise


def account(run: RunDir, rented: Lease, error: BaseException | None = None) -> dict[str, object]:
    """Record the cost of the run in `status.json`, and beside the prediction in `summary.json`."""
    plan = run.read("plan.json")
    cost = {
        "usd": round(rented.usd(), 4),
        "predicted_usd": plan.get("usd"),
        "hours": round((clock.now() - rented.meter.started) / 3600, 4),
        "predicted_hours": plan.get("hours"),
        "usd_per_hour": rented.usd_per_hour,
        "gpu": rented.pod.gpu_id,
        "cloud": rented.pod.cloud,
        "pod_id": rented.pod.id,
    }
    with _local_disk_may_fail(rented.say):
        if error is not None and run.status.get("state") not in ("done", "interrupted"):
            run.set_status("failed", exit_code=getattr(error, "exit_code", 130), error=str(error))
        run.write("status.json", {**run.status, "cost": cost})
        if summary := run.summary:
            run.write("summary.json", {**summary, "model_dir": str(run.path / "model"), "cost": cost})
    write_report(run)  # made here: one that a pod sent would be a stranger's page
    return cost


def _close(
    run: RunDir, rented: Lease, cost: dict[str, Any], last: dict[str, Any], display: Display, became: str
) -> None:
    """Print the cost, what `became` of the pod, and why the run ended as it did."""
    predicted = f", ${cost['predicted_usd']:.2f} predicted" if cost["predicted_usd"] is not None else ""
    display.say(f"Cost    ${cost['usd']:.2f}{predicted}; pod {rented.pod.id} {became}")
    if last.get("stopped_for"):
        more = " where.max_usd=…" if "where.max_usd" in last["stopped_for"] else ""
        remedy = f"python -m runner resume {quote(display_path(run.path))}{more}"
        print_problems(Console(stderr=True), InterruptedRun(Problem(f"stopped: {last['stopped_for']}", None, remedy)))
    elif last.get("message"):
        print_problems(Console(stderr=True), RunFailedError(_problem_of(run, str(last["message"]))))


def _problem_of(run: RunDir, message: str) -> Problem:
    """The agent's message, with the cause from the log of the installation where it is a known one."""
    log = run.path / "logs" / "install.log"
    cause = cause_of(text_of(log)[-LOG_CHARS:]) if "install" in message else None
    if "upload failed" in message:
        return Problem("the model is here, and its upload failed", display_path(run.path / "logs" / "upload.log"),
                       f"python -m runner push {quote(display_path(run.path))}")  # fmt: skip
    if cause is None:
        return Problem(message, None, f"see {display_path(run.path / 'logs')}")
    return Problem(f"{message}: {cause.what}", display_path(log), cause.in_pod or cause.remedy)


def _brought_from_stopped(session: Session, error: PodGoneError) -> dict[str, object] | None:
    """The agent's last status of a run that was over when its pod stopped, as after a launcher that was suspended or
    cut off: the pod is started for what its disk has. None for a pod that may be replaced: its run is not over, and its
    newest checkpoint is here, as far as it could be brought.

    RunFailedError, and the pod stays stopped, where its disk may have the only result and that cannot be had now.
    """
    rented, place = session.rented, place_of(session.spec)
    over = session.over and session.agent.get("state") != "refused"
    end = time.monotonic() + STOPPING_SECONDS
    while session.agent.get("state") == "ending" and rented.pod.status == "RUNNING" and time.monotonic() < end:
        time.sleep(1)
        with suppress(RunnerError):
            if rented.refresh() is None:
                break
    if session.agent.get("state") == "ending" and rented.pod.status == "RUNNING":
        rented.ledger.leave(rented.name)
        raise _ended_by_itself(session, session.agent)  # it is about to stop: what its disk has is left there
    if rented.pod.status != "EXITED" or not rented.volume_gb or (place.spot and not over):
        return None
    session.close()
    try:
        if not _may_start_again(rented):
            raise RunFailedError(Problem("its deadline or cap is too near to start it again"))
        rented.say(f"Starts  pod {rented.pod.id}: {error}, and its disk may have the result")
        reuse_pod.start_again(rented, place, rented.say)
        session.agent = session.login().agent() or session.agent
        last = before_its_end(session.agent)
        if last.get("state") not in FINISHED:
            session.collect(final=False)
            session.agent = {}
            return None
        return last
    except (RunnerError, OSError) as failed:
        if not over and _may_start_again(rented):
            rented.say(f"Warning: what pod {rented.pod.id} has could not be downloaded: {failed}")
            return None
        with suppress(RunnerError):
            termination.stop(rented.api, rented.ledger, rented.name, rented.pod.id, str(error))
        rented.ledger.leave(rented.name)
        account(session.run, rented, error)
        has = "the result" if over else "what is newest of the run"
        what = f"{error}: {failed}; pod {rented.pod.id} is stopped with {has} on its disk, which costs money"
        raise RunFailedError(Problem(what, None, f"python -m runner fetch {session.run.id}")) from None


def _may_start_again(rented: Lease) -> bool:
    return clock.now() < rented.deadline - START_AGAIN_SECONDS


def _replaceable(session: Session, error: PodGoneError, lost: int) -> None:
    """RunFailedError where no other pod may replace a lost one."""
    run, place = session.run, place_of(session.spec)
    if session.agent.get("state") == "ending":
        raise _ended_by_itself(session, session.agent)
    if place.pod:
        account(run, session.rented, error)
        raise reuse_pod.unavailable_error(run, place.pod)
    if lost > place.max_replacements:
        account(run, session.rented, error)
        remedy = f"python -m runner resume {quote(display_path(run.path))} continues from the last checkpoint"
        raise RunFailedError(Problem(f"{error}, for the {lost}. time: where.max_replacements", None, remedy))


def _ended_by_itself(session: Session, last: dict[str, object]) -> RunnerError:
    run, rented = session.run, session.rented
    what = f"pod {rented.pod.id} ended itself: {last.get('message')}"
    remedy = f"python -m runner fetch {run.id} downloads what is on its disk" if last.get("how") == "stop" else None
    error = RunFailedError(Problem(what, f"where={session.spec.where.name}", remedy))
    account(run, rented, error)
    return error


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM gives the pod back as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
