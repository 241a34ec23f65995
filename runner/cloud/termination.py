"""Terminate a pod, confirm with two consecutive polls, raise otherwise. No ledger is needed."""

from __future__ import annotations

import time
from contextlib import suppress

from runner.cloud import clock, provider_errors, ssh
from runner.cloud.ledger import Ledger, LedgerError
from runner.cloud.provider import OVER, Provider
from runner.cloud.provider_errors import ApiDownError, StillThereError, WrongKeyError
from runner.errors import Problem, RunnerError

# Two looks so far apart: a pod that was accepted for deletion was seen missing from one list and present in the next.
GAP_S = 5.0
PATIENCE_S = 180.0
LEAST_PATIENCE_S = 10.0
LOOKS = 2
WRONG_KEYS = 3  # a key is refused once in a while; three times, and waiting will not make it right


def terminate(api: Provider, ledger: Ledger, name: str, pod_id: str, why: str) -> None:
    """Terminate a pod and confirm it; StillThereError, with all that a person needs, where that fails.

    The ledger keeps TERMINATING until it is confirmed: every following command tries again. Terminating comes first:
    a ledger may be locked for half a minute, or lost.
    """
    with suppress(RunnerError):  # asked for again below
        api.terminate(pod_id)
    ledger.try_move(name, "TERMINATING", why, keep=0, pod_id=pod_id)
    confirm_gone(api, name, pod_id)
    ledger.try_move(name, "GONE", f"{why}; confirmed")


def confirm_gone(api: Provider, name: str, pod_id: str) -> None:
    """Ask for a pod's end until it is absent twice; StillThereError after three minutes."""
    absent, wrong, why = 0, 0, "it is still listed"
    end_by = time.monotonic() + _patience(api)
    while absent < LOOKS:
        try:
            if not absent:
                ssh.forget_host_key(pod_id)
                api.terminate(pod_id)
            absent = absent + 1 if is_absent(api, pod_id) else 0
            why = "it is still listed"
        except RunnerError as error:
            absent, why = 0, str(error)
            wrong += isinstance(error, WrongKeyError)
        if absent < LOOKS:
            if time.monotonic() > end_by or wrong == WRONG_KEYS:
                raise StillThereError(provider_errors.still_there_problem(api, pod_id, name, why))
            time.sleep(GAP_S * clock.pace(api.base))


def is_absent(api: Provider, pod_id: str) -> bool:
    """The provider says that there is no such pod, and does not list it either, where it lists anything."""
    found = api.pod(pod_id)
    if found is not None and found.status not in OVER:
        return False
    try:
        listed = api.pods()
    except ApiDownError:  # the pod's own address answers, and says that there is none
        return True
    return all(pod.id != pod_id or pod.status in OVER for pod in listed)


def terminate_duplicates(api: Provider, pod_id: str, name: str) -> list[str]:
    """Terminate pods of the same name other than this one: a create request can be carried out twice. Their ids."""
    found = [p.id for p in api.pods() if p.name == name and p.id != pod_id and p.status not in OVER]
    for double in found:
        confirm_gone(api, name, double)
    return found


def is_gone(api: Provider, pod_id: str) -> bool:
    """Absent twice, some seconds apart."""
    for look in range(LOOKS):
        if look:
            time.sleep(GAP_S * clock.pace(api.base))
        if not is_absent(api, pod_id):
            return False
    return True


def stop(api: Provider, ledger: Ledger, name: str, pod_id: str, why: str) -> None:
    """Stop a pod, keep its disk, and confirm that it costs no GPU; StillThereError where that fails."""
    with suppress(RunnerError):  # asked for again below
        api.stop(pod_id)
    ledger.try_move(name, "TERMINATING", f"{why}: to be stopped and kept", keep=1)
    end_by = time.monotonic() + _patience(api)
    ssh.forget_host_key(pod_id)
    while True:
        try:
            api.stop(pod_id)
            found = api.pod(pod_id)
            if found is None:
                ledger.try_move(name, "GONE", f"{why}; there was nothing left to keep")
                return
            if found.status == "EXITED":
                break
            said = f"it is {found.status}"
        except RunnerError as error:
            said = str(error)
        if time.monotonic() > end_by:
            raise StillThereError(
                provider_errors.still_there_problem(api, pod_id, name, f"it was to be stopped, and {said}")
            )
        time.sleep(GAP_S * clock.pace(api.base))
    _kept(ledger, name, pod_id, why)


def _kept(ledger: Ledger, name: str, pod_id: str, why: str) -> None:
    """Record a stopped pod: its disk costs money until somebody ends it, and an entry is what tells of it."""
    try:
        ledger.move(name, "STOPPED", f"{why}; kept")
    except LedgerError as error:
        remedy = f"python -m runner pods terminate {pod_id}"
        what = f"pod {pod_id} is stopped, its disk costs money, and that is not recorded: {error}"
        raise StillThereError(Problem(what, None, remedy)) from None


def _patience(api: Provider) -> float:
    return max(LEAST_PATIENCE_S, PATIENCE_S * clock.pace(api.base))
