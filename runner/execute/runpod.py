"""Run on a rented pod: price → confirm → pod → send → train, followed here → home → pod gone, cost told."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click
from rich.console import Console

from runner import checkpoints
from runner.cloud import boot, keys, pod, preflight, ssh
from runner.cloud.api import Api
from runner.cloud.follow import News, Vanished
from runner.cloud.pod import Rented
from runner.cloud.problems import StillThereError
from runner.cloud.session import Session
from runner.errors import InterruptedRun, Problem, RequestError, RunFailedError, RunnerError
from runner.execute.local import Outcome
from runner.execute.manner import PLAINLY, Manner
from runner.execute.voice import Voice
from runner.report.problems import print_problems
from runner.report.summary import duration, shown
from runner.rundir import RunDir
from runner.spec import RunPodPlace, RunSpec

BOOT_FACTOR = 2
"""A pod to which no agent has come after so many times `where.setup_minutes` ends itself."""


def check(spec: RunSpec, manner: Manner = PLAINLY) -> None:
    """Refuse, before anything is made or rented, what cannot be: no key, no ssh, nobody to ask."""
    ssh.check()
    Api()  # NoKeyError
    place = where(spec)
    if manner.detach and place.spot and place.volume is None and place.push_to is None:
        what = "a detached run on an interruptible pod would lose everything when the pod is taken away"
        raise RequestError(Problem(what, "--detach", "add where.volume=NAME, or where.push_to=org/name"))
    if not manner.yes and not sys.stdin.isatty():
        what = "renting a pod costs money, and there is nobody to ask"
        raise RequestError(Problem(what, "where=runpod", "add --yes"))


def confirm(spec: RunSpec, plan: dict[str, Any], manner: Manner, console: Console, times: int = 1) -> bool:
    """Say what would be rented at which price, and ask. What RunPod does not have is an error here already."""
    machines, _ = preflight.check(Api(), spec, plan)
    first, hours = machines[0], plan.get("hours")
    price = f"${first.usd_per_hour:.2f} an hour"
    about = f", about ${first.usd_per_hour * hours * times:.2f} for {duration(3600 * hours * times)}" if hours else ""
    cap = where(spec).max_usd
    limit = f", never more than ${cap:g}" if cap else ""
    many = f" for each of {times} runs, one after the other" if times > 1 else ""
    console.print(f"Rents   {first.described}, {price}{about}{limit}{many}", highlight=False, soft_wrap=True)
    return manner.yes or click.confirm("Rent it?", default=True, err=True)


def where(spec: RunSpec) -> RunPodPlace:
    """The part `where` of a rented run."""
    assert isinstance(spec.where, RunPodPlace)
    return spec.where


def execute(
    run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, manner: Manner = PLAINLY
) -> Outcome:  # fmt: skip
    """Rent, run and give back; the outcome is the training's. Errors of renting as `pod.acquire` has them."""
    voice = Voice(Console(stderr=quiet_stdout))
    pair = keys.pair(run.id)
    args = boot.as_text(run.id, BOOT_FACTOR * where(spec).setup_minutes)
    lost = 0
    with _terminated_is_interrupted():
        while True:
            rented = _rent(run, spec, pair, voice, manner, args)
            session = Session(run, spec, rented, pair, voice.say)
            try:
                with voice:
                    return _with(session, voice, manner)
            except Vanished as error:
                lost += 1
                rented.mark("PREEMPTED", str(error))
                rented.release()
                _replaceable(session, error, lost)
                step = checkpoints.newest(run) or 0
                resumes = f"goes on after step {step}" if step else "begins anew"
                voice.say(f"{error}: pod {lost} of {where(spec).max_replacements} in its place; the run {resumes}")
            finally:
                session.close()


def _rent(run: RunDir, spec: RunSpec, pair: keys.KeyPair, voice: Voice, manner: Manner, args: str) -> Rented:
    try:
        rented = pod.acquire(
            run, spec, run.read("plan.json"), pair, voice.say, detached=manner.detach, args=args
        )  # fmt: skip
    except BaseException as error:
        run.set_status("failed", exit_code=getattr(error, "exit_code", 130), error=str(error) or "interrupted")
        raise
    run.write("pod.json", {
        "name": rented.name, "pod_id": rented.pod.id, "gpu": rented.pod.gpu_id, "cloud": rented.pod.cloud,
        "data_center": rented.pod.data_center, "usd_per_hour": rented.usd_per_hour, "rented": rented.meter.started,
        "deadline": rented.deadline,
    })  # fmt: skip
    return rented


def _with(session: Session, voice: Voice, manner: Manner) -> Outcome:
    """One pod, from its first byte to its end. It is given back unless it has what nobody else has."""
    run, rented = session.run, session.rented
    try:
        session.load(manner.detach)
        if manner.detach:
            rented.detach()
            run.set_status("created", host=rented.name, pid=None)
            voice.say(f"Detached  python -m runner attach {run.id}; logs -f, status and fetch take the id, too")
            return Outcome(run, 0)
        voice.say(f"Trains  in pod {rented.pod.id}, ${rented.usd_per_hour:.2f} an hour")
        last = follow(session, voice)
    except Vanished:
        raise
    except BaseException as error:
        session.close()
        rented.release()
        account(run, rented, error)
        raise
    return finish(session, last, voice)


def follow(session: Session, voice: Voice, leave: bool = False) -> dict[str, Any]:
    """`Session.follow` with its news on screen and the meter's warnings."""

    def tell(news: News) -> None:
        voice.tell(news)
        if news.kind == "tick" and (warning := session.rented.meter.warning(time.time())):
            voice.say(f"Warning: {warning}")

    return session.follow(tell, leave)


def finish(session: Session, last: dict[str, Any], voice: Voice) -> Outcome:
    """Bring the run home, give the pod back, say what it cost; the outcome of the training."""
    run, rented, spec = session.run, session.rented, session.spec
    if last.get("state") == "ending":
        raise _ended_by_itself(session, last)
    voice.say("Brings  the run home")
    try:
        session.collect()
    except Vanished:
        raise
    except BaseException:  # the pod keeps what it has, and its agent ends it when nobody is heard of
        rented.ledger.leave(rented.name)
        voice.say(f"Pod {rented.pod.id} still has the result: python -m runner fetch {run.id}")
        raise
    session.close()
    code = int(last["exit_code"]) if isinstance(last.get("exit_code"), int) else 1
    if code and run.read("status.json").get("state") not in ("failed", "interrupted"):
        run.set_status("failed", exit_code=code, error=last.get("message") or f"the training ended with {code}")
    keep = where(spec).keep
    try:
        rented.release(keep)
    except StillThereError as error:
        account(run, rented, error)
        raise
    account(run, rented)
    keys.forget(run.id) if not keep else None
    _close(run, rented, last, voice, keep)
    return Outcome(run, code)


def account(run: RunDir, rented: Rented, error: BaseException | None = None) -> None:
    """What the run has cost, in `status.json` and beside the prediction in `summary.json`."""
    plan = run.read("plan.json")
    cost = {
        "usd": round(rented.usd(), 4),
        "predicted_usd": plan.get("usd"),
        "hours": round((time.time() - rented.meter.started) / 3600, 4),
        "predicted_hours": plan.get("hours"),
        "usd_per_hour": rented.usd_per_hour,
        "gpu": rented.pod.gpu_id,
        "cloud": rented.pod.cloud,
        "pod_id": rented.pod.id,
    }
    state = {} if error is None else {"exit_code": getattr(error, "exit_code", 130), "error": str(error)}
    if state and run.read("status.json").get("state") not in ("done", "interrupted"):
        run.set_status("failed", **state)
    run.write("status.json", {**run.read("status.json"), "cost": cost})
    if summary := run.read("summary.json"):
        run.write("summary.json", {**summary, "model_dir": str(run.path / "model"), "cost": cost})


def _close(run: RunDir, rented: Rented, last: dict[str, Any], voice: Voice, keep: bool) -> None:
    cost = run.read("status.json")["cost"]
    predicted = f", ${cost['predicted_usd']:.2f} predicted" if cost["predicted_usd"] is not None else ""
    gone = "stopped" if keep else "gone, which was confirmed"
    voice.say(f"Cost    ${cost['usd']:.2f}{predicted}; pod {rented.pod.id} is {gone}")
    if keep:
        voice.say(
            f"Kept    its disk costs ${rented.kept_usd_per_day():.2f} a day: python -m runner pods terminate {run.id}"
        )
    if last.get("stopped_for"):
        remedy = f"python -m runner resume {shown(run.path)} where.max_usd=…"
        print_problems(Console(stderr=True), InterruptedRun(Problem(f"stopped: {last['stopped_for']}", None, remedy)))
    elif last.get("message"):
        print_problems(
            Console(stderr=True), RunFailedError(Problem(str(last["message"]), None, f"see {shown(run.path / 'logs')}"))
        )


def _replaceable(session: Session, error: Vanished, lost: int) -> None:
    """Whether another pod may follow; RunFailedError if not."""
    run, place = session.run, where(session.spec)
    if session.agent.get("state") == "ending":
        raise _ended_by_itself(session, session.agent)
    if lost > place.max_replacements:
        account(run, session.rented, error)
        remedy = f"python -m runner resume {shown(run.path)} goes on after the last checkpoint"
        raise RunFailedError(Problem(f"{error}, for the {lost}. time: where.max_replacements", None, remedy))


def _ended_by_itself(session: Session, last: dict[str, Any]) -> RunnerError:
    run, rented = session.run, session.rented
    error = RunFailedError(
        Problem(
            f"pod {rented.pod.id} ended itself: {last.get('message')}",
            "where=runpod",
            f"python -m runner fetch {run.id} brings what its disk has" if last.get("how") == "stop" else None,
        )
    )
    account(run, rented, error)
    return error


@contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """SIGTERM gives the pod back as Ctrl-C does."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
