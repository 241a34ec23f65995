"""Trackers: TensorBoard and Weights & Biases. Neither can stop a training."""

from __future__ import annotations

import os
import socket
from typing import Any

from runner.config import credentials
from runner.rundir.directory import RunDir
from runner.spec import RunSpec


def start_tracking(spec: RunSpec, run: RunDir) -> tuple[list[str], str | None]:
    """What transformers should report to, and one line for the user."""
    if spec.track.name == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "tensorboard")
        return ["tensorboard"], f"TensorBoard: tensorboard --logdir {run.path / 'tensorboard'}"
    if spec.track.name == "wandb":
        return ["wandb"], _start_wandb(spec, run)
    return [], None


def _start_wandb(spec: RunSpec, run: RunDir) -> str:
    import wandb

    reason = _why_offline()
    os.environ["WANDB_SILENT"] = "true"
    options: dict[str, Any] = {
        "project": spec.track.project,
        "entity": spec.track.entity,
        "name": run.id,
        "dir": str(run.path),
        "config": spec.model_dump(mode="json"),
    }
    if reason is None:
        try:
            started = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
            return f"Weights & Biases: {started.url}"
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
    wandb.init(**options, mode="offline")
    return f"Weights & Biases: recorded offline ({reason}); upload it later: wandb sync {run.path}/wandb/offline-run-*"


def _why_offline() -> str | None:
    """Why wandb cannot go online, or None; never asks, never waits for more than 3 s."""
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
