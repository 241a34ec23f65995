"""Cost of a run: hours of the machine times its price, and its disk; its checkpoints.

The price itself comes from `PRICES` in runner/cloud/providers.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runner.spec import TrainSpec

# GB/s from the Hugging Face Hub to a rented machine. Plain Python reaches about 0.5 on a very fast network
# (github.com/huggingface/hf_transfer, README); half of it: assumption.
DOWNLOAD_GB_S = 0.25
# Cold pull of RunPod's PyTorch image: 9 to 13 minutes, 28 s where the host has it (users' reports, 2026). The cold one
# is counted: nobody knows the host beforehand.
IMAGE_PULL_S = 11 * 60
# Start of the pod, installing the runner, importing torch, reading the data: assumption.
START_S = 3 * 60
# From the command to the first evaluation the main job takes 10 s, and 22 to 27 s where it first unpacks its model
# (2 cores of an AMD EPYC, 2026-11-21; importing torch and transformers is 2 s of it, docs/benchmarks.md): between them.
LOCAL_START_S = 20
LOAD_GB_S = 1.0  # weights from the disk into memory, a NVMe disk or the page cache: assumption
SAVE_GB_S = 0.5  # weights to the disk of the machine, synced: assumption
# Container disk and volume of a running pod, $/GB-month (docs.runpod.io/pods/pricing, as of 2026-11-20).
STORAGE_USD_PER_GB_MONTH = 0.10
HOURS_PER_MONTH = 730  # 365 × 24 / 12


@dataclass(frozen=True, slots=True)
class Hours:
    """The parts of a run, in hours."""

    setup: float
    """Start of the machine and of the program; on a rented one with the pull of the image."""
    download: float
    load: float
    training: float
    evaluation: float
    save: float

    @property
    def total(self) -> float:
        """Hours from the first paid second to the last."""
        return self.setup + self.download + self.load + self.training + self.evaluation + self.save


def hours(
    *,
    training_s: float,
    evaluation_s: float = 0.0,
    download_gb: float = 0.0,
    load_gb: float = 0.0,
    save_gb: float = 0.0,
    rented: bool = False,
) -> Hours:
    """Return the hours of the machine. `download_gb` is 0 if the weights are present; GB are 10⁹ bytes."""
    setup_s = IMAGE_PULL_S + START_S if rented else LOCAL_START_S
    parts = (setup_s, download_gb / DOWNLOAD_GB_S, load_gb / LOAD_GB_S, training_s, evaluation_s, save_gb / SAVE_GB_S)
    return Hours(*(part / 3600 for part in parts))


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a run, in US$."""

    compute_usd: float
    storage_usd: float
    usd_per_hour: float
    """Of all GPUs together."""

    @property
    def total_usd(self) -> float:
        """All of it."""
        return self.compute_usd + self.storage_usd


def usd(
    run: Hours,
    usd_per_gpu_hour: float | None,
    *,
    num_gpus: int,
    disk_gb: float = 0.0,
    storage_usd_per_gb_month: float = STORAGE_USD_PER_GB_MONTH,
) -> Cost | None:
    """The cost of the run; None where no price is known (a CPU, one's own machine), which is not the same as 0.

    `num_gpus` counts those of all nodes; `disk_gb` is rented for as long as the GPUs are.
    """
    if usd_per_gpu_hour is None:
        return None
    rate = usd_per_gpu_hour * num_gpus
    storage = disk_gb * storage_usd_per_gb_month * run.total / HOURS_PER_MONTH
    return Cost(run.total * rate, storage, rate)


LARGEST_SHARE = 0.05
"""Of the time, for checkpoints by the clock: one that takes a minute to write comes every 20 minutes at most."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Number and interval of the checkpoints of a run."""

    written: int | None
    """In all, the one after the last step included; None where the run's length is not known."""
    at_once: int
    """On the disk at the same time: the oldest goes after the newest is complete."""
    minutes: float | None
    """Between two of them by the clock; None where only steps count."""


def checkpoints_of(
    train: TrainSpec, *, seconds: float, step_seconds: float | None, num_steps: int | None
) -> Checkpoints:
    """`seconds` is what one takes to write. What is not known counts as a long run."""
    minutes = None
    if train.save_every_minutes is not None:
        minutes = max(train.save_every_minutes, seconds / LARGEST_SHARE / 60)
    most = max(1, train.keep_checkpoints) + 1
    if minutes is None and train.save_every_steps is None:
        return Checkpoints(1, 1, None)
    between = float(train.save_every_steps or math.inf)  # steps
    if minutes is not None and step_seconds is not None:
        between = min(between, max(1, math.ceil(60 * minutes / step_seconds)))
    if num_steps is None or (minutes is not None and step_seconds is None):
        return Checkpoints(None, most, minutes)
    written = math.ceil((num_steps - 1) // between) + 1
    return Checkpoints(written, min(most, written), minutes)
