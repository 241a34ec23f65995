"""Live view of a run in the terminal: its state, and curves of its metrics, until it ends."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from shlex import quote
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.config.did_you_mean import nearest
from runner.errors import InterruptedRun, Problem, RequestError, RunFailedError
from runner.report import terminal
from runner.report.braille_curve import curve
from runner.report.invocation import as_invoked
from runner.report.text import ascii_fallback, counted, duration, without_control_sequences
from runner.rundir.directory import ACTIVE, RunDir, display_path
from runner.rundir.json_files import EvalLine, MetricsLine, Status
from runner.rundir.metrics_tail import MetricsTail

CURVES = ("loss", "reward", "reward_margin", "learning_rate", "grad_norm", "tokens_per_second")
"""Drawn in this order, as many as the terminal has room for."""
CURVE_HEIGHT, LOWEST_CURVE = 10, 5
"""Lines of a curve, its name included: at most (twice that for a single one), and at least."""
WIDEST = 140
RECENT = 20
"""Steps whose mean duration the remaining time is estimated from."""
SILENT_SECONDS = 120.0
"""Without news for so long a run in a pod is probably followed by nobody here."""
LINE_SECONDS = 10.0
"""At most one line in so many seconds where there is no terminal."""
STYLES = {"done": "bold green", "failed": "bold red", "killed": "bold red", "interrupted": "bold yellow"}


@dataclass(frozen=True)
class WatchOptions:
    """Options of `watch`."""

    metric: str | None = None
    """The one curve to draw; None for the usual ones."""
    once: bool = False
    interval: float = 1.0
    """Seconds between two looks at the files."""
    as_json: bool = False


@dataclass(frozen=True)
class View:
    """A run at one moment."""

    run: RunDir
    status: Status
    state: str
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """The newest line of metrics."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def over(self) -> bool:
        """The run has ended, one way or the other."""
        return self.state not in ACTIVE and self.state != "rewinding"

    @property
    def seconds_left(self) -> float | None:
        """Estimated time of the remaining steps."""
        durations = [float(line["step_seconds"]) for line in self.metrics[-RECENT:] if "step_seconds" in line]
        total, step = self.status.get("num_steps"), self.last.get("step")
        if self.over or not durations or total is None or step is None:
            return None
        left: int = max(0, total - step)
        return left * sum(durations) / len(durations)

    def as_dict(self) -> dict[str, Any]:
        """As `watch --json` prints it, in one line."""
        last = {key: value for key, value in self.last.items() if not isinstance(value, float) or math.isfinite(value)}
        return {
            "run_id": self.run.id, "state": self.state, "num_steps": self.status.get("num_steps"), **last,
            "held_out_loss": self.evals[-1].get("loss") if self.evals else None, "seconds_left": self.seconds_left,
            "exit_code": exit_code(self) if self.over else None, "error": self.status.get("error"),
        }  # fmt: skip


class Watcher:
    """Reads a run again and again; RunFailedError where its directory has gone."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self._metrics = MetricsTail(run.path / "metrics.jsonl", MetricsLine)
        self._evals = MetricsTail(run.path / "evals.jsonl", EvalLine)

    def look(self) -> View:
        """The run as it is now."""
        status = self.run.status
        if not status and not self.run.path.is_dir():
            raise RunFailedError(_gone(self.run))
        return View(self.run, status, self.run.state(status), self._metrics.update(), self._evals.update())


def watch(run: RunDir, console: Console, options: WatchOptions) -> int:
    """Show a run until it ends; its exit code. Ctrl-C leaves it alone."""
    watcher = Watcher(run)
    view = watcher.look()
    if options.metric is not None and view.metrics:
        _check_metric(options.metric, view)
    if options.once:
        _print(console, view, options)
        return 0
    try:
        if options.as_json or not console.is_terminal or console.is_dumb_terminal:
            view = _lines(watcher, console, options)
        else:
            view = _live(watcher, console, options)
    except KeyboardInterrupt:
        _say_left(Console(stderr=True), watcher)
        return InterruptedRun.exit_code
    return exit_code(view)


def exit_code(view: View) -> int:
    """0 for a run that is done, else its own exit code; 1 where it left none."""
    if view.state == "done":
        return 0
    if view.state == "interrupted":
        return view.status.get("exit_code") or InterruptedRun.exit_code
    return view.status.get("exit_code") or 1


def repeat(console: Console, show: Callable[[Console], None], seconds: float = 2.0) -> None:
    """Show something again and again until Ctrl-C; once where there is no terminal."""
    while True:
        if console.is_terminal and not console.is_dumb_terminal:
            console.clear()
        show(console)
        if not console.is_terminal or console.is_dumb_terminal or terminal.lost():
            return
        time.sleep(seconds)


def _live(watcher: Watcher, console: Console, options: WatchOptions) -> View:
    """On a screen of its own; what was there last stays when it is over."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            view = watcher.look()
            text = rendered(view, console.width, console.height, options.metric, plain=console.options.ascii_only)
            live.update(text, refresh=True)
            if view.over or terminal.lost():
                break
            time.sleep(options.interval)
    _print(console, view, options)
    return view


def _lines(watcher: Watcher, console: Console, options: WatchOptions) -> View:
    """One line per change: at once of a state, of steps at most every ten seconds."""
    told: tuple[str, int | None] | None = None
    since = -math.inf
    while True:
        view = watcher.look()
        now = view.state, view.last.get("step")
        due = time.monotonic() - since >= max(LINE_SECONDS, options.interval)
        if told is None or now[0] != told[0] or (now != told and due):
            told, since = now, time.monotonic()
            _print_line(console, view, options)
        if view.over or terminal.lost():
            return view
        time.sleep(options.interval)


def _print_line(console: Console, view: View, options: WatchOptions) -> None:
    if options.as_json:
        print(json.dumps(view.as_dict(), ensure_ascii=False), flush=True)
        return
    parts = [f"{name} {value}" if name else value for name, value in facts(view)]
    with ascii_fallback(console):
        console.print(Text(" · ".join(parts)), soft_wrap=True)


def _print(console: Console, view: View, options: WatchOptions) -> None:
    if options.as_json:
        print(json.dumps(view.as_dict(), ensure_ascii=False), flush=True)
        return
    with ascii_fallback(console):
        height = console.height if console.is_terminal else 24
        plain = console.options.ascii_only
        console.print(rendered(view, console.width, height, options.metric, plain=plain), soft_wrap=True)


def facts(view: View) -> Iterator[tuple[str, str]]:
    """Names and values of a run's present state; the first three are its id, state and step."""
    status, last = view.status, view.last
    yield "", without_control_sequences(view.run.id)
    when = f" ({status['when']})" if view.state == "evaluating" and status.get("when") else ""
    yield "", view.state + without_control_sequences(when)
    total = status.get("num_steps")
    if "step" in last:
        yield "step", f"{last['step']:,} of {total:,}" if total else f"{last['step']:,}"
    if view.seconds_left is not None:
        yield "left", duration(view.seconds_left)
    for key, name, form in (
        ("loss", "loss", "{:.4f}"), ("reward", "reward", "{:.4g}"), ("learning_rate", "lr", "{:.3g}"),
        ("grad_norm", "grad", "{:.3g}"), ("tokens_per_second", "tokens/s", "{:,.0f}"), ("memory_gib", "GiB", "{:.1f}"),
    ):  # fmt: skip
        if isinstance(value := last.get(key), int | float):
            yield name, form.format(value)
    if view.evals and isinstance(loss := view.evals[-1].get("loss"), int | float):
        yield "held out", f"{loss:.4f}"
    if spent := view.run.summary.get("seconds") or _elapsed(view):
        yield "time", duration(spent)
    if cost := status.get("cost"):
        yield "cost", f"${cost['usd']:.2f}"


def rendered(view: View, width: int, height: int, metric: str | None = None, *, plain: bool = False) -> Text:
    """State and curves, within `width` and `height`."""
    width = max(20, min(width, WIDEST))
    lines = [*_wrapped([f"{name} {value}" if name else value for name, value in facts(view)], width)]
    lines += [line for note in _notes(view) for line in _folded(note, width)]
    text = Text("\n".join(lines))
    text.highlight_words([view.state], STYLES.get(view.state, "bold cyan"))
    names = [metric] if metric is not None else [n for n in CURVES if _points(view.metrics, n)]
    room = height - len(lines) - 2
    count = max(0, min(len(names), room // (LOWEST_CURVE + 1)))
    for name in names[:count]:
        tall = min(CURVE_HEIGHT * (2 if count == 1 else 1), room // count - 1)
        drawn = curve(_points(view.metrics, name), width, tall - 1, plain=plain)
        if drawn:
            text.append(f"\n\n{name.replace('_', ' ')}\n", style="bold")
            text.append("\n".join(drawn), style="")
    return text


def _notes(view: View) -> Iterator[str]:
    error, shown = view.status.get("error"), quote(display_path(view.run.path))
    command = as_invoked("python -m runner")
    if view.over and error:
        yield without_control_sequences(error)
    if view.state in ("killed", "interrupted", "failed"):
        yield f"Go on: {command} resume {shown}"
    if view.state == "done":
        yield f"Try it: {command} chat {shown}"
    silent = time.time() - max(view.status.get("updated", 0.0), view.last.get("time", 0.0))
    if not view.over and silent > SILENT_SECONDS and view.run.read("pod.json"):
        yield f"No news for {duration(silent)}; {command} attach {quote(view.run.id)} follows its pod"


def _points(lines: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    values = ((line.get("step"), line.get(name)) for line in lines)
    return [
        (float(step), float(value))
        for step, value in values
        if isinstance(step, int) and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _elapsed(view: View) -> float:
    """Seconds of work so far, without reading the metrics again."""
    status = view.status
    started, before = status.get("started"), float(status.get("spent", 0.0))
    if started is None:
        return before
    seen = max(float(status.get("updated", started)), float(view.last.get("time", 0.0)))
    return before + max(0.0, seen - float(started))


def _wrapped(parts: list[str], width: int) -> Iterator[str]:
    """Parts side by side, two spaces between them; one that is wider than a line is folded."""
    line = ""
    for part in parts:
        if line and cell_len(line) + 2 + cell_len(part) <= width:
            line += f"  {part}"
            continue
        if line:
            yield line
        *folded, line = _folded(part, width)
        yield from folded
    yield line


def _folded(text: str, width: int) -> list[str]:
    folded = Text(text).wrap(Console(width=width, file=None), width)
    return [line.plain.rstrip() for line in folded] or [""]


def _check_metric(metric: str, view: View) -> None:
    known = sorted({k for line in view.metrics[-RECENT:] for k in line if k != "step" and _points([line], k)})
    if metric not in known:
        near = nearest(metric, known)
        remedy = f"did you mean --metric {near}?" if near else f"one of {', '.join(known)}"
        raise RequestError(Problem(f"--metric {metric}: metrics.jsonl has no such numbers", "command line", remedy))


def _say_left(console: Console, watcher: Watcher) -> None:
    run = watcher.run
    try:
        view = watcher.look()
    except RunFailedError:
        return
    if view.over:
        return
    where = f"{display_path(run.path)} continues ({view.state}"
    step = view.last.get("step")
    where += f", {counted(step, 'step')} done)" if step else ")"
    pid = view.status.get("pid")
    stop = f"; kill {pid} stops it" if pid and view.status.get("host") == socket.gethostname() else ""
    console.print(f"Left    {where}{stop}", markup=False, highlight=False, soft_wrap=True)


def _gone(run: RunDir) -> Problem:
    trashed = run.path.parent / ".trash" / run.id
    remedy = "python -m runner runs lists what there is"
    if trashed.is_dir():
        remedy = f"it is in the trash: python -m runner runs restore {quote(display_path(trashed))}"
    return Problem(f"{display_path(run.path)} is gone: it was deleted or moved", None, remedy)
