"""Attach to a run in a pod: follow it, print its logs, fetch its files; from any machine with the API key."""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from runner.cloud import adopted_spec, clock, executor, fleet, ssh, ssh_keys, transfer
from runner.cloud.budget import Meter, spent
from runner.cloud.follow import Display
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Ledger, LedgerError
from runner.cloud.provider import OVER, Pod, Provider
from runner.cloud.providers import cloud_of, connect, name_of, provider_class
from runner.cloud.session import END_STATES, FINISHED, Session, before_its_end
from runner.cloud.ssh import CommandError, LostError, PodGoneError
from runner.config import credentials, json_text
from runner.errors import CannotRunError, InterruptedRun, Problem, RequestError, RunFailedError
from runner.rundir.directory import (
    ACTIVE,
    RunDir,
    display_path,
    no_such_run_problem,
    run_folder,
    run_id_of,
    run_without_spec,
)
from runner.spec import RentedPlace, RunSpec

LISTENING_MINUTES = 10.0
"""How long a pod waits for somebody who has come back and falls silent again."""
STARTING_SECONDS = 600.0
UNKNOWN_DEADLINE_S = 24 * 3600.0
"""For a pod that tells no deadline: its agent knows one."""


class NoPodOfRunError(RequestError):
    """The run's pod is gone, or it never had one."""


def attach(words: str, output_dir: Path, console: Console) -> int:
    """Follow a run to its end and download it; the training's exit code. Ctrl-C detaches, and the run goes on."""
    with _session_with(words, output_dir, console) as (session, display):
        _listen(session, LISTENING_MINUTES)
        try:
            with display:
                last = executor.follow(session, display, leave=True)
        except KeyboardInterrupt:
            _listen(session, None)
            display.say(f"Left    the run continues: python -m runner attach {session.run.id}")
            return InterruptedRun.exit_code
        return executor.finish(session, last, display).exit_code


def fetch(words: str, output_dir: Path, console: Console) -> int:
    """Download a run: all of one that is over, and its pod is ended; of one that trains a copy of what there is.

    A pod that has stopped itself is started for it. The training's exit code, 0 while it has none.
    """
    with _session_with(words, output_dir, console) as (session, display):
        if session.agent.get("state") not in END_STATES:
            if not session.agent.get("task"):
                what = (
                    f"nothing has begun in pod {session.rented.pod.id}: the run is being sent, or was never sent whole"
                )
                remedy = "python -m runner pods ends a pod that no process follows; then resume the run"
                raise RunFailedError(Problem(what, None, remedy))
            session.collect(final=False)
            display.say(f"Copied  the current state to {display_path(session.run.path)}; the run continues")
            return 0
        _listen(session, LISTENING_MINUTES)
        return executor.finish(session, before_its_end(session.agent), display).exit_code


def status(words: str) -> dict[str, Any]:
    """Return the state of a run, from its directory if it runs or ended here, else from its pod; nothing is changed."""
    run_id = run_id_of(words)
    here = RunDir.at(Path(words))
    if here and (_is_local(here) or here.state() in FINISHED):
        return _status_here(here)
    _check_reachable(words, here)
    cloud, pod = _look(words)
    facts: dict[str, Any] = {
        "run_id": run_id, "pod_id": pod.id, "pod": pod.status, "gpu": pod.gpu_id, "usd_per_hour": pod.usd_per_hour,
    }  # fmt: skip
    if pod.status != "RUNNING" or not pod.ssh_host:
        return facts
    with _connected(run_id, pod, cloud) as at:
        agent = at.agent()
        said = at.connection.attempt(f"cat {shlex.quote(at.folder)}/status.json; tail -n 1 {at.folder}/metrics.jsonl")
    facts |= {"agent": agent.get("state"), "exit_code": agent.get("exit_code"), "message": agent.get("message")}
    text, _, line = said[1].strip().rpartition("}\n{")
    run = json_text.object_of(text + "}") if line else json_text.object_of(said[1])
    metrics = json_text.object_of("{" + line) if line else {}
    facts |= {key: run.get(key) for key in ("state", "num_steps") if run.get(key) is not None}
    return facts | {key: metrics[key] for key in ("step", "loss", "tokens_per_second") if key in metrics}


def _status_here(run: RunDir) -> dict[str, object]:
    last, kept = ([{}, *run.metrics()])[-1], run.status
    facts = {key: kept.get(key) for key in ("model", "method", "objective", "data", "num_steps", "error")}
    facts |= {key: last.get(key) for key in ("step", "loss", "tokens_per_second")}
    return {"run_id": run.id, "state": run.state(), **facts, "folder": display_path(run.path)}


def _is_local(run: RunDir) -> bool:
    place = run.read("spec.json").get("where")
    return isinstance(place, dict) and place.get("name") == "local"


def _check_reachable(words: str, here: RunDir | None) -> None:
    key = provider_class(cloud_of(words, Ledger.or_copy()[0].entries())).key_variable
    if here is None and (damaged := run_without_spec(Path(words))) and not damaged.read("pod.json"):
        raise RequestError(no_such_run_problem(Path(words)))  # it never was in a pod
    if here is None and credentials.find_key(key) is None:
        told = no_such_run_problem(Path(words))
        what = f"{told.what} on this machine, and no {key} to look for it in pods"
        raise RequestError(replace(told, what=what, remedy=f"{told.remedy}; for a run in a pod, export {key}=…"))


def _check_rented(words: str) -> None:
    """RequestError for a run of this machine: no pod has anything of it; and for one that only a pod could have, where
    no key is there to ask."""
    run = RunDir.at(Path(words))
    _check_reachable(words, run)
    if run and not run.read("spec.json") and not run.read("pod.json"):
        _ = run.spec  # it never was in a pod: what is wrong with its spec.json is said
    if run and _is_local(run):
        what = f"{run.id} runs on this machine, not in a pod: its files are in {display_path(run.path)}"
        raise RequestError(
            Problem(what, "command line", f"python -m runner status {shlex.quote(display_path(run.path))}")
        )


def logs(words: str, follow: bool, lines: int) -> Iterator[str]:
    """The training's output, from its last lines on; with `follow` until it ends."""
    _check_rented(words)
    run_id = run_id_of(words)
    cloud, pod = _look(words)
    if pod.status != "RUNNING" or not pod.ssh_host:
        remedy = f"python -m runner fetch {run_id} starts it and downloads all files"
        raise RequestError(Problem(f"pod {pod.id} is {pod.status}: its files cannot be read", run_id, remedy))
    with _connected(run_id, pod, cloud) as at:
        folder = shlex.quote(at.folder)
        if not follow:
            yield from at.connection.attempt(f"tail -n {lines} {folder}/logs/worker.log 2>/dev/null")[1].splitlines()
            return
        process = at.connection.open(f"touch {folder}/logs/worker.log; tail -n {lines} -F {folder}/logs/worker.log")
        try:
            assert process.stdout is not None
            for line in process.stdout:
                yield line.decode(errors="replace").rstrip("\n")
        finally:
            process.kill()
            process.wait()


@contextmanager
def _connected(run_id: str, pod: Pod, cloud: str) -> Iterator[transfer.PodRunFolder]:
    ssh.check_installed()
    connection = ssh.connection_to(pod, ssh_keys.key_pair(run_id, cloud).private)
    try:
        yield transfer.probe_pod(connection, run_id)
    finally:
        connection.close()


@contextmanager
def _session_with(words: str, output_dir: Path, console: Console) -> Iterator[tuple[Session, Display]]:
    """A session with the run's pod, which is started if it has stopped itself; left as it is at the end."""
    _check_rented(words)
    ssh.check_installed()
    run_id = run_id_of(words)
    path = folder if (folder := run_folder(Path(words))).is_dir() else output_dir / run_id
    display = Display(console)
    run = RunDir(path)
    try:
        rented = _adopt(words, path)
    except NoPodOfRunError as error:
        if run.state() in ACTIVE:  # so that it can be resumed from what is here
            run.set_status("failed", exit_code=1, error=str(error))
        raise
    pair = ssh_keys.key_pair(run_id, name_of(rented.api))
    session: Session | None = None
    try:
        ordered = _ordered_spec(run, rented)
        while session is None or session.at is None:
            if exited := rented.pod.status == "EXITED":
                _wake(rented, display)
            try:
                spec = ordered or _adopted_spec(rented, run, display.say)
                session = Session(run, spec, rented, pair, display.say)
                session.login()
            except (LostError, PodGoneError):
                pod = rented.refresh()
                if exited or pod is None or pod.status != "EXITED":
                    raise  # else it has stopped itself just now, its run being over: it is started for its disk
        rented.meter.cap_usd = session.where.max_usd
        at = session.at
        session.agent = at.agent()
        if not session.agent:
            raise RequestError(Problem(f"pod {rented.pod.id} has no run: it was not begun", run_id))
        yield session, display
    finally:
        if session is not None:
            session.close()
        rented.ledger.leave(rented.name)


def _wake(rented: Lease, display: Display) -> None:
    """Start a pod that has stopped itself, to read its disk."""
    display.say(f"Starts  pod {rented.pod.id}, which was stopped: its disk has the run")
    ssh.forget_host_key(rented.pod.id)
    rented.api.start(rented.pod.id)
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end:
        pod = rented.refresh()
        if pod is None:
            raise PodGoneError(Problem("the pod is gone"))
        if pod.status == "RUNNING" and pod.ssh_host and pod.ssh_port:
            return
        time.sleep(1)
    raise RunFailedError(Problem(f"pod {rented.pod.id} did not start", None, "try again later: its host may be full"))


def _listen(session: Session, minutes: float | None) -> None:
    """Renew the agent's order: with a heartbeat of so many minutes, or none where nobody follows the run any more."""
    at = session.at
    assert at is not None
    file = shlex.quote(f"{at.folder}/agent.json")
    said, _, times = at.connection.run(f"cat {file}; echo; stat -c %Y {file}; date +%s").rstrip().rpartition("}")
    sent, old = clock.now(), json_text.object_of(said + "}")
    try:
        came, there = map(float, times.split())
        # Its times are those of another clock: of a launcher elsewhere, or of this one before it was set.
        ahead = sent - (float(old["sent"]) + max(0.0, there - came))
        deadline = max(float(old["deadline"]) + ahead, sent + 60 * LISTENING_MINUTES if session.over else 0.0)
        started = float(old["started"]) + ahead
    except (KeyError, TypeError, ValueError, OverflowError):
        what = f"the order of the agent in pod {session.rented.pod.id} is none: {file} there is damaged"
        remedy = f"python -m runner pods ssh {session.run.id} looks; pods terminate {session.run.id} ends the pod"
        raise RunFailedError(Problem(what, None, remedy)) from None
    new = {
        **old, "id": uuid.uuid4().hex, "sent": sent, "heartbeat_minutes": minutes, "deadline": deadline,
        "started": started, "fresh": False,
    }  # fmt: skip
    if session.over:
        new["budget_usd"] = None  # what is left to do costs minutes
    at.place("agent.json", new)
    with suppress(LedgerError):  # or another command believes that the pod should have ended
        known = session.rented.deadline
        session.rented.ledger.set(
            session.rented.name, heartbeat_s=None if minutes is None else 60 * minutes,
            deadline=max(known, sent + 60 * LISTENING_MINUTES) if session.over else known,
        )  # fmt: skip
    at.start_agent()


def _ordered_spec(run: RunDir, rented: Lease) -> RunSpec | None:
    """The spec that this machine ordered: of the directory here, else of the one that the ledger names; None where it
    ordered none. RequestError where it is there and cannot be read: a pod's does not take its place."""
    entry = rented.ledger.entry(rented.name)
    named = [RunDir(Path(entry.run_dir))] if entry is not None and entry.run_dir else []
    for directory in (run, *named):
        if not directory.spec_file.is_file():
            continue
        try:
            spec = RunSpec.model_validate(json_text.loads(directory.spec_file.read_text("utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            file, why = display_path(directory.spec_file), getattr(error, "strerror", None) or "it is no spec of a run"
            remedy = f"put it right; or mv {shlex.quote(file)} away, and the pod's is read, without what acts here"
            raise RequestError(Problem(f"{file} cannot be read: {why}", None, remedy)) from None
        if isinstance(spec.where, RentedPlace):
            if directory is not run:
                (run.path / "logs").mkdir(parents=True, exist_ok=True)
                run.write_spec(spec)
            return spec
    return None


def _adopted_spec(rented: Lease, run: RunDir, say: Callable[[str], None]) -> RunSpec:
    """The run of another machine: its spec as the pod tells it, without what acts here, and a directory here."""
    pod = rented.pod
    cloud = name_of(rented.api)
    with _connected(run.id, pod, cloud) as at:
        try:
            text = at.connection.run(f"cat {shlex.quote(at.folder)}/spec.json")
        except CommandError:
            raise RequestError(Problem(f"pod {pod.id} has no run {run.id}", "command line")) from None
        plan = at.connection.attempt(f"cat {shlex.quote(at.folder)}/plan.json")[1]
    found = adopted_spec.adopt_spec(text, pod.id, pod.volume_id, run.path.parent, cloud)
    for line in found.changes:
        say(f"Warning: of the spec in pod {pod.id}, {line}: what a pod says is not acted on here")
    (run.path / "logs").mkdir(parents=True, exist_ok=True)
    run.write_spec(found.spec)
    if content := adopted_spec.adopt_plan(plan):
        run.write("plan.json", content)
    return found.spec


def _adopt(words: str, folder: Path) -> Lease:
    """The run's pod, held by this process. RequestError where there is none, CannotRunError where another command
    holds it."""
    run_id, (ledger, _) = run_id_of(words), Ledger.or_copy()
    api = connect(cloud_of(words, ledger.entries()))
    pod = _pod_of(api, ledger, words)
    own = [entry for entry in ledger.entries(run_id) if entry.pod_id == pod.id]
    entry = (
        own[-1] if own else ledger.entry(pod.name) or fleet.adopt(api, ledger, pod.id, run_id, str(folder.absolute()))
    )
    if not ledger.take(entry.name):
        what = f"another command looks after pod {pod.id}: process {entry.pid} on {str(entry.host).partition('|')[0]}"
        raise CannotRunError(Problem(what, run_id, "python -m runner logs -f and status may look on"))
    before = spent(ledger, run_id, but=entry.name)
    meter = Meter(entry.usd_per_hour, entry.created, entry.disk_gb, before_usd=before)
    deadline = entry.deadline or clock.now() + UNKNOWN_DEADLINE_S
    return Lease(api, ledger, entry.name, pod, deadline, meter, run_id, pod.volume_gb)


def _look(words: str) -> tuple[str, Pod]:
    """The run's cloud and its pod, and nothing is held. RequestError where there is none."""
    ledger, _ = Ledger.or_copy()
    cloud = cloud_of(words, ledger.entries())
    return cloud, _pod_of(connect(cloud), ledger, words)


def _pod_of(api: Provider, ledger: Ledger, words: str) -> Pod:
    """A run's pod, by name. One handed on within a sweep keeps the name of its first run, and is its last one's."""
    run_id = run_id_of(words)
    start, entries = f"{PREFIX}{run_id}-", ledger.entries()
    mine, others = ({e.pod_id for e in entries if (e.run_id == run_id) is own} for own in (True, False))
    pods = [p for p in api.pods() if p.status not in OVER and (p.id in mine or p.name.startswith(start))]
    pods = [pod for pod in pods if pod.id not in others]
    if not pods:
        remedy = "python -m runner pods lists what there is"
        if here := RunDir.at(Path(words)):
            remedy = (
                f"python -m runner resume {shlex.quote(display_path(here.path))} continues with what is here; {remedy}"
            )
        raise NoPodOfRunError(Problem(f"{api.title} has no pod of run {run_id}", "command line", remedy))
    return max(pods, key=lambda pod: pod.created or 0.0)
