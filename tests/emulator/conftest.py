"""Fixtures of all tests of the emulator, from `tests/support`."""

from tests.support.emulated import emulator, key_pair

__all__ = ["emulator", "key_pair"]
