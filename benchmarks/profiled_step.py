"""A tracker that profiles one optimiser step of a run: which kernels ran, and for how long.

Named by `track.code=benchmarks/profiled_step.py:ProfiledStep`, so the run itself is any user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from runner.train.trackers import Tracker

STEP = 3
"""The step that is profiled; the first ones choose and build kernels."""
FILE = "kernels.json"
SHOWN = 12


class ProfiledStep(Tracker):
    """Profiles from the end of step 2 to the end of step 3, and writes the longest kernels to the run's folder."""

    profiler: profile | None = None

    def log(self, file: str, line: Mapping[str, Any]) -> None:
        if file != "metrics.jsonl":
            return
        if line.get("step") == STEP - 1:
            device = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
            self.profiler = profile(activities=[device], acc_events=True)
            self.profiler.start()
        elif self.profiler is not None:
            self.profiler.stop()
            (self.run.path / FILE).write_text(json.dumps(kernels(self.profiler)), "utf-8")
            self.profiler = None


def kernels(profiler: profile) -> list[tuple[str, float]]:
    """The kernels (on a CPU: operators) that took longest: name, and share of the time of all."""
    on_gpu = torch.cuda.is_available()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        spent[event.key] = event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    longest = sorted(spent.items(), key=lambda item: -item[1])[:SHOWN]
    return [(name[:90], round(time / total, 4)) for name, time in longest if time]
