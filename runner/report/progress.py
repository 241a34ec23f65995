"""Progress of a run: live bars on a terminal, plain lines elsewhere and in the log."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

PLAIN_EVERY_SECONDS = 10.0
ETA_SECONDS = 900.0
"""Steps of so long tell how fast it goes. rich's 30 s would see one step of a large model, and no time left at all."""
WIDE = 100
"""Columns of a terminal on which the learning rate has room as well."""


INDENT = " " * 8
"""Column of the words after a note's label, such as `Trains  `."""


class Progress:
    """Progress of a worker; on a terminal with one bar per stage, a stage within a stage below it."""

    def __init__(self, console: Console, log: Console | None = None) -> None:
        self.console = console
        self.consoles = [console, log] if log is not None else [console]
        self._plain = [one for one in self.consoles if not one.is_terminal]
        self._bars: _Bars | None = None
        self._tasks: list[TaskID] = []
        self._last = 0.0

    def note(self, text: str) -> None:
        """One line that stays."""
        _print(self.consoles, text)

    @contextmanager
    def stage(self, title: str, unit: str, total: int | None = None, done: int = 0) -> Iterator[None]:
        """A stretch of work that is counted by `step` or `advance`; of `total`, `done` was done before."""
        last, self._last = self._last, 0.0
        _print(self._plain, f"{title} …")
        try:
            with self._bar(title, unit, total, done):
                yield
        finally:
            self._last = last

    @contextmanager
    def _bar(self, title: str, unit: str, total: int | None, done: int) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        if self._bars is None:
            self._bars = _Bars(console=self.console)
            self._bars.start()
        task = self._bars.add_task(title, total=total, completed=done, unit=unit, info="")
        self._tasks.append(task)
        try:
            yield
        finally:
            self._tasks.remove(task)
            self._bars.remove_task(task)
            if not self._tasks:
                self._bars.stop()
                self._bars = None

    def step(self, step: int, total: int, line: dict[str, Any]) -> None:
        """One optimiser step is done; `line` is its line of `metrics.jsonl`."""
        loss, rate = f"loss {line['loss']:.4f}", f"lr {line['learning_rate']:.1e}"
        speed = f"{line['tokens_per_second']:,.0f} tokens/s"
        brief = "  ".join([loss, rate, speed] if self.console.width >= WIDE else [loss, speed])
        self.advance(step, total, f"{loss}  {rate}  {speed}", (total - step) * line["step_seconds"], brief)

    def advance(
        self, done: int, total: int, info: str = "", left: float | None = None, brief: str | None = None
    ) -> None:
        """`done` of `total` of the innermost stage; `left` seconds, and `brief` instead of `info` beside a bar."""
        if self._bars is not None:
            text = info if brief is None else brief
            self._bars.update(self._tasks[-1], completed=done, total=total, info=text)
        if time.monotonic() - self._last >= PLAIN_EVERY_SECONDS or done == total:
            self._last = time.monotonic()
            rest = f"  {left:,.0f} s left" if left and done < total else ""
            _print(self._plain, f"  {done}/{total}  {info}{rest}")


class _Bars(Bars):
    """Every bar has columns of its own: a long title does not push the numbers of another one off the screen."""

    def __init__(self, console: Console) -> None:
        text, bar = Column(no_wrap=True, overflow="ellipsis"), Column(ratio=1, min_width=4)
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False, table_column=text.copy()),
            BarColumn(bar_width=None, table_column=bar),
            _Count(table_column=text.copy()),
            TextColumn("{task.fields[info]}", markup=False, table_column=text.copy()),
            _Left(table_column=text.copy()),
            console=console, transient=True, expand=True, speed_estimate_period=ETA_SECONDS,
        )  # fmt: skip

    def get_renderables(self) -> Iterable[RenderableType]:
        """One table per bar."""
        return [self.make_tasks_table([task]) for task in self.tasks]


class _Count(ProgressColumn):
    """`20/30 steps`; nothing as long as nobody knows how many there are."""

    def render(self, task: Task) -> Text:
        known = f"{task.completed:,.0f}/{task.total:,.0f} " if task.total is not None else ""
        return Text(known + str(task.fields["unit"]), style="progress.download")


class _Left(ProgressColumn):
    """`0:01:23 left`, once two steps have told how fast it goes."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        if task.finished or seconds is None:
            return Text("")
        minutes, rest = divmod(int(seconds), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} left", style="progress.remaining")


def _print(consoles: Iterable[Console], text: str) -> None:
    for console in consoles:
        console.print(_wrapped(text, console), highlight=False, soft_wrap=True, markup=False)


def _wrapped(text: str, console: Console) -> str:
    """Between words where a terminal is too narrow, which would break within them; elsewhere a note stays one line."""
    if not console.is_terminal or cell_len(text) <= console.width:
        return text
    fill = partial(
        textwrap.fill, width=console.width, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(map(fill, text.split("\n")))
