"""A pod held by this process: polled, metered, released."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from runner.cloud import clock, termination
from runner.cloud.budget import Meter, stopped_usd_per_day
from runner.cloud.ledger import Entry, Ledger, LedgerError, State
from runner.cloud.provider import Pod, Provider
from runner.cloud.provider_errors import ApiDownError, WrongKeyError
from runner.cloud.reconcile import end_unanswered_creates


@dataclass
class Lease:
    """A pod that this process holds: everything about it that is not SSH. It outlives the process by `detach`."""

    api: Provider
    ledger: Ledger
    name: str
    pod: Pod
    """As it was seen last."""
    deadline: float
    """Epoch at which it must have ended itself: by `where.deadline_hours`, or what the cap pays for."""
    meter: Meter
    run_id: str
    volume_gb: float = 0.0
    say: Callable[[str], None] = lambda line: None
    """For what somebody has to know at once."""
    before: Entry | None = None
    """A person's own running pod that it was, and becomes again after the run."""

    @property
    def usd_per_hour(self) -> float:
        """Actual hourly price."""
        return self.meter.usd_per_hour

    @property
    def cap_usd(self) -> float | None:
        """Remaining budget of this pod: `where.max_usd` less the cost of earlier pods of the run."""
        return None if self.meter.cap_usd is None else self.meter.cap_usd - self.meter.before_usd

    def usd(self) -> float:
        """Cost of the run so far, earlier pods and disks included."""
        return self.meter.usd(clock.now())

    def mark(self, state: State, why: str = "") -> None:
        """Record a state before what it says is done. Where that fails it is said how to end the pod: this process
        still holds it, and a run is not ended for its bookkeeping."""
        try:
            self.ledger.move(self.name, state, why or state.lower())
        except LedgerError as error:
            (problem,) = error.problems
            command = f"python -m runner pods terminate {self.pod.id}"
            self.say(f"Warning: {problem.what}. Should this command be killed, POD {self.pod.id} MAY STILL BE RUNNING")
            self.say(f"         AND COST MONEY: {command}. The ledger: {problem.remedy}")

    def refresh(self) -> Pod | None:
        """The pod as it is now; None where it is gone, looked at twice. A pod that was taken away may also be EXITED.

        ApiDownError and WrongKeyError mean that nobody knows, and not that it is gone.
        """
        end_unanswered_creates(self.api, self.ledger, self.run_id)
        found = self._asked()
        if found is None:
            if termination.is_gone(self.api, self.pod.id):
                self.mark("PREEMPTED", "it vanished")
                return None
            found = self.api.pod(self.pod.id)
        if found is not None:
            self.pod = found
        return self.pod

    def _asked(self) -> Pod | None:
        """A key is refused once in a while: a run in the middle of its training does not end for that."""
        for _ in range(termination.WRONG_KEYS - 1):
            with suppress(WrongKeyError):
                return self.api.pod(self.pod.id)
            time.sleep(termination.GAP_S * clock.pace(self.api.base))
        return self.api.pod(self.pod.id)

    def release(self, keep: bool = False) -> None:
        """End the pod, or stop it with `keep`, and confirm that; StillThereError, loud, where that cannot be done.

        May be called again, and for a pod that is gone.
        """
        for attempt in (1, 2):
            try:
                if keep:
                    termination.stop(self.api, self.ledger, self.name, self.pod.id, "the run is over")
                else:
                    termination.terminate(self.api, self.ledger, self.name, self.pod.id, "the run is over")
                end_unanswered_creates(self.api, self.ledger, self.run_id, now=True)
                with suppress(ApiDownError):  # what is listed later is ended by the next command
                    termination.terminate_duplicates(self.api, self.pod.id, self.pod.name)
                self.ledger.leave(self.name)
                return
            except KeyboardInterrupt:  # once: an impatient second Ctrl-C must not leave a pod behind
                if attempt == 2:
                    raise

    def detach(self) -> None:
        """Leave it to its agent: nobody holds it, and no launcher has to be heard of."""
        self.ledger.set(self.name, heartbeat_s=None)
        self.ledger.leave(self.name)

    def kept_usd_per_day(self) -> float:
        """Daily cost while the pod is stopped."""
        return stopped_usd_per_day(self.volume_gb)
