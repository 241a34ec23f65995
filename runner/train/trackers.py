"""Trackers: TensorBoard, Weights & Biases, MLflow, and a class of the user's. None can stop a training."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from runner.config import credentials
from runner.config.provenance import flattened
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


class MLflow(Tracker):
    """MLflow: the server of MLFLOW_TRACKING_URI, else a SQLite store in the run directory."""

    report_to = ("mlflow",)

    def start(self) -> str:
        """transformers' callback goes on with the run that is open."""
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        import mlflow

        asked = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        local = f"sqlite:///{(self.run.path / 'mlflow.db').absolute()}"
        where, why = (asked, _why_unreachable(asked)) if asked else (local, None)
        if why is None:
            try:
                self._open(mlflow, where)
                told = f"MLflow: {without_password(where)}"
                return told if asked else f"{told} (mlflow ui --backend-store-uri {shlex.quote(local)})"
            except Exception as error:  # whatever a server answers: a refused token, another version
                why = without_password(f"{type(error).__name__}: {error}".splitlines()[0]).replace(asked or local, "…")
        os.environ["MLFLOW_TRACKING_URI"] = local
        self._open(mlflow, local)
        return f"MLflow: recorded in {local} ({without_password(asked)} cannot be used: {why})"

    def _open(self, mlflow: Any, where: str) -> None:
        # 7 retries of 120 s are the defaults: a server that is gone would hold up every step.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        mlflow.set_tracking_uri(where)
        mlflow.set_experiment(self.spec.track.project)
        mlflow.start_run(run_name=self.run.id)
        mlflow.set_tag("run_id", self.run.id)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The numbers of the summary, and the end of MLflow's run."""
        import mlflow

        numbers = {k: float(v) for k, v in flattened(dict(summary)) if type(v) in (int, float) and math.isfinite(v)}
        with suppress(Exception):  # a server that has gone stops no run
            mlflow.log_metrics({f"summary.{key}": value for key, value in numbers.items()})
        with suppress(Exception):
            mlflow.end_run()


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


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def tracker_of(spec: RunSpec, run: RunDir, say: Callable[[str], None], main: bool = True) -> Tracker:
    """The run's tracker; RequestError where `track.code` names no subclass of `Tracker`."""
    if spec.track.name != "own":
        return (TRACKERS[spec.track.name] if main else Tracker)(spec, run)
    code = str(spec.track.code)
    own = user_code.load(code, "track.code")
    if not (isinstance(own, type) and issubclass(own, Tracker)):
        what = f"{code} is no subclass of runner.train.trackers.Tracker"
        raise RequestError(Problem(what, "track.code", "derive it from that"))
    return GuardedTracker(own, spec, run, say) if main else Tracker(spec, run)


def without_password(address: str) -> str:
    """An address as it may be shown: without user and password."""
    return re.sub(r"://[^/@\s]+@", "://…@", address)


def _why_unreachable(address: str) -> str | None:
    """Reason why a server cannot be reached, within 3 s; None where it can, and for a store that is a file."""
    found = urlsplit(address)
    if found.scheme not in ("http", "https") or not found.hostname:
        return None
    try:
        port = found.port or (443 if found.scheme == "https" else 80)
        socket.create_connection((found.hostname, port), timeout=3).close()
    except (OSError, ValueError):
        return f"{found.hostname} cannot be reached"
    return None


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
