"""The measurement before training, shared by the runs of a sweep that would measure the same model in the same way."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch

from runner.rundir.directory import RunDir, write_atomically
from runner.spec import Lora, QLora4, QLora8, RunSpec

NEUTRAL: dict[str, tuple[str, ...]] = {
    "train": (
        "batch_size", "accumulation_steps", "num_epochs", "max_steps", "learning_rate", "schedule", "warmup_ratio",
        "weight_decay", "max_grad_norm", "optimizer", "save_every_steps", "save_every_minutes", "keep_checkpoints",
        "hang_minutes", "on_loss_spike", "spike_factor",
    ),
    "eval": ("every_steps", "early_stopping_patience"),
}  # fmt: skip
"""Keys that say how to train, and nothing of the model before the first step. A key that is not here counts."""
NEUTRAL_PARTS = ("run", "push", "sweep", "track")
NEUTRAL_IN_ZERO_UPDATE = ("rank", "alpha", "dropout")

Measurement = dict[str, float]
"""Loss, exact matches and rewards by name, as in `eval` of `summary.json`."""


class Baseline(TypedDict):
    """The file in the sweep's folder."""

    run: str
    """Id of the run that has measured."""
    result: Measurement
    logged: dict[str, float] | None
    """Metrics as the trainer logged them."""
    answers: str | None
    """Text of `answers_before.jsonl`."""


def baseline_file(spec: RunSpec, run: RunDir) -> Path | None:
    """Path of the file in the sweep's folder with this run's measurement before training; None without a sweep.

    Its name is a digest of the settings, the versions, and the contents of everything that is read.
    """
    sweep = run.status.get("sweep")
    folder = run.path.parent / "sweeps" / str(sweep)
    if not sweep or not folder.is_dir() or spec.deepspeed.config is not None:  # a file that `inputs.json` has not
        return None
    parts = [_settings(spec), run.read("environment.json"), run.read("inputs.json")]
    return folder / f"before-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}.json"


def _settings(spec: RunSpec) -> dict[str, Any]:
    """The settings that can change what is measured."""
    values = spec.model_dump(mode="json", exclude=set(NEUTRAL_PARTS))
    neutral = NEUTRAL | ({"method": NEUTRAL_IN_ZERO_UPDATE} if starts_as_base(spec) else {})
    for part, keys in neutral.items():
        values[part] = {key: value for key, value in values[part].items() if key not in keys}
    return values


def starts_as_base(spec: RunSpec) -> bool:
    """True if the adapter starts with B = 0: the model then equals its base bit by bit, at any rank and scale.

    False for PEFT's other types: a rotation by nothing, or a scale of 1, still rounds.
    """
    method = spec.method
    if not isinstance(method, (Lora, QLora4, QLora8)) or method.use_dora:
        return False
    return not isinstance(method, Lora) or method.init in ("default", "gaussian")


def read(file: Path) -> Baseline | None:
    """The measurement of an earlier run; None where there is none."""
    content = RunDir(file.parent).read(file.name)
    return cast(Baseline, content) if content else None


def write(file: Path, content: Baseline) -> None:
    """Write the measurement for later runs of the sweep."""
    write_atomically(file, json.dumps(content, ensure_ascii=False))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Context that leaves every random number generator as it was: a data loader draws from torch's even where nothing
    is shuffled, and a run that takes a measurement over has to train like one that made it."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
