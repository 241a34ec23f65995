"""Output of a run in a pod on this terminal: lines, and a live bar."""

from __future__ import annotations

from contextlib import ExitStack, suppress

from rich.console import Console

from runner.cloud.follow import News
from runner.report.invocation import typed
from runner.report.progress import Progress


class RunOutput:
    """Used as a context manager around the following."""

    def __init__(self, console: Console) -> None:
        self.console, self.progress = console, Progress(console)
        self.total = 0
        self.open: ExitStack | None = None

    def __enter__(self) -> RunOutput:
        return self

    def __exit__(self, *_: object) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(typed(line), highlight=False, soft_wrap=True, markup=False)

    def tell(self, news: News) -> None:
        """Show what happened in the pod; what is no number where one belongs is not shown."""
        with suppress(KeyError, TypeError, ValueError, ArithmeticError):
            self._tell(news)

    def _tell(self, news: News) -> None:
        if news.kind == "words" and not (self.console.is_terminal and _is_progress(news.value)):
            self.say(news.value)
        elif news.kind == "status":
            self.total = int(news.value.get("num_steps") or self.total)
        elif news.kind == "step" and self.console.is_terminal and self.total:
            if self.open is None:
                self.open = ExitStack()
                self.open.enter_context(self.progress.stage("Training", "steps", self.total, int(news.value["step"])))
            self.progress.step(int(news.value["step"]), self.total, news.value)
        elif news.kind == "lost":
            self.say(f"{news.value}; the run goes on there, and is looked for")
        elif news.kind == "back":
            self.say("The connection is back")


def _is_progress(line: str) -> bool:
    """Such as `  10/200  loss 1.23`: the bar says it."""
    done, _, rest = line.strip().partition("/")
    return done.isdigit() and rest[:1].isdigit()
