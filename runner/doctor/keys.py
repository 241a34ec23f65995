"""Keys in the environment: set or not, and of plausible form. Values are never printed, kept or sent."""

from __future__ import annotations

import os
from collections.abc import Iterator

from runner.config import credentials
from runner.doctor.finding import DoctorTarget, Finding

_FOR = {
    "HF_TOKEN": "gated and private models and data sets",
    "WANDB_API_KEY": "track=wandb; without it a run is recorded offline",
    "RUNPOD_API_KEY": "where=runpod, and today's prices in a plan",
}


def findings(wanted: DoctorTarget | None) -> Iterator[Finding]:
    """One line per key."""
    for name in _FOR:
        yield _key(name, wanted)


def _key(name: str, wanted: DoctorTarget | None) -> Finding:
    value = os.environ.get(name, "")
    if value.strip():
        if value != value.strip() or value[0] in "\"'" or value[-1] in "\"'" or "\n" in value:
            remedy = "export it again without"
            return Finding(name, "warning", "set, with a space, a line break or a quote around it", remedy)
        return Finding(name, "ok", "set")
    if key := credentials.find(name):
        return Finding(name, "ok", f"not set; {key.source} is used")
    need = _need(name, wanted) if wanted else None
    if need is None:
        return Finding(name, "note", f"not set; needed for {_FOR[name]}")
    what, remedy = need
    return Finding(name, "warning" if name == "WANDB_API_KEY" else "problem", f"not set, and {what}", remedy)


def _need(name: str, wanted: DoctorTarget) -> tuple[str, str] | None:
    """Why the run needs the key, and what to do; None where it does not."""
    spec, plan = wanted.spec, wanted.plan
    if name == "HF_TOKEN" and spec.model.gated and (plan is None or "weights" in plan.disk):
        page = f"https://huggingface.co/{spec.model.id}"
        return f"{spec.model.id} is gated", f"accept its licence at {page}, then export HF_TOKEN=…"
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if name == "WANDB_API_KEY" and spec.track.name == "wandb" and not offline:
        return "track=wandb: the run is recorded offline", "export WANDB_API_KEY=… or wandb login"
    if name == "RUNPOD_API_KEY" and spec.where.name == "runpod":
        return (
            "where=runpod rents with it",
            "make one in RunPod's console, under Settings, then export RUNPOD_API_KEY=…",
        )
    return None
