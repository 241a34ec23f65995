"""Wait, with a bound, until a pod is listed and until its ssh answers."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from runner.cloud import clock
from runner.cloud.provider import OVER, Pod, Provider
from runner.cloud.provider_errors import (
    ApiDownError,
    BadHostError,
    CloudError,
    NoImageError,
    PullLimitError,
    WrongKeyError,
)
from runner.errors import Problem, RunnerError

POLL_S = 3.0
LEAST_POLL_S = 0.1
# How long a pod whose create was not answered is looked for; one that appears even later is found by whatever command
# comes next. Lists have lagged behind by seconds; a minute costs less than the first pod of the next try.
LOOK_S = 60.0
LEAST_LOOK_S = 2.0
BANNER_S = 5.0
PULL_S = 20.0
LEAST_PULL_S = 1.0
NO_IMAGE = re.compile(
    r"manifest unknown|manifest for .* not found|pull access denied|repository does not exist|no matching manifest|"
    r"invalid reference format|name unknown|failed to (pull|resolve)[^\n]*(not found|unauthorized|denied|forbidden)|"
    r"(unauthorized|insufficient_scope): ?(authentication|authorization)",
    re.IGNORECASE,
)
"""What Docker and registries say of an image that no host will ever be able to pull."""
PULL_LIMIT = re.compile(r"toomanyrequests|pull rate limit|429 Too Many Requests", re.IGNORECASE)
"""What they say where too much was pulled from one address, or with one login: hosts of a cloud share addresses."""


def poll_s(api: Provider) -> float:
    """Seconds between two questions."""
    return max(LEAST_POLL_S, POLL_S * clock.pace(api.base))


def pods_named(api: Provider, name: str) -> list[Pod]:
    """Pods of exactly that name that are not over: names are unique here, though no provider asks for it."""
    return [pod for pod in api.pods() if pod.name == name and pod.status not in OVER]


def wait_for_name(api: Provider, name: str) -> list[Pod]:
    """Pods of that name, as soon as there is one; none if none appears. CloudError where nobody could be asked."""
    end_by = time.monotonic() + max(LEAST_LOOK_S, LOOK_S * clock.pace(api.base))
    failed: RunnerError | None = None
    while True:
        try:
            if found := pods_named(api, name):
                return found
            failed = None
        except RunnerError as error:
            failed = error
        if time.monotonic() > end_by:
            if failed is not None:
                raise failed
            return []
        time.sleep(poll_s(api))


def wait_until_ready(
    api: Provider,
    pod: Pod,
    *,
    setup_s: float,
    bad_host_s: float,
    say: Callable[[str], None],
    seen: Callable[[Pod], None],
) -> Pod:
    """The pod as soon as its SSH server says hello; BadHostError if it will not. `seen` gets each answer.

    RUNNING is not enough: it has come without ports, and a port without a server behind it.
    """
    began = looked = time.monotonic()
    told = ""
    while True:
        if time.monotonic() - looked > max(LEAST_PULL_S, PULL_S * clock.pace(api.base)):
            _check_pull(api, pod)
            looked = time.monotonic()
        # It cannot be asked for a moment, or a key is refused once and accepted again: the deadline goes on.
        with suppress(ApiDownError, WrongKeyError):
            found = api.pod(pod.id)
            if found is None or found.status in (*OVER, "EXITED", "ERROR"):
                state = found.status if found is not None else "gone"
                raise BadHostError(Problem(f"pod {pod.id} is {state} before it was ready"))
            pod = found
            seen(pod)
            if pod.ssh_host and pod.ssh_port and says_hello(pod.ssh_host, pod.ssh_port):
                return pod
        waited = time.monotonic() - began
        if pod.status != told:
            say(f"pod {pod.id}: {pod.status.lower()}, {waited:.0f} s")
            told = pod.status
        if not pod.has_machine and waited > bad_host_s:
            raise BadHostError(Problem(f"pod {pod.id} has no machine after {waited / 60:.1f} minutes: a bad host"))
        if waited > setup_s:
            raise BadHostError(Problem(f"pod {pod.id} does not answer by SSH after {waited / 60:.1f} minutes"))
        time.sleep(poll_s(api))


def _check_pull(api: Provider, pod: Pod) -> None:
    """NoImageError or PullLimitError where the provider's log of the pod says that its image cannot be had."""
    with suppress(CloudError):
        for text in api.logs(pod.id, source="system", tail=20):  # which ends when it pauses: a refusal ends it sooner
            line = " ".join(text.split())[-200:]
            if NO_IMAGE.search(line):
                what = f"the image {pod.image} cannot be pulled: {line}"
                remedy = "correct where.image; for a private one, a template with its registry's login"
                raise NoImageError(Problem(what, "where.image", f"{remedy}: where.template=ID"))
            if PULL_LIMIT.search(line):
                what = f"the registry refuses to serve {pod.image} now: {line}"
                remedy = (
                    "wait (Docker Hub counts by six hours), take an image from another registry (where.image=…), or"
                )
                remedy += " a template with a login of the registry: where.template=ID"
                raise PullLimitError(Problem(what, "where.image", remedy))


def says_hello(host: str, port: int) -> bool:
    """Return True if an SSH server responds: its first bytes are `SSH-` (RFC 4253, 4.2)."""
    try:
        with socket.create_connection((host, port), timeout=BANNER_S) as connection:
            connection.settimeout(BANNER_S)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
