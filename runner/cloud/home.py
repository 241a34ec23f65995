"""Brings a run home from a pod: all but what is ours, the newest checkpoint, and last what says that it is whole."""

from __future__ import annotations

import json
import shlex
from typing import Any

from runner import checkpoints
from runner.cloud import ship
from runner.cloud.ship import Berth
from runner.paths import cache_dir
from runner.rundir import RunDir, write_atomically
from runner.spec import RunSpec

OURS = ("spec.json", "status.json", "plan.json", "deepspeed.json", "pod.json", "agent.json", "agent.py", "tail.py",
        "install.py", "work.json", "install-order.json", "armed.json", "collected", "checkpoints", "successor.json",
        ".*", "*.tmp", "*.new", "summary.json")  # fmt: skip
"""What of the pod's folder does not come back as it is: this run directory has its own, or it is read by itself."""


def bring(at: Berth, run: RunDir, spec: RunSpec) -> dict[str, Any]:
    """All of it; the pod's `status.json`. LostError where the connection breaks: called again, it goes on there."""
    folder = shlex.quote(at.folder)
    excluded = [word for name in OURS for word in ("--exclude", f"/{name}")]
    at.connection.get(f"{at.folder}/", run.path, options=excluded)
    status = ship.loads(at.connection.attempt(f"cat {folder}/status.json")[1])
    listed = at.connection.attempt(f"ls -d {folder}/checkpoints/*/COMPLETE 2>/dev/null")[1]
    steps = [int(line.split("/")[-2].rpartition("-")[2]) for line in listed.split()]
    if steps and max(steps) not in checkpoints.complete(run):
        bring_checkpoint(at, run, max(steps))
    places = {f"{at.workspace}/cache/runner": str(cache_dir())}
    if theirs := ship.loads(at.connection.attempt(f"cat {folder}/spec.json")[1]):  # it is sent after the agent
        places[str(theirs["model"]["id"])] = spec.model.id
    _rename(run, places)
    if at.connection.attempt(f"test -e {folder}/summary.json")[0] == 0:
        at.connection.get(f"{at.folder}/summary.json", run.path)
    return status


def bring_checkpoint(at: Berth, run: RunDir, step: int) -> None:
    """Its files, then the marker that makes them count."""
    source, target = f"{at.folder}/checkpoints/checkpoint-{step}", checkpoints.folder(run, step)
    target.mkdir(parents=True, exist_ok=True)
    at.connection.get(f"{source}/", target, options=["--exclude", checkpoints.MARKER])
    at.connection.get(f"{source}/{checkpoints.MARKER}", target)


def _rename(run: RunDir, places: dict[str, str]) -> None:
    """The base that an adapter names lies at another place here: plain peft must find it."""
    for name in ("adapter_config.json", "config.json"):
        file = run.path / "model" / name
        if file.is_file():
            text = before = file.read_text("utf-8")
            for there, here in places.items():
                if there.startswith("/"):
                    text = text.replace(json.dumps(there)[:-1], json.dumps(here)[:-1])
            if text != before:
                write_atomically(file, text)
