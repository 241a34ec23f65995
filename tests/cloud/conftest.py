"""Fixtures of all tests of renting, from `tests/support`."""

from tests.support.emulated import emulator
from tests.support.hub import hub
from tests.support.rented import hello, state

__all__ = ["emulator", "hello", "hub", "state"]
