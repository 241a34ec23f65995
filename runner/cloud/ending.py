"""The end of a pod: asked for as often as it is seen, believed when it was absent twice, and loud otherwise."""

from __future__ import annotations

import time

from runner.cloud import problems
from runner.cloud.account import pace
from runner.cloud.answers import OVER
from runner.cloud.api import Api
from runner.cloud.ledger import Ledger
from runner.cloud.problems import StillThereError, WrongKeyError
from runner.errors import RunnerError

# Two looks so far apart: a pod that was accepted for deletion was seen missing from one list and present in the next.
GAP_S = 5.0
PATIENCE_S = 180.0
LEAST_PATIENCE_S = 10.0
LOOKS = 2
WRONG_KEYS = 3  # a key is refused once in a while; three times, and waiting will not make it right


def end(api: Api, ledger: Ledger, name: str, pod_id: str, why: str) -> None:
    """Terminate a pod and confirm it; StillThereError, with all that a person needs, where that fails.

    The ledger knows first, and keeps TERMINATING until it is confirmed: every following command tries again.
    """
    ledger.move(name, "TERMINATING", why, keep=0, pod_id=pod_id)
    confirm_gone(api, name, pod_id)
    ledger.move(name, "GONE", f"{why}; confirmed")


def confirm_gone(api: Api, name: str, pod_id: str) -> None:
    """Ask for a pod's end until it is absent twice; StillThereError after three minutes."""
    absent, wrong, why = 0, 0, "it is still listed"
    end_by = time.monotonic() + _patience()
    while absent < LOOKS:
        try:
            if not absent:
                api.terminate(pod_id)
            absent = absent + 1 if is_absent(api, pod_id) else 0
            why = "it is still listed"
        except RunnerError as error:
            absent, why = 0, str(error)
            wrong += isinstance(error, WrongKeyError)
        if absent < LOOKS:
            if time.monotonic() > end_by or wrong == WRONG_KEYS:
                raise StillThereError(problems.still_there(pod_id, name, why))
            time.sleep(GAP_S * pace())


def is_absent(api: Api, pod_id: str) -> bool:
    """RunPod says that there is no such pod, and does not list it either."""
    found = api.pod(pod_id)
    if found is not None and found.status not in OVER:
        return False
    return all(pod.id != pod_id or pod.status in OVER for pod in api.pods())


def is_gone(api: Api, pod_id: str) -> bool:
    """Absent twice, some seconds apart."""
    for look in range(LOOKS):
        if look:
            time.sleep(GAP_S * pace())
        if not is_absent(api, pod_id):
            return False
    return True


def stop(api: Api, ledger: Ledger, name: str, pod_id: str, why: str) -> None:
    """Stop a pod, keep its disk, and confirm that it costs no GPU; StillThereError where that fails."""
    ledger.move(name, "TERMINATING", f"{why}: to be stopped and kept", keep=1)
    end_by = time.monotonic() + _patience()
    while True:
        try:
            api.stop(pod_id)
            found = api.pod(pod_id)
            if found is None:
                ledger.move(name, "GONE", f"{why}; there was nothing left to keep")
                return
            if found.status == "EXITED":
                ledger.move(name, "STOPPED", f"{why}; kept")
                return
            said = f"it is {found.status}"
        except RunnerError as error:
            said = str(error)
        if time.monotonic() > end_by:
            raise StillThereError(problems.still_there(pod_id, name, f"it was to be stopped, and {said}"))
        time.sleep(GAP_S * pace())


def _patience() -> float:
    return max(LEAST_PATIENCE_S, PATIENCE_S * pace())
