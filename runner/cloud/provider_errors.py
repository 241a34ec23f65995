"""Errors of renting, whoever rents out.

RunnerError
├── RequestError      2
│   ├── NoKeyError        no API key in the environment
│   ├── WrongKeyError     the key is not, or no longer, good, or may not do this
│   ├── RefusedError      the provider says that the request itself is wrong
│   └── NoImageError      the image cannot be pulled, on this host or another one
├── CannotRunError    3
│   ├── NoBalanceError    the account has no money
│   ├── NoCapacityError   there is no such machine now
│   ├── PullLimitError    the registry serves nobody this image now
│   └── TooDearError      the pod costs more than was allowed
└── CloudError        1
    ├── ConflictError     not in this state of the pod
    ├── ApiDownError      the provider could not be asked, after several tries
    ├── UnclearError      a create may or may not have been carried out: look, never try again
    ├── BadHostError      a pod that will not become ready: give it back, try another one
    ├── NoPodError        every offer was tried
    └── StillThereError   a pod could not be confirmed to be gone: it may cost money
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runner.errors import CannotRunError, Problem, RequestError, RunnerError

if TYPE_CHECKING:  # a plan knows prices, and rents nothing
    from runner.cloud.provider import Provider


class NoKeyError(RequestError):
    """There is no API key."""


class WrongKeyError(RequestError):
    """The API key is not accepted. It never means that a pod is gone."""


class RefusedError(RequestError):
    """The provider will not carry out such a request: a field or a rule is wrong."""


class NoImageError(RequestError):
    """The image cannot be pulled, on this host or another one."""


class NoBalanceError(CannotRunError):
    """The account has no money."""


class NoCapacityError(CannotRunError):
    """No such machine is free: another may be."""


class PullLimitError(CannotRunError):
    """The registry lets nobody pull the image now; another host would wait, and be paid for, just as long."""


class TooDearError(CannotRunError):
    """A pod costs more than was allowed."""


class CloudError(RunnerError):
    """The provider failed; neither the request nor a limit was the cause."""


class ConflictError(CloudError):
    """A pod in this state cannot do that."""


class ApiDownError(CloudError):
    """The provider did not answer, or not sensibly, however often it was asked."""


class UnclearError(CloudError):
    """Unknown outcome of a request that must not be repeated."""


class BadHostError(CloudError):
    """A pod that will not become ready: it is to be given back, and another one tried."""


class NoPodError(CloudError):
    """No offer became a pod that works."""


class StillThereError(CloudError):
    """A pod could not be confirmed to be gone."""


def still_there_problem(api: Provider, pod_id: str, name: str, why: str) -> Problem:
    """A pod that may still run: its id, the command that ends it, and its page."""
    remedy = (
        f"python -m runner pods terminate {pod_id}   (every later command tries again), "
        f"or end it by hand at {api.page(pod_id)}"
    )
    return Problem(f"POD {pod_id} ({name}) MAY STILL BE RUNNING AND COST MONEY: {why}", None, remedy)


def unseen_pod(api: Provider, name: str, why: str) -> Problem:
    """A create request whose outcome is not known: the name that the pod would have."""
    remedy = (
        f"python -m runner pods terminate {name}   (every following command looks for it, too), "
        f"or look for it at {api.page()}"
    )
    what = f"POD {name} MAY STILL BE RUNNING AND COST MONEY: what became of the request for it is not known: {why}"
    return Problem(what, None, remedy)
