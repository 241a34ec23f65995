"""Rows and base weights that the fork server of a sweep loads before it forks, for runs that would load the same.

A run takes them over where its settings and its inputs, by content (`inputs.json`), are those they were loaded for; the
memory is shared until somebody writes to it. The random state is that of a run which loads for itself: what draws a
random number while it is loaded is not kept.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers.utils import logging

from runner.rundir.directory import RunDir
from runner.spec import Lora, Pretrain, RunSpec
from runner.train import model_loading
from runner.train.evaluation.baseline import starts_as_base
from runner.train.objectives import objective_of

ROWS, WEIGHTS = "rows", "weights"
THREADS_LEAVE_SECONDS = 2.0
_loaded: dict[str, tuple[str, Any]] = {}


def taken(part: str, spec: RunSpec, run: RunDir) -> Any | None:
    """Return the objects loaded for such a run, once; None if there are none."""
    key, value = _loaded.pop(part, (None, None))
    return value if key is not None and key == _keys(spec, run).get(part) else None


def prepare(spec_file: Path) -> bool:
    """Load for a run; False where that has left threads, which are lost in a fork."""
    before = _threads()
    with suppress(Exception):  # the run meets it again, and says so
        run = RunDir(spec_file.parent)
        spec = run.spec
        keys = _keys(spec, run)
        for part in set(_loaded) - {part for part, key in keys.items() if _loaded.get(part, ("",))[0] == key}:
            del _loaded[part]  # before the next is loaded: never two models in memory
        loaders: dict[str, Callable[[], Any]] = {
            ROWS: lambda: objective_of(spec).read(),
            WEIGHTS: lambda: model_loading.load_model(spec, _source(spec)),
        }
        for part in keys.keys() - _loaded.keys():
            with _alone():
                states = _random_states()
                value = loaders[part]()
                if _random_states() == states:
                    _loaded[part] = keys[part], value
    end = time.monotonic() + THREADS_LEAVE_SECONDS
    while (more := _threads() > before) and time.monotonic() < end:
        time.sleep(0.01)
    return not more


def _keys(spec: RunSpec, run: RunDir) -> dict[str, str]:
    """The parts that can be loaded before a fork, each with all that decides what it is.

    Rows of files are not: their readers start threads. Weights that train, or that an adapter changes as it is made,
    would be in memory twice; a quantiser starts threads; a Hub id may have to be downloaded.
    """
    inputs = run.read("inputs.json")
    found: dict[str, list[Any]] = {}
    if spec.data.source == "commands" and not isinstance(spec.objective, Pretrain):
        found[ROWS] = [spec.data, spec.objective, spec.eval, spec.train.seed]
    if (
        isinstance(spec.method, Lora)
        and starts_as_base(spec)
        and not (spec.model.from_scratch or spec.data.add_tokens)
        and (spec.model.gguf_file is not None or Path(spec.model.id).is_dir())
        and (spec.hw.accelerator, spec.deepspeed.name) == ("cpu", "none")
    ):
        found[WEIGHTS] = [spec.model, spec.objective, spec.train.precision, spec.train.attention]
    return {
        part: json.dumps([*(v if isinstance(v, (str, int)) else v.model_dump(mode="json") for v in values), inputs])
        for part, values in found.items()
    }


def _source(spec: RunSpec) -> str:
    """The folder of the weights; LookupError where they have to be unpacked first, which is the run's to say and do."""

    def refuse(line: str) -> None:
        raise LookupError(line)

    return model_loading.source_of(spec.model, refuse)


@contextmanager
def _alone() -> Iterator[None]:
    """Context in which torch and transformers start no threads: OpenMP's do not survive a fork, and who waits for them
    waits for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # tqdm has a thread that watches its bars
    try:
        with patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            yield
    finally:
        torch.set_num_threads(threads)


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().numpy().tobytes()


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))
