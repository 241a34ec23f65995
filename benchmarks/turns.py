"""Taking turns: training loops in processes of their own, each stepping only when it is told to.

Two loops measured one after the other differ by what else the machine did meanwhile; loops that take
turns every few steps share it. A loop in its own process has its own memory and threads, as in a run.

The parent writes a number of steps as a line; the loop takes them, answers with one line of JSON and
waits. The end of its input is the end of its work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from benchmarks.bench import ROOT, say


@dataclass(frozen=True)
class Step:
    """One optimiser step, from the end of the one before: batch, forward, backward, update, log."""

    seconds: float
    loss: float
    tokens: int
    """Real tokens."""
    positions: int
    """Tokens and padding."""


class Finished(Exception):
    """No more turns."""


class Turns:
    """The loop's side."""

    def __init__(self, answers: int) -> None:
        """`answers`: descriptor of a pipe of their own: what libraries print must not get between, from imports on."""
        self._answers: TextIO = os.fdopen(answers, "w", encoding="utf-8")
        self._steps: list[Step] = []
        self._wanted = 0
        self._began = 0.0

    def begin(self) -> None:
        """Say that everything is loaded, and wait for the first turn."""
        self._hand_in()

    def elapsed(self) -> float:
        """Seconds of the current step so far."""
        return time.perf_counter() - self._began

    def step_done(self, step: Step) -> None:
        """After the turn's last step, wait for the next turn; Finished if there is none."""
        self._steps.append(step)
        if len(self._steps) == self._wanted:
            self._hand_in()
        self._began = time.perf_counter()

    def _hand_in(self) -> None:
        print(json.dumps([asdict(step) for step in self._steps]), file=self._answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise Finished
        self._steps, self._wanted = [], int(line)
        self._began = time.perf_counter()


@dataclass
class Loop:
    """The parent's side: one training loop in its process."""

    name: str
    kind: str
    """`worker` or `bare`."""
    run_dir: Path
    """Where its `spec.json` lies; its words go to `logs/benchmark.log`."""
    env: dict[str, str]
    """The hardware's environment variables, which the runner hands its worker too."""
    steps: list[Step] = field(default_factory=list)
    """Everything it has handed in."""
    _process: subprocess.Popen[str] | None = None
    _answers: TextIO | None = None

    def start(self) -> None:
        """Start it and wait until it has loaded; RuntimeError if it fails."""
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading, encoding="utf-8")
        try:
            with self._log.open("w", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.loops", self.kind, str(self.run_dir), str(writing)],
                    cwd=ROOT, env={**os.environ, **self.env, "PYTHONPATH": str(ROOT)},
                    stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, pass_fds=(writing,),
                )  # fmt: skip
        finally:
            os.close(writing)  # so that the loop's end is the end of its answers
        self._take_answer()

    def turn(self, steps: int) -> None:
        """Let it take that many steps."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died: what it said last is in the error that follows
            print(steps, file=self._process.stdin, flush=True)
        self._take_answer()

    def stop(self) -> None:
        """No more turns; wait until it has ended."""
        if self._answers is not None:
            self._answers.close()
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _take_answer(self) -> None:
        assert self._answers is not None
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the loop {self.name} ended early:\n{self._log.read_text('utf-8')[-4000:]}")
        self.steps += [Step(**step) for step in json.loads(line)]

    @property
    def _log(self) -> Path:
        return self.run_dir / "logs" / "benchmark.log"


def take_turns(loops: Sequence[Loop], total: int, block: int) -> None:
    """`total` steps of every loop, `block` at a time; who begins changes every round. Results are in the loops."""
    started: list[Loop] = []
    try:
        for loop in loops:  # one after the other: two loading at once would fight for the cores
            say(f"  loading: {loop.name}")
            started.append(loop)
            loop.start()
        for number, done in enumerate(range(0, total, block)):
            first = number % len(loops)
            for loop in [*loops[first:], *loops[:first]]:
                loop.turn(min(block, total - done))
            latest = ", ".join(f"{loop.name} {loop.steps[-1].seconds:.2f}" for loop in loops)
            say(f"  step {min(done + block, total)} of {total}: {latest} s")
    finally:
        for loop in started:
            loop.stop()
