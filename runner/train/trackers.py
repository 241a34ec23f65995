"""Trackers: TensorBoard, Weights & Biases, and a class of the user's. None can stop a training."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from runner.config import credentials
from runner.data import user_code
from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir
from runner.spec import RunSpec

T = TypeVar("T")


class Tracker:
    """Base class of the trackers, which get metrics besides the run directory; itself it tracks nothing.

    A class of your own, named by `track.code`, overrides `start`, `log` and `finish`; they are called on the main
    process alone.
    """

    report_to: ClassVar[tuple[str, ...]] = ()
    """Callbacks of transformers that do the work, instead of `log`."""

    def __init__(self, spec: RunSpec, run: RunDir) -> None:
        self.spec, self.run = spec, run

    def start(self) -> str | None:
        """Start before training; a line for the user, or None."""
        return None

    def log(self, file: str, line: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl` or `evals.jsonl`, as it is written."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is done; `summary` is what `summary.json` holds."""


class TensorBoard(Tracker):
    """Files in the run directory."""

    report_to = ("tensorboard",)

    def start(self) -> str:
        """transformers' callback reads the folder from the environment."""
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.run.path / "tensorboard")
        return f"TensorBoard: tensorboard --logdir {self.run.path / 'tensorboard'}"


class WandB(Tracker):
    """Weights & Biases, offline where it cannot be reached."""

    report_to = ("wandb",)

    def start(self) -> str:
        """transformers' callback goes on with the run that is open."""
        import wandb

        reason = _why_offline()
        os.environ["WANDB_SILENT"] = "true"
        options: dict[str, Any] = {
            "project": self.spec.track.project,
            "entity": self.spec.track.entity,
            "name": self.run.id,
            "dir": str(self.run.path),
            "config": self.spec.model_dump(mode="json"),
        }
        if reason is None:
            try:
                started = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
                return f"Weights & Biases: {started.url}"
            except wandb.errors.Error as error:
                reason = str(error).splitlines()[0]
        wandb.init(**options, mode="offline")
        where = f"{self.run.path}/wandb/offline-run-*"
        return f"Weights & Biases: recorded offline ({reason}); upload it later: wandb sync {where}"


class GuardedTracker(Tracker):
    """Wraps a user's tracker: its first exception is reported, and it is not called again."""

    def __init__(self, own: type[Tracker], spec: RunSpec, run: RunDir, say: Callable[[str], None]) -> None:
        super().__init__(spec, run)
        self.say = say
        self.inner = self._attempt(lambda: own(spec, run))

    def start(self) -> str | None:
        return self._call(lambda inner: inner.start())

    def log(self, file: str, line: Mapping[str, Any]) -> None:
        self._call(lambda inner: inner.log(file, dict(line)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._call(lambda inner: inner.finish(dict(summary)))

    def _call(self, call: Callable[[Tracker], T]) -> T | None:
        inner = self.inner
        return None if inner is None else self._attempt(lambda: call(inner))

    def _attempt(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as error:  # whatever a user's class raises
            place = user_code.user_line_of(error) or f"track.code={self.spec.track.code}"
            self.say(f"The tracker is left out from here: {type(error).__name__}: {error} ({place})")
            self.inner = None
            return None


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "tensorboard": TensorBoard, "wandb": WandB}


def tracker_of(spec: RunSpec, run: RunDir, say: Callable[[str], None], main: bool = True) -> Tracker:
    """The run's tracker; RequestError where `track.code` names no subclass of `Tracker`."""
    if spec.track.name != "own":
        return TRACKERS[spec.track.name](spec, run)
    code = str(spec.track.code)
    own = user_code.load(code, "track.code")
    if not (isinstance(own, type) and issubclass(own, Tracker)):
        what = f"{code} is no subclass of runner.train.trackers.Tracker"
        raise RequestError(Problem(what, "track.code", "derive it from that"))
    return GuardedTracker(own, spec, run, say) if main else Tracker(spec, run)


def _why_offline() -> str | None:
    """Reason why wandb cannot go online, or None; without a prompt, within 3 s."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    if credentials.find_key("WANDB_API_KEY") is None:
        return "no key: export WANDB_API_KEY=… or wandb login"
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError:
        return f"{host} cannot be reached"
    return None
