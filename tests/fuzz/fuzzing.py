"""Runs a reader on mutated inputs: it returns, or raises the project's own error, within seconds and bounded memory."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from types import FrameType
from typing import Any

from runner.errors import RunnerError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0.5"))
"""Per target; `make fuzz` gives each more."""
INPUTS = int(os.environ.get("FUZZ_INPUTS", "3000"))
"""Per target at most, so that a faster machine does not meet an input that no one has tried; `make fuzz` has no bound."""
SEED = int(os.environ.get("FUZZ_SEED", "0"))
HANG_S = 8
"""CPU seconds in which a reader must be done with one input; most take less than a millisecond."""
MORE_BYTES = 1 << 30
"""Address space that one input may add."""
LONGEST_ERROR = 200_000
"""Characters of an error with all its problems: a mistake is not answered with the whole of a file."""
COUNTS: dict[str, tuple[int, int, float]] = {}
"""Target → inputs, how many of them were refused, seconds."""


@dataclass(frozen=True)
class Target:
    """A reader of strangers' data with the generator of its inputs."""

    name: str
    make: Callable[[Random], Any]
    read: Callable[[Any], object]


class Hang(BaseException):
    """Raised by the timer; no reader catches it."""


def fuzz(target: Target) -> None:
    """`INPUTS` inputs, or those of `SECONDS` of CPU; AssertionError with the seed and the input for the first that breaks the promise."""
    began, number, refused = time.process_time(), 0, 0
    with _bounded_memory():
        while number < INPUTS and time.process_time() - began < SECONDS:
            seed = f"{target.name}-{SEED}-{number}"
            refused += check(target, target.make(Random(seed)), seed)
            number += 1
    before = COUNTS.get(target.name, (0, 0, 0.0))
    COUNTS[target.name] = (before[0] + number, before[1] + refused, before[2] + time.process_time() - began)


def check(target: Target, given: Any, seed: str = "pinned") -> bool:
    """Read one input; whether it was refused. AssertionError for any other end."""
    try:
        with _timer():
            target.read(given)
    except RunnerError as error:
        if not error.problems or not all(problem.what for problem in error.problems):
            raise AssertionError(_about(target, given, seed, "no words")) from error
        if len(str(error)) > LONGEST_ERROR:
            raise AssertionError(_about(target, given, seed, f"an error of {len(str(error)):,} characters")) from error
        return True
    except Hang:
        raise AssertionError(_about(target, given, seed, f"more than {HANG_S} s")) from None
    except Exception as error:
        raise AssertionError(_about(target, given, seed, f"{type(error).__name__}: {str(error)[:300]}")) from error
    return False


def _about(target: Target, given: Any, seed: str, what: str) -> str:
    try:
        shown = ascii(given)
    except (RecursionError, ValueError):
        shown = f"{type(given).__name__} that cannot be shown"
    return f"{target.name}, seed {seed}: {what}; input: {shown[:2000]}"


@contextmanager
def _timer() -> Iterator[None]:
    """Raise Hang after `HANG_S` of this process's own CPU time: a busy machine makes nothing hang."""
    before = signal.signal(signal.SIGVTALRM, _ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _ring(number: int, frame: FrameType | None) -> None:
    raise Hang


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """An input that asks for gigabytes gets a MemoryError instead."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0]) if os.path.exists("/proc/self/statm") else 0  # noqa: SIM115  # one read
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
