"""Send one request through RunPod's SDK and classify the response.

The SDK sends with a timeout of 30 s and never again, and tells errors by their status. What is safe to repeat (reads,
and ending a pod) is repeated here with growing pauses, as long as RunPod says when it was asked too often; what is not
is never sent twice: the caller has to look what became of it.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

from runner.cloud.clock import pace
from runner.cloud.provider_errors import (
    ApiDownError,
    CloudError,
    ConflictError,
    NoBalanceError,
    NoCapacityError,
    RefusedError,
    UnclearError,
    WrongKeyError,
)
from runner.cloud.runpod import account_key
from runner.cloud.runpod.account_key import api_key, base_url
from runner.errors import CannotRunError, Problem, RunnerError
from runner.hub.bounded import bounded
from runner.report.invocation import install

TIMEOUT_S = 30.0  # between two bytes
TOTAL_S = 60.0  # to the last byte, however slowly they come
TRIES = 5
PAUSE_S = 1.0  # before the second try; doubled each time: 1 + 2 + 4 + 8 = 15 s in all
TOO_OFTEN = 429
LONGEST_PAUSE_S = 60.0  # however long Retry-After asks for: a pod costs money meanwhile

# 400 covers a wrong request as well as no capacity; these are the words of the second (docs and users' reports, 2026).
FULL = (
    "no longer any instances",
    "no instances currently available",
    "no instances available",
    "there are no instances",
    "not enough free gpus",
    "does not have the resources",
    "no available",
    "out of capacity",
    "insufficient capacity",
)
POOR = ("balance", "funds", "spend limit", "spending limit")


class NotFound(CloudError):
    """404, said by RunPod itself and not by something on the way to it."""


def request(method: str, path: str, *, params: object = None, json: object = None, repeat: bool) -> Any:
    """The answer's JSON, or None without one. `repeat`: it is safe to send again.

    WrongKeyError, NoBalanceError, NoCapacityError, RefusedError, ConflictError and NotFound say what RunPod answered.
    Everything else (no answer, an error of the server, a page of HTML) is ApiDownError after several tries where the
    request may be repeated, and UnclearError at once where it may not.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return _once(method, path, params, json)
        except _Again as error:
            last = error
        if attempt == TRIES or not (repeat or last.undone):
            break
        time.sleep(_pause(attempt, last))
    what = f"RunPod: {method} {path}: {last}"
    if repeat or last.undone:
        changed = "nothing was changed by this question"
        if method != "GET" and not last.undone:
            changed = "whether it was carried out is not known: look before you rely on either"
        remedy = f"see https://uptime.runpod.io, and try again; {changed}"
        raise ApiDownError(Problem(what, None, remedy))
    raise UnclearError(Problem(f"{what}; whether it was carried out is not known", None, None))


class _Again(RunnerError):
    """No usable answer."""

    after_s: float | None = None
    """What Retry-After says."""
    undone = False
    """It was certainly not carried out: asked too often, or nobody was there to ask."""


def _pause(attempt: int, last: _Again) -> float:
    """Seconds before a try: what RunPod asked for, else twice as long each time, never in step with others."""
    if last.after_s is not None:
        return min(last.after_s, LONGEST_PAUSE_S)
    usual = min(PAUSE_S * float(2 ** (attempt - 1)), LONGEST_PAUSE_S)
    return usual * random.uniform(0.8, 1.2) * pace(base_url())


def _once(method: str, path: str, params: object, json: object) -> Any:
    try:
        import requests
        from runpod.api.rest import run_rest_request
        from runpod.error import AuthenticationError, QueryError
    except ImportError:
        what = "where=runpod needs RunPod's SDK, which is not installed"
        raise CannotRunError(Problem(what, None, install("cloud"))) from None
    try:
        return bounded(
            lambda: run_rest_request(
                method, _prefixed(path), api_key=api_key(), params=params, json=json, timeout=TIMEOUT_S
            ),
            TOTAL_S,
        )
    except AuthenticationError as error:
        raise WrongKeyError(account_key.wrong_key_problem(str(error).rstrip("."))) from None
    except QueryError as error:
        raise _meaning(error, _response_of(error), method, path) from None
    except requests.exceptions.JSONDecodeError:
        raise _Again("the answer is no JSON") from None
    except (requests.RequestException, OSError) as error:
        again = _Again(_reason(error))
        again.undone = again.problems[0].what.startswith(base_url())
        raise again from None
    except RunnerError:
        raise
    except Exception as error:  # whatever else an answer can be: nested a thousand times, a number of 5000 digits
        raise _Again(f"the answer cannot be read ({type(error).__name__})") from None


def _prefixed(path: str) -> str:
    """The SDK puts what RUNPOD_API_BASE_URL says before the path, and some write the `/v2` there."""
    from_environment = os.environ.get("RUNPOD_API_BASE_URL", "").strip().rstrip("/")
    return path.removeprefix("/v2") if from_environment == f"{base_url()}/v2" else path


def _reason(error: BaseException) -> str:
    """Why there was no answer, in a few words: requests' own texts are the objects that it was busy with."""
    text = str(error).lower()
    if "timed out" in text or "timeout" in type(error).__name__.lower():
        return "no answer in time"
    if "refused" in text:
        return f"{base_url()} refuses connections"
    if "resolve" in text or "getaddrinfo" in text:
        return f"{base_url()}: there is no such host"
    return f"the connection broke ({type(error).__name__})"


def _response_of(error: BaseException) -> object:
    """The answer behind an error of the SDK, which keeps its text and not its headers: from the frame it came from."""
    trace = error.__traceback__
    found = None
    while trace is not None:
        found = trace.tb_frame.f_locals.get("response", found)
        trace = trace.tb_next
    return found


def _meaning(error: Any, response: Any, method: str, path: str) -> RunnerError:
    """What RunPod says with a status from 402 on, or with 400."""
    status, said = error.status_code, " ".join(str(error).split())[:300]
    details = "; ".join(str(e) for e in error.errors)
    text = f"{said} ({details})" if details else said
    own = _is_problem(response)
    low = text.lower()
    if status == 403 and own:
        return WrongKeyError(account_key.not_allowed_problem(method, path, said))
    if status == 402 or (status in (400, 422) and any(word in low for word in POOR)):
        return NoBalanceError(account_key.no_balance_problem(said)) if own else _again(status, response)
    if not own:  # a proxy, a login page: whatever it says is not RunPod's word
        return _again(status, response)
    if status in (400, 409, 422) and any(word in low for word in FULL):
        return NoCapacityError(Problem(f"RunPod: {said}", None, "take other GPUs: where.gpu_types, hw, where.cloud"))
    if status == 404:
        return NotFound(Problem(f"RunPod: {said}"))
    if status == 409:
        return ConflictError(Problem(f"RunPod: {said}"))
    if status in (400, 422):
        return RefusedError(Problem(f"RunPod refuses the request: {text}", None, "correct the value that it names"))
    return _again(status, response)


def _again(status: int, response: object) -> _Again:
    error = _Again("too many requests (429)" if status == TOO_OFTEN else f"it answers {status}")
    error.undone = status == TOO_OFTEN and _is_problem(response)
    after = getattr(response, "headers", {}).get("Retry-After")
    try:
        error.after_s = max(0.0, float(after)) if after is not None else None
    except ValueError:  # a date: rare, and the usual pause will do
        error.after_s = None
    return error


def _is_problem(response: Any) -> bool:
    """Whether an answer has the shape of RunPod's errors (RFC 9457), and so comes from it."""
    try:
        body = response.json()
    except (ValueError, AttributeError):
        return False
    return isinstance(body, dict) and ("title" in body or "detail" in body)
