"""Reconcile the ledger with the provider's list, at the start of every command that rents or looks.

A pod that a living launcher holds is left alone. So is one whose agent is armed (RUNNING, COLLECTING), for it ends
itself, and may have a result that is worth fetching; all others that nobody holds are ended.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from urllib.parse import urlsplit

from runner.cloud import clock, termination
from runner.cloud.ledger import ARMED, Entry, Ledger, LedgerError
from runner.cloud.provider import OVER, Pod, Provider
from runner.cloud.provider_errors import CloudError, StillThereError
from runner.cloud.readiness import pods_named, wait_for_name
from runner.errors import RunnerError

# A create that was not answered is believed to have come to nothing when its name has not appeared for so long.
UNKNOWN_S = 15 * 60
DAY_S = 86_400
AFTER_DEADLINE_S = 5 * 60  # a pod that should have ended itself, and did not


def reconcile(api: Provider, ledger: Ledger) -> list[str]:
    """Bring every entry that nobody holds to its end, and say what was done; never raises for what a provider does.

    WrongKeyError alone goes through: with such a key nothing else would work either.
    """
    try:
        entries = [entry for entry in ledger.entries() if not entry.owned]
    except LedgerError as error:
        return [str(error)]
    if not entries:
        return []
    notes: list[str] = []
    try:
        pods = {pod.id: pod for pod in api.pods() if pod.status not in OVER}
    except CloudError as error:
        return [f"{len(entries)} pods of earlier commands could not be looked after: {error}"]
    there = clock.ProviderClock(api.time)
    others: list[str] = []
    for entry in entries:
        if _of_another_account(api, entry, pods):
            if _emulator_has_ended(entry):
                ledger.try_move(entry.name, "GONE", "its emulator has ended, and every pod with it")
            else:
                others.append(entry.pod_id or entry.name)
            continue
        try:
            if not ledger.take(entry.name):
                continue  # another command was faster
            now = ledger.entry(entry.name)  # it may have moved on since it was listed
            if now is None or now.state == "GONE":
                continue
            if note := _settle(api, ledger, now, pods, there, died=entry.pid is not None):
                notes.append(note)
        except StillThereError as error:
            notes += [f"{problem.what}; {problem.remedy}" for problem in error.problems]
        except RunnerError as error:
            notes.append(f"pod {entry.pod_id or entry.name}: {error}")
        ledger.leave(entry.name, heard=False)
    return notes + _left_unchanged(others)


def _left_unchanged(pods: list[str]) -> list[str]:
    if not pods:
        return []
    shown = ", ".join([*pods[:2], "…"] if len(pods) > 2 else pods)
    which = f"pod {shown} was" if len(pods) == 1 else f"{len(pods)} pods ({shown}) were"
    return [f"{which} rented with another key or address; left unchanged"]


def _emulator_has_ended(entry: Entry) -> bool:
    """An emulator on this machine that no longer listens; it ends its pods when it ends (docs/emulator.md).

    Not before the pod's own switch has ended it, or a day after it was rented: the address may be a tunnel's to RunPod.
    """
    address = urlsplit(entry.base)
    if address.hostname not in ("127.0.0.1", "localhost") or address.port is None:
        return False
    if clock.now() < (entry.deadline or entry.created + DAY_S):
        return False
    try:
        socket.create_connection((address.hostname, address.port), timeout=1).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _of_another_account(api: Provider, entry: Entry, pods: dict[str, Pod]) -> bool:
    """A pod is not gone because another account does not have it."""
    if entry.base != api.base:
        return True
    return entry.account != api.account and entry.pod_id not in pods


def _settle(
    api: Provider, ledger: Ledger, entry: Entry, pods: dict[str, Pod], there: clock.ProviderClock, died: bool
) -> str | None:  # fmt: skip
    """One entry that nobody holds, whose launcher `died` without giving it up; what was done, or None where nothing had
    to be."""
    name, state = entry.name, entry.state
    if state == "PLANNED":
        ledger.move(name, "GONE", "never requested: the launcher ended first")
        return None
    if state in ("CREATING", "CREATE_UNKNOWN"):
        return _unanswered(api, ledger, entry)
    assert entry.pod_id is not None
    if any(pod.name == name and pod.id != entry.pod_id for pod in pods.values()):
        termination.terminate_duplicates(api, entry.pod_id, name)
    if state in (*ARMED, "STOPPED"):
        return _armed(api, ledger, entry, pods.get(entry.pod_id), there, died)
    if entry.keep and (state == "TERMINATING" or rented_at(ledger, entry) < entry.created):  # it had a run before
        termination.stop(api, ledger, name, entry.pod_id, "again, after the launcher ended")
        return f"pod {entry.pod_id} of run {entry.run_id} is stopped, as requested"
    termination.terminate(
        api, ledger, name, entry.pod_id, f"no process follows it any more, {state} since its launcher ended"
    )
    return f"pod {entry.pod_id} of run {entry.run_id} was left {state} by a launcher that is gone: it is ended"


def _unanswered(api: Provider, ledger: Ledger, entry: Entry) -> str | None:
    """A create of which nobody knows what became of it."""
    if entry.state == "CREATING":
        ledger.move(entry.name, "CREATE_UNKNOWN", "the launcher ended during the request")
    found = wait_for_name(api, entry.name) if entry.state == "CREATING" else pods_named(api, entry.name)
    for pod in found:
        termination.terminate(api, ledger, entry.name, pod.id, "it came of a create that was not answered")
    if found:
        return f"pod {found[0].id} of run {entry.run_id} came of a create that was not answered: it is ended"
    if _is_old(api, entry):
        ledger.move(entry.name, "GONE", "no pod of that name has appeared")
    return None


def _is_old(api: Provider, entry: Entry) -> bool:
    """A create of which nothing has come for a quarter of an hour, by this machine's clock and by the provider's: one
    of them may be wrong."""
    if clock.now() - entry.created <= UNKNOWN_S:
        return False
    there = api.time()
    return there is not None and there - entry.created > UNKNOWN_S


def _armed(
    api: Provider, ledger: Ledger, entry: Entry, pod: Pod | None, there: clock.ProviderClock, died: bool = False
) -> str | None:  # fmt: skip
    """A pod that looks after itself."""
    assert entry.pod_id is not None
    if pod is None:
        if termination.is_gone(api, entry.pod_id):
            ledger.move(entry.name, "GONE", "it has ended itself, or was taken away")
            if entry.state != "STOPPED":
                return f"pod {entry.pod_id} of run {entry.run_id} is gone"
        return None
    if pod.status == "EXITED" and entry.state != "STOPPED":
        ledger.move(entry.name, "STOPPED", "it has stopped itself, with a result that was not downloaded")
        return f"pod {pod.id} has stopped itself with its result: python -m runner fetch {entry.run_id}"
    now = None if entry.state == "STOPPED" else there.now(pod, rented_at(ledger, entry))
    if now is not None and died:
        # At an unknown moment, maybe hours after its last entry: its agent, and the person who will attach, have the
        # whole time of its silence from now on.
        entry = replace(entry, updated=max(entry.updated, now))
        ledger.set(entry.name, updated=entry.updated)
    if now is not None and overdue(entry, now):
        return _end_overdue(api, ledger, entry, pod)
    return None


def _end_overdue(api: Provider, ledger: Ledger, entry: Entry, pod: Pod) -> str:
    """As its agent should have: a pod with a disk of its own is stopped, for that may have the only result; one without
    it, or that cannot be stopped, is terminated."""
    late = f"pod {pod.id} of run {entry.run_id} was past its deadline and still running"
    if pod.volume_gb:
        try:
            termination.stop(api, ledger, entry.name, pod.id, "it is past its deadline")
            became = f"python -m runner fetch {entry.run_id}, or pods terminate {entry.run_id}"
            return f"{late}: it is stopped, and its disk, which may have the result, costs money until {became}"
        except StillThereError:
            found = api.pod(pod.id)
            if found is not None and found.status == "EXITED":
                raise  # it is not recorded
    termination.terminate(api, ledger, entry.name, pod.id, "it is past its deadline")
    return f"{late}: it is ended"


def rented_at(ledger: Ledger, entry: Entry) -> float:
    """Return when the entry's pod was requested, by this machine's clock; another run may have used it first."""
    same = [e for e in ledger.entries(gone=True) if e.pod_id == entry.pod_id and e.pod_id is not None]
    return min(e.created for e in [entry, *same])


def overdue(entry: Entry, now: float) -> bool:
    """Return True if the pod should have ended itself, by its deadline or its launcher's silence.

    `now` by the clock that the entry was written by, never by whatever this machine's clock says.
    """
    if entry.deadline is not None and now > entry.deadline + AFTER_DEADLINE_S:
        return True
    return entry.heartbeat_s is not None and now > entry.updated + entry.heartbeat_s + AFTER_DEADLINE_S


def end_unanswered_creates(api: Provider, ledger: Ledger, run_id: str, *, now: bool = False) -> None:
    """End what a create of this run that was not answered has brought forth meanwhile; one question, if any.

    `now`: the run is over, and what has not appeared in a minute is left to the next command.
    """
    try:
        entries = ledger.entries(run_id)
    except LedgerError:
        return
    for entry in entries:
        if entry.state != "CREATE_UNKNOWN" or not (entry.owned_here or not entry.owned):
            continue
        try:
            found = wait_for_name(api, entry.name) if now else pods_named(api, entry.name)
        except RunnerError:
            continue  # it stays in the ledger
        for pod in found:
            termination.terminate(api, ledger, entry.name, pod.id, "it came of a create that was not answered")
        if not found and _is_old(api, entry):
            ledger.try_move(entry.name, "GONE", "no pod of that name has appeared")
