"""Progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

PLAIN_EVERY_SECONDS = 10.0


class Progress:
    """What the worker tells while it works. Used as a context manager around the whole run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._last = 0.0

    def note(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[None]:
        """A stretch of work that is counted by `step` or `advance`."""
        self._last = 0.0
        if not self.console.is_terminal:
            self.note(f"{title} …")
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self.console, transient=True) as bar:
            self._bar, self._task = bar, bar.add_task(title, total=None, info="")
            try:
                yield
            finally:
                self._bar = self._task = None

    def step(self, step: int, total: int, line: dict[str, Any]) -> None:
        """One optimiser step is done; `line` is its line of `metrics.jsonl`."""
        info = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.1e}  {line['tokens_per_second']:,.0f} tokens/s"
        self.advance(step, total, info, left=(total - step) * line["step_seconds"])

    def advance(self, done: int, total: int, info: str = "", left: float | None = None) -> None:
        """`done` of `total`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, info=info)
        elif time.monotonic() - self._last >= PLAIN_EVERY_SECONDS or done == total:
            self._last = time.monotonic()
            rest = f"  {left:,.0f} s left" if left and done < total else ""
            self.note(f"  {done}/{total}  {info}{rest}")
