"""Pods of a sweep: handed from run to run, at most `sweep.max_pods` at once, all terminated at its end.

The points of a sweep may be processes of their own. What they share is the ledger, in which a pod changes hands in one
transaction, and a folder of markers (`Points`): which have started, which are done. Signals go through the process of
the sweep, which outlives them: each point hears of a Ctrl-C once, saves, and brings its run home.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TextIO

from runner.cloud import clock, handover, ssh_keys, termination
from runner.cloud import process_identity as owners
from runner.cloud.budget import Meter, deadline_of, over_first_hour
from runner.cloud.lease import Lease
from runner.cloud.ledger import PREFIX, Entry, Ledger, owner
from runner.cloud.provider import Provider, gpu_id_of, place_of
from runner.cloud.provider_errors import StillThereError
from runner.cloud.providers import connect, provider_of
from runner.cloud.session import Session
from runner.cloud.transfer import Say
from runner.errors import Problem, RunnerError
from runner.machine.processes import die_with_parent, interrupts_handled_by
from runner.rundir.directory import RunDir, is_alive
from runner.spec import RentedPlace, RunSpec

MACHINE = {"accelerator", "num_gpus", "num_cpus"}
OWN = {
    "max_usd", "max_hours", "volume_gb", "container_disk_gb", "max_replacements", "deadline_hours",
    "heartbeat_minutes", "setup_minutes", "bad_host_minutes",
}  # fmt: skip
"""What of `where` is a run's own affair, and not the pod's."""


@dataclass(frozen=True)
class Pool:
    """The rented pods of a sweep; the same in every process of it."""

    points: Points
    """Their process holds the pods between two runs: what nobody has taken over ends with it."""
    max_pods: int
    kinds: tuple[str | None, ...]
    """Of every point: `machine_key`."""
    disks: dict[str, int]
    """What the largest point needs of each: every pod gets it."""
    hours: float
    """After so long no pod of this sweep is there any more."""
    providers: tuple[str, ...]
    """Names of the clouds that its points rent from."""

    def fitted(self, spec: RunSpec) -> RunSpec:
        """A point whose pod has room for every other point, too."""
        if machine_key(spec) is None:
            return spec
        return spec.model_copy(update={"where": spec.where.model_copy(update=self.disks)})

    def variables(self) -> dict[str, str]:
        """Environment variables of a pod of this sweep: the time after which others may consider it abandoned."""
        return {"RUNNER_DEADLINE": str(round(clock.now() + 3600 * self.hours))}

    def take(self, run: RunDir, spec: RunSpec, pair: ssh_keys.KeyPair, say: Say) -> Lease | None:
        """Take a parked pod over for this run; None where one is to be rented, for which there is room."""
        if machine_key(spec) is None:
            return None
        while (taken := self._claimed(run, spec)) is not None:
            before, rented = taken
            say(f"Takes   pod {rented.pod.id} over from run {before.run.id}")
            old = Session(
                before.run, before.spec, rented, ssh_keys.key_pair(before.run.id, before.spec.where.name), say
            )
            try:
                handover.hand_over(old, Session(run, spec, rented, pair, say))
                self.points.serve()
                return rented
            except RunnerError as error:
                say(f"pod {rented.pod.id} cannot be taken over, and is ended: {error}")
                rented.release()
            except BaseException:
                rented.release()
                raise
            finally:
                ssh_keys.delete_key(before.run.id)
        self.points.serve()
        self._make_room()
        return None

    def park(self, session: Session) -> bool:
        """Keep the pod of a run that is home for a point that has none yet; False where there is none for it."""
        kind = machine_key(session.spec)
        if kind is None or not self._wanted(kind):
            return False
        try:
            deadline = handover.park(session)
        except RunnerError:
            return False
        with self.points.locked():
            if not self._wanted(kind):
                return False
            why, rented = "waits for the next run of its sweep", session.rented
            rented.ledger.move(rented.name, "PARKED", why, deadline=deadline, **owner(self.points.owner))
        return True

    def _claimed(self, run: RunDir, spec: RunSpec) -> tuple[PreviousRun, Lease] | None:
        """A parked pod that fits, which the ledger now says is this run's."""
        api, ledger = provider_of(spec), Ledger()
        place = place_of(spec)
        for entry in self.parked(ledger):
            before = PreviousRun.of(entry)
            if machine_key(before.spec) != machine_key(spec) or not _room(before.spec, spec):
                continue
            if over_first_hour(place, entry.usd_per_hour):
                continue
            pod = api.pod(str(entry.pod_id))
            if pod is None or pod.status != "RUNNING":
                termination.terminate(api, ledger, entry.name, str(entry.pod_id), "it has gone while it was parked")
                continue
            name, heartbeat = f"{PREFIX}{run.id}-{secrets.token_hex(2)}", 60 * place.heartbeat_minutes
            own = ledger.hand_over(
                entry.name, name, run_id=run.id, run_dir=str(run.path.absolute()), heartbeat_s=heartbeat
            )
            if own is None:
                continue
            meter = Meter(own.usd_per_hour, own.created, own.disk_gb, place.max_usd)
            deadline = deadline_of(place, meter)
            ledger.set(name, deadline=deadline)
            volume_gb = 0.0 if place.volume or pod.gpu_id is None else float(place.volume_gb)
            return before, Lease(api, ledger, name, pod, deadline, meter, run.id, volume_gb)
        return None

    def _account(self, entry: Entry) -> Provider:
        """The account that a pod of this sweep was rented with."""
        accounts = [connect(name) for name in self.providers]
        return next((account for account in accounts if account.base == entry.base), accounts[0])

    def parked(self, ledger: Ledger) -> list[Entry]:
        """Return the pods that wait for the next run."""
        return [entry for entry in ledger.entries() if entry.state == "PARKED" and entry.pid == self.points.owner]

    def _wanted(self, kind: str) -> bool:
        """More points that could have such a pod have none yet than such pods are parked."""
        if self.points.stopped:
            return False
        left = [k for index, k in enumerate(self.kinds) if k == kind and not self.points.served(index)]
        waiting = [e for e in self.parked(Ledger()) if machine_key(PreviousRun.of(e).spec) == kind]
        return len(left) > len(waiting)

    def _make_room(self) -> None:
        """End parked pods of other kinds until one more is within the bounds."""
        while True:
            with self.points.locked():
                ledger = Ledger()
                parked = self.parked(ledger)
                if not parked or len(self.points.at_work()) + len(parked) <= self.max_pods:
                    return
                entry = parked[0]
                ledger.move(entry.name, "TERMINATING", "room for a pod of another kind", **owner())
            termination.terminate(
                self._account(entry), ledger, entry.name, str(entry.pod_id), "room for a pod of another kind"
            )

    @contextmanager
    def kept(self, say: Say) -> Iterator[None]:
        """Around the sweep, in the process that owns it: whatever happens, no parked pod is left."""
        owners.hold_lock()
        with self.points.watched(apart=self.max_pods > 1):
            try:
                yield
            finally:
                self._end(say)

    def _end(self, say: Say) -> None:
        """End what is parked; StillThereError with all that could not be confirmed."""
        ledger, failures = Ledger(), list[Problem]()
        for entry in self.parked(ledger):
            for attempt in (1, 2):
                try:
                    termination.terminate(
                        self._account(entry), ledger, entry.name, str(entry.pod_id), "the sweep is over"
                    )
                    say(f"Gone    pod {entry.pod_id}, which waited for the next run: confirmed")
                except RunnerError as error:
                    failures += error.problems
                except KeyboardInterrupt:  # once: an impatient second Ctrl-C must not leave a pod behind
                    if attempt == 2:
                        raise
                    continue
                ssh_keys.delete_key(entry.run_id)
                break
        if failures:
            raise StillThereError(*failures)


@dataclass(frozen=True)
class PreviousRun:
    """The run that had a pod before."""

    run: RunDir
    spec: RunSpec

    @classmethod
    def of(cls, entry: Entry) -> PreviousRun:
        """Load by the run's directory."""
        run = RunDir(Path(entry.run_dir))
        return cls(run, run.spec)


def pool_for(specs: Sequence[RunSpec], folder: Path, max_pods: int) -> Pool:
    """The pool of a sweep over these points, in this process."""
    places = [spec.where for spec in specs if isinstance(spec.where, RentedPlace)]
    disks = {name: max(int(getattr(place, name)) for place in places) for name in ("volume_gb", "container_disk_gb")}
    hours = sum(float(place.deadline_hours) + handover.PARKED_MINUTES / 60 for place in places)
    kinds, providers = tuple(machine_key(spec) for spec in specs), tuple({place.name: None for place in places})
    return Pool(Points(folder / ".pool", os.getpid()), max_pods, kinds, disks, hours, providers)


def machine_key(spec: RunSpec) -> str | None:
    """Key that two runs share if they can have the same pod; None for one whose pod is nobody else's."""
    if not isinstance(spec.where, RentedPlace) or spec.where.keeps or spec.where.pod:
        return None
    machine, place = spec.hw.model_dump(include=MACHINE), spec.where.model_dump(exclude=OWN)
    return json.dumps([machine, gpu_id_of(spec), place], sort_keys=True)


def _room(there: RunSpec, needed: RunSpec) -> bool:
    """The disks of one's pod are as large as another one needs."""
    return all(getattr(there.where, d) >= getattr(needed.where, d) for d in ("volume_gb", "container_disk_gb"))


_index: ContextVar[int | None] = ContextVar("_index", default=None)
"""The point that this process does."""

Task = Callable[[RunSpec | RunnerError, int], float]


@dataclass(frozen=True)
class Points:
    """Progress of the points of a sweep, as markers in a folder that all its processes see."""

    folder: Path
    """Of the markers; it is there while the sweep goes on."""
    owner: int
    """The process of the sweep."""

    def do(self, task: Task, given: RunSpec | RunnerError, index: int) -> float:
        """Do one point; NaN for one that is not begun any more, or was interrupted in a process of its own."""
        here = os.getpid() == self.owner
        self._marker("begun", index).write_text(str(os.getpid()))
        _index.set(index)
        try:
            if here:
                return task(given, index)
            _leave_with(self.owner)
            with _apart(f"[{index + 1}] "):
                # A Ctrl-C reaches it from here on; one that came before has left its mark.
                return math.nan if self.stopped else task(given, index)
        except KeyboardInterrupt:
            self.stop()
            if here:
                raise
            return math.nan
        finally:
            self._marker("over", index).touch()

    @property
    def stopped(self) -> bool:
        """Return True if no further point is to be started: interrupted, or the sweep's process is gone."""
        return (self.folder / "stopped").exists() or not is_alive(self.owner)

    def stop(self) -> None:
        """Begin no further point."""
        with suppress(OSError):
            (self.folder / "stopped").touch()

    def serve(self) -> None:
        """The point that this process does has its pod, or rents one: it waits for none any more."""
        if (index := _index.get()) is not None:
            self._marker("served", index).touch()

    def served(self, index: int) -> bool:
        """Return True if a point has had its pod."""
        return self._marker("served", index).exists() or self._marker("over", index).exists()

    def at_work(self) -> list[int]:
        """Processes of points that have begun and are not over."""
        begun = [file for file in self.folder.glob("begun-*") if not file.with_name(f"over-{file.name[6:]}").exists()]
        return [int(text) for file in begun if (text := file.read_text()) and is_alive(text)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the pool."""
        with (self.folder / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def watched(self, apart: bool) -> Iterator[None]:
        """Around the sweep, in its own process: SIGTERM is a Ctrl-C, and no signal ends this process before points that
        are processes of their own (`apart`)."""
        self.folder.mkdir(parents=True)
        try:
            with interrupts_handled_by(self._pass_on if apart else signal.default_int_handler):
                yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stop()
        for pid in self.at_work():
            with suppress(OSError):
                os.kill(pid, signal.SIGINT)

    def _marker(self, what: str, index: int) -> Path:
        return self.folder / f"{what}-{index:04d}"


@cache
def _leave_with(owner: int) -> None:
    """End this process as soon as the sweep's is gone, however it ended: joblib's live on, and would rent pods in place
    of those that somebody ends. Their own pods are then nobody's: they end themselves, and `pods reap --all` ends them.
    """
    die_with_parent(owner, signal.SIGKILL)

    def wait() -> None:  # where the kernel does not tell: macOS
        while is_alive(owner):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _apart(label: str) -> Iterator[None]:
    """A point in a process of its own: its lines have a label, and Ctrl-C comes from the sweep's process alone."""
    with suppress(OSError):
        os.setpgid(0, 0)  # out of the terminal's reach, which would tell it a second time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out, err = Labelled(sys.stdout, label), Labelled(sys.stderr, label)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Labelled(io.TextIOBase):
    """Stream that prefixes whole lines with a label; not a terminal."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream, self.label, self.rest = stream, label, ""

    def write(self, text: str) -> int:
        """Kept until its line has ended."""
        *lines, self.rest = (self.rest + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.label}{line}\n" if line else "\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        """Write complete lines."""
        self.stream.flush()
