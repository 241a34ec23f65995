"""Read a process's output in bounded memory."""

from __future__ import annotations

import subprocess
import threading
from collections import deque
from contextlib import suppress
from typing import IO

from runner.errors import Problem, RunnerError

LONGEST_ANSWER = 64 << 20
"""Bytes that a command in the pod may say: a pod that never stops would fill this machine's memory."""


class EndlessError(RunnerError):
    """A command in the pod says more than any answer has."""


class Last:
    """The end of what a process complains of, read as it comes."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._blocks: deque[bytes] = deque(maxlen=16)
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream, suppress(OSError, ValueError):
            while block := stream.read1(4096):  # type: ignore[attr-defined]  # a BufferedReader
                self._blocks.append(block)

    def text(self) -> str:
        """All that is left of it, once the process has closed it."""
        self._thread.join(10)
        return b"".join(self._blocks).decode(errors="replace")


def spoken(process: subprocess.Popen[bytes], stdin: bytes, seconds: float) -> tuple[str, str]:
    """What a command says and complains of; TimeoutExpired after so long, EndlessError where it does not stop."""
    assert process.stdin is not None and process.stdout is not None
    said: list[bytes] = []

    def read(stream: IO[bytes]) -> None:
        with stream:
            said.append(stream.read(LONGEST_ANSWER + 1))
        if len(said[0]) > LONGEST_ANSWER:
            process.kill()

    def write(stream: IO[bytes]) -> None:
        with suppress(OSError), stream:
            stream.write(stdin)

    wrong = Last(process.stderr)
    threads = [threading.Thread(target=read, args=(process.stdout,), daemon=True),
               threading.Thread(target=write, args=(process.stdin,), daemon=True)]  # fmt: skip
    try:
        for thread in threads:
            thread.start()
        process.wait(seconds)
        threads[0].join(10)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if said and len(said[0]) > LONGEST_ANSWER:
        raise EndlessError(Problem(f"the pod says more than {LONGEST_ANSWER >> 20} MiB where it was asked a question"))
    return b"".join(said).decode(errors="replace"), wrong.text()
