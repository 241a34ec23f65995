"""Heartbeat of each process: `logs/rank<k>.json`, read by launcher/supervisor.py."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback
from transformers.utils.logging import set_tqdm_hook

from runner.rundir.directory import RunDir, process_birth

EVERY_SECONDS = 0.5


if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Heartbeat(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Written on progress by the thread that does the work: a thread of its own would beat on in a hang."""

    def __init__(self, run: RunDir, rank: int) -> None:
        self.file = run.path / "logs" / f"rank{rank}.json"
        self.facts: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "state": "alive"}
        self.facts |= {"count": 0, "born": process_birth(os.getpid())}
        self.last = 0.0
        self.stacks: TextIO | None = None

    def install(self) -> None:
        """Start to beat; SIGUSR1 writes the stacks of all threads to `logs/rank<k>.stack.txt`, even inside a C call."""
        self.stacks = self.file.with_suffix(".stack.txt").open("w", encoding="utf-8")
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, self.stacks, all_threads=True)
        set_tqdm_hook(self.wrap_tqdm)
        self.beat("loading", now=True)

    def beat(self, phase: str | None = None, *, now: bool = False, **facts: Any) -> None:
        """Record progress, at most every half second; `phase` and `facts` stay until they are changed."""
        changed = phase is not None and phase != self.facts.get("phase")
        self.facts |= facts | ({"phase": phase} if phase else {})
        moment = time.monotonic()
        if now or changed or moment - self.last >= EVERY_SECONDS:
            self.last, self.facts["beat"] = moment, time.time()
            self.facts["count"] += 1  # also where the wall clock stands still or goes back
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.facts), "utf-8")
            temporary.replace(self.file)

    def end(self, state: str, **facts: Any) -> None:
        """Record the end: `done`, `interrupted`, or `failed` with the error."""
        self.beat(state=state, ended=time.time(), now=True, **facts)

    def wrap_tqdm(self, bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Beat at each turn of transformers' progress bars, over weights that it loads and files that it writes."""

        def turns(items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                self.beat()
                yield item

        return bar(*map(turns, args[:1]), *args[1:], **kwargs)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Always written (0.1 ms): who was a step behind the others is who they waited for.
        self.beat("training", step=state.global_step, now=True)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.beat("training", step=state.global_step, now=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.beat()
