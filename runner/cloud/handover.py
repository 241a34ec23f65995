"""Hand a pod from one run of a sweep to the next, with its dead-man's switch armed throughout.

Parked, it has a last order from the run that is home: end in ten minutes. Then its switch finds the next run's order,
and the word that the pod is handed on, and serves that run from there on (agent.py). Whoever dies in between leaves a
pod that ends itself: by the one order or by the other.
"""

from __future__ import annotations

import shlex

from runner.cloud import clock
from runner.cloud.session import Session
from runner.cloud.ssh import LostError
from runner.cloud.transfer import PodRunFolder
from runner.errors import Problem, RunFailedError

PARKED_MINUTES = 10.0
"""A pod that no run takes over in so many minutes ends itself."""
TRIES = 2


def park(session: Session) -> float:
    """Order a pod whose run was downloaded to end itself unless it is handed on in time; its deadline (epoch)."""
    assert session.at is not None
    deadline = clock.now() + 60 * PARKED_MINUTES
    order = session.order(detach=False) | {"deadline": deadline, "budget_usd": None, "uncollected": "terminate"}
    order["fresh"] = False
    session.at.place("agent.json", order)
    return deadline


def hand_over(old: Session, new: Session) -> None:
    """Make the parked pod of `old` serve the run of `new`, which logs in by its own key from here on.

    LostError, PodGoneError or RunFailedError where it does not: then it is to be ended.
    """
    for attempt in range(1, TRIES + 1):
        try:
            at = old.login()
            _clear_run(at, old, new)
            serve_next(at, PodRunFolder(at.connection, at.workspace, new.run.id), new.order(detach=False))
            return
        except LostError:
            if attempt == TRIES:
                raise
        finally:
            old.close()


def serve_next(at: PodRunFolder, there: PodRunFolder, order: dict[str, object]) -> None:
    """Make the dead-man's switch of the run `at` serve the run `there`, by its order; RunFailedError otherwise."""
    folder = shlex.quote(there.folder)
    # A run that had the pod before has handed it on to somebody, too: two that name each other would go round for ever.
    at.connection.run(f"mkdir -p {folder}/logs; rm -f {folder}/successor.json")
    there.place("agent.json", order)
    at.place("successor.json", {"run_id": there.run_id})
    status = at.start_agent()  # it is at work, and answers for the run that it serves by then; else it begins with that
    if status.get("order") != order["id"]:
        what = f"its agent did not take the next run's order: it is {status.get('state')}"
        raise RunFailedError(Problem(what, None, f"{at.folder}/logs/agent.log in the pod says why"))


def _clear_run(at: PodRunFolder, old: Session, new: Session) -> None:
    """Free the pod's disk of a downloaded run and of another model's weights. The agent's files and logs stay."""
    words = [f"rm -f /dev/shm/runner-{shlex.quote(old.run.id)}.env"]
    if old.where.volume is None:
        words.append(f"find {shlex.quote(at.folder)} -mindepth 1 -maxdepth 1 -type d ! -name logs -exec rm -rf {{}} +")
        if old.spec.model.id != new.spec.model.id:
            words += [f"rm -rf {at.workspace}/{name}" for name in ("hf_cache/hub", "cache/runner", "artifacts")]
    at.connection.run("; ".join(words), seconds=300)
