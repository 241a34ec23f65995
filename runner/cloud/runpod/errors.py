"""Errors of renting from RunPod, each with its remedy.

RunnerError
├── RequestError      2
│   ├── NoKeyError        no RUNPOD_API_KEY
│   ├── WrongKeyError     the key is not, or no longer, good, or may not do this
│   └── RefusedError      RunPod says that the request itself is wrong
├── CannotRunError    3
│   ├── NoBalanceError    the account has no money
│   ├── NoCapacityError   there is no such machine now
│   └── TooDearError      the pod costs more than was allowed
└── CloudError        1
    ├── ConflictError     not in this state of the pod
    ├── ApiDownError      RunPod could not be asked, after several tries
    ├── UnclearError      a create may or may not have been carried out: look, never try again
    ├── NoPodError        every candidate was tried
    └── StillThereError   a pod could not be confirmed to be gone: it may cost money
"""

from __future__ import annotations

from runner.errors import CannotRunError, Problem, RequestError, RunnerError

CONSOLE = "https://console.runpod.io"
KEYS_PAGE = f"{CONSOLE}/user/settings"
BILLING_PAGE = f"{CONSOLE}/user/billing"


class NoKeyError(RequestError):
    """There is no API key."""


class WrongKeyError(RequestError):
    """The API key is not accepted. It never means that a pod is gone."""


class RefusedError(RequestError):
    """RunPod will not carry out such a request: a field or a rule is wrong."""


class NoBalanceError(CannotRunError):
    """The account has no money."""


class NoCapacityError(CannotRunError):
    """No such machine is free: another may be."""


class TooDearError(CannotRunError):
    """A pod costs more than was allowed."""


class CloudError(RunnerError):
    """Something about RunPod went wrong that is neither the request nor a limit."""


class ConflictError(CloudError):
    """A pod in this state cannot do that."""


class ApiDownError(CloudError):
    """RunPod did not answer, or not sensibly, however often it was asked."""


class UnclearError(CloudError):
    """Whether a request that must not be repeated was carried out is not known."""


class NoPodError(CloudError):
    """No candidate became a pod that works."""


class StillThereError(CloudError):
    """A pod could not be confirmed to be gone."""


def no_key() -> Problem:
    """RUNPOD_API_KEY is not set."""
    return Problem("RUNPOD_API_KEY is not set", "environment", f"export RUNPOD_API_KEY=…, made at {KEYS_PAGE}")


def odd_key() -> Problem:
    """RUNPOD_API_KEY cannot be sent in a header."""
    what = "RUNPOD_API_KEY is no key: it has a blank, a line break or a letter that no key has"
    return Problem(what, "environment", f"copy it again, on one line, from {KEYS_PAGE}")


def wrong_key(said: str) -> Problem:
    """401 or 403."""
    remedy = f"make a key with write access at {KEYS_PAGE} and export RUNPOD_API_KEY=…"
    return Problem(f"RunPod does not accept RUNPOD_API_KEY: {said}", "environment", remedy)


def no_balance(said: str) -> Problem:
    """402."""
    return Problem(f"RunPod: {said}", None, f"add funds at {BILLING_PAGE}; nothing was rented")


def pod_page(pod_id: str) -> str:
    """Where a person sees and ends a pod."""
    return f"{CONSOLE}/pods?id={pod_id}"


def still_there(pod_id: str, name: str, why: str) -> Problem:
    """The one thing that may not pass unseen."""
    remedy = (
        f"python -m runner pods terminate {pod_id}   (every following command tries, too), "
        f"or end it by hand at {pod_page(pod_id)}"
    )
    return Problem(f"POD {pod_id} ({name}) MAY STILL BE RUNNING AND COST MONEY: {why}", None, remedy)


def unseen(name: str, why: str) -> Problem:
    """A create request of which nobody knows what became of it."""
    remedy = (
        f"python -m runner pods terminate {name}   (every following command looks for it, too), "
        f"or look for it at {CONSOLE}/pods"
    )
    what = f"POD {name} MAY STILL BE RUNNING AND COST MONEY: what became of the request for it is not known: {why}"
    return Problem(what, None, remedy)
