"""One run in one pod: arm the agent, send, start, follow, collect."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from runner.cloud import budget, clock, download, transfer
from runner.cloud.agent import tail
from runner.cloud.follow import Follower, News
from runner.cloud.lease import Lease
from runner.cloud.provider import place_of
from runner.cloud.ssh import CommandError, HostKeyError, LostError, PodGoneError
from runner.cloud.ssh_keys import KeyPair
from runner.cloud.transfer import PodRunFolder, Say
from runner.cloud.untrusted_files import TooMuchError
from runner.errors import Problem, RunFailedError, RunnerError
from runner.machine.processes import interrupts_handled_by
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import RentedPlace, RunSpec

COLLECT_SECONDS = 900.0
"""How long a result that is finished is worth trying for, where the connection breaks again and again."""
PROGRESS_SECONDS = 60.0
LOADS = 4
MARGIN_SECONDS = 90.0
"""Before the pod's own end the launcher ends the training, so that there is time to bring its checkpoint home."""
END_STATES = ("done", "failed", "ending", "refused")
FINISHED = ("done", "failed")


@dataclass
class Session:
    """One run in one pod: connection, the agent's last status, transfers."""

    run: RunDir
    spec: RunSpec
    rented: Lease
    keys: KeyPair
    say: Say
    agent: dict[str, Any] = field(default_factory=dict)
    """The agent's last known status."""
    at: PodRunFolder | None = None
    asked: int = 0
    """How often the user asked to stop."""
    _pull: threading.Thread | None = None
    _recorded_pod: str | None = None
    """The pod of which the ledger says that it runs."""

    @property
    def where(self) -> RentedPlace:
        """The part `where` of the spec."""
        return place_of(self.spec)

    # --- there ---

    def login(self) -> PodRunFolder:
        """Log in, as `transfer.login` does."""
        self.at = transfer.login(self.rented.pod, self.run.id, self.keys, self.say, self.find)
        return self.at

    def order(self, detach: bool) -> dict[str, Any]:
        """The order for the agent. An end that nobody awaits stops the pod where its own disk holds the only result."""
        meter = self.rented.meter
        own_disk = self.rented.volume_gb > 0 and not self.where.spot
        return transfer.agent_order(
            self.run.id, str(self.rented.pod.id), deadline=self.rented.deadline, started=meter.started,
            usd_per_hour=meter.rate, budget_usd=self.rented.cap_usd, keep=self.where.keeps,
            heartbeat_minutes=None if detach else self.where.heartbeat_minutes,
            boarding_minutes=self.where.heartbeat_minutes,
            uncollected="terminate" if self.where.volume else "stop" if own_disk else "wait",
            public_key=self.keys.public, calls=self.rented.api.calls,
        )  # fmt: skip

    def load(self, detach: bool) -> None:
        """Arm the agent, send the run, begin it; again where the connection breaks. PodGoneError if the pod goes."""
        for attempt in range(LOADS):
            try:
                self._load(detach)
                return
            except HostKeyError:
                raise
            except LostError:
                if attempt == LOADS - 1:
                    raise
                self.say("The connection to the pod was lost: the upload continues")
                self.close()

    def _load(self, detach: bool) -> None:
        at = self.login()
        self.agent = transfer.arm_agent(at, self.order(detach), self.say)
        transfer.check_memory(at, float(self.run.read("plan.json").get("host_ram_gib") or 0.0))
        transfer.check_gpus(at, self.spec)
        with self._keepalive(at):
            code = transfer.send_run(at, self.run, self.spec, self.say)
            self.rented.mark("SYNCED", "everything was sent")
            secrets = transfer.send_secrets(at, self.spec)
            # Written before it is done, or not done: whatever else is left behind, the next command would end. Once it
            # is written, a pod that may train by now is not given back for a ledger that cannot be written any more.
            if self._recorded_pod != self.rented.pod.id:
                self.rented.ledger.move(self.rented.name, "RUNNING", "its agent is armed, and gets its task")
                self._recorded_pod = self.rented.pod.id
            else:
                self.rented.mark("RUNNING", "its agent gets its task again")
            transfer.start_task(at, self.spec, str(self.rented.pod.id), code, secrets)

    def find(self) -> tuple[str, int] | None:
        """The pod's present address, None while it has none. PodGoneError if it is gone or was stopped."""
        pod = self.rented.refresh()
        if pod is None:
            raise PodGoneError(Problem("the pod is gone"))
        if pod.status in ("EXITED", "ERROR", "TERMINATED"):
            raise PodGoneError(Problem(f"the pod was stopped ({pod.status})"))
        self.rented.pod = pod
        return (str(pod.ssh_host), int(pod.ssh_port)) if pod.ssh_host and pod.ssh_port else None

    # --- follow ---

    @property
    def over(self) -> bool:
        """The training has ended, or was ended."""
        return self.agent.get("state") in END_STATES

    def follow(self, tell: Callable[[News], None], leave: bool = False) -> dict[str, Any]:
        """Follow the run to its end; the agent's last status. PodGoneError where the pod goes first.

        With `leave` the first Ctrl-C raises KeyboardInterrupt and the run goes on.
        """
        at = self.at
        assert at is not None
        follower = Follower(at, self.run, self.find, self._restore_after_break)
        stopped_for: str | None = None
        news = follower.news()
        try:
            with self._signals():
                for item in news:
                    self._note(item)
                    tell(item)
                    if self.over and item.kind == "tick":
                        return {**self.agent, "stopped_for": stopped_for}
                    if self.asked > (0 if leave else 1):
                        raise KeyboardInterrupt
                    reason = None if leave else self._why_stop()
                    if reason and stopped_for is None and self._stop():
                        stopped_for = reason
                        self.say(f"Stops the training: {reason}; it saves a checkpoint first")
        finally:
            news.close()
            if self._pull is not None:
                self._pull.join(timeout=30)
        raise AssertionError("news does not end")

    def _note(self, item: News) -> None:
        if item.kind == "agent":
            self.agent = item.value
        elif item.kind == "status":
            with suppress(OSError):  # a full disk here, of which the follower speaks
                mirrored_status(self.run, item.value, self.rented)
        elif item.kind == "checkpoints" and item.value and self.where.volume is None:
            self._copy_checkpoint(max(item.value))

    def _why_stop(self) -> str | None:
        if self.asked:
            return "interrupted by you"
        left = self.rented.deadline - clock.now()
        if left < min(MARGIN_SECONDS, (self.rented.deadline - self.rented.meter.started) / 5):
            if budget.cap_sets_deadline(self.rented.deadline, self.rented.meter):
                return f"where.max_usd={self.rented.meter.cap_usd:g} is nearly spent"
            return "the pod's deadline is near"
        return None

    def _stop(self) -> bool:
        """As Ctrl-C does here: the training saves a checkpoint and ends. False where it could not be told."""
        pid = self.agent.get("pid")
        if self.at is None or not pid:
            return False
        try:
            self.at.connection.run(f"kill -INT {int(pid)}", check=False)
            return True
        except (RunnerError, ValueError, TypeError):
            return False

    def _restore_after_break(self) -> None:
        """Send secrets and start the agent after a break: a container that was made anew has neither."""
        assert self.at is not None
        transfer.send_secrets(self.at, self.spec)
        with suppress(CommandError):
            self.agent = self.at.start_agent()

    def _copy_checkpoint(self, step: int) -> None:
        """Download a new checkpoint in the background, so that a lost pod does not lose it."""
        at = self.at
        if at is None or (self._pull is not None and self._pull.is_alive()) or step in checkpoints.complete(self.run):
            return
        self._pull = threading.Thread(target=self._fetch_checkpoint, args=(at, step), daemon=True)
        self._pull.start()

    def _fetch_checkpoint(self, at: PodRunFolder, step: int) -> None:
        try:
            with suppress(LostError, CommandError):  # overtaken by a newer one, or by the end: tried again then
                download.download_checkpoint(at, self.run, step, self.say)
        except (TooMuchError, OSError) as error:
            self.say(f"Warning: the checkpoint after step {step} is in the pod alone: {error}")

    @contextmanager
    def _keepalive(self, at: PodRunFolder) -> Iterator[None]:
        """Send the launcher's heartbeat while files are transferred: silence would end the pod."""
        over = threading.Event()
        beat = f"touch {tail.SHM}/runner-{shlex.quote(self.run.id)}.beat"

        def touch() -> None:
            while not over.wait(min(20.0, 15 * self.where.heartbeat_minutes)):
                process = at.connection.open(beat)
                try:
                    process.communicate(timeout=20)
                except subprocess.TimeoutExpired:  # a connection that hangs is the carriers' to give up
                    process.kill()
                    process.communicate()

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM has the training save and end; the second leaves at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.asked += 1

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with interrupts_handled_by(handle):
            yield

    # --- home ---

    def collect(self, final: bool = True, part: bool = True) -> None:
        """Download the run: all but this side's own files, the newest checkpoint, the model. Goes on after every break.

        Unless it is `final`, and to `part` with it, the pod is not told that it is needed no more. PodGoneError where
        the pod goes first, RunFailedError where it takes too long.
        """
        at = self.at
        assert at is not None
        if final:
            self.rented.mark("COLLECTING", str(self.agent.get("state")))
        end = time.monotonic() + COLLECT_SECONDS
        while True:
            try:
                began = time.monotonic()
                with self._keepalive(at):
                    mirrored_status(self.run, download.download_run(at, self.run, self.spec, self.say), self.rented)
                if final and part:
                    self.dismiss_pod()
                return
            except LostError as error:
                if time.monotonic() - began > PROGRESS_SECONDS:  # something was brought: patience begins anew
                    end = time.monotonic() + COLLECT_SECONDS
                if time.monotonic() > end:
                    what = f"the result could not be downloaded: {error}"
                    raise RunFailedError(Problem(what, None, f"python -m runner fetch {self.run.id}")) from None
                time.sleep(2)
                address = self.find()
                if address:
                    at.connection.moved(*address)

    def dismiss_pod(self) -> None:
        """Tell the pod that everything was collected: it ends itself, should nobody else; by stopping, where its disk
        does not take that note."""
        assert self.at is not None
        self.at.connection.run(f"touch {shlex.quote(self.at.folder)}/collected", check=False)

    def close(self) -> None:
        """Log out."""
        if self.at is not None:
            self.at.connection.close()
            self.at = None


def before_its_end(agent: dict[str, Any]) -> dict[str, Any]:
    """The agent's status as the run left it. A pod that has ended itself since says why in `message`: that is nothing
    about a run that was over."""
    if agent.get("state") != "ending":
        return agent
    ended_in, message = agent.get("ended_in") or "ending", f"the pod ended it: {agent.get('message')}"
    if ended_in in FINISHED:
        message = "the upload failed" if agent.get("uploaded") is False else ""
    return {**agent, "state": ended_in, "message": message or None}


def mirrored_status(run: RunDir, status: dict[str, object], rented: Lease) -> None:
    """The pod's `status.json` as this run's: its process is on another machine, whose number means nothing here."""
    if status:
        own = {"host": rented.name, "pid": None}
        run.write("status.json", {**run.status, **status, **own})
