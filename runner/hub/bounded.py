"""A call that ends in time, whoever answers it and however slowly."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def bounded(call: Callable[[], T], seconds: float) -> T:
    """Return or raise the result of a call; TimeoutError after so many seconds.

    A socket's own timeout begins anew with every byte. The call goes on in a thread that nobody waits for.
    """
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    for error in failed:
        raise error
    if not found:
        raise TimeoutError("timed out: no whole answer in time")
    return found[0]
