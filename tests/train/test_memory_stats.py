"""Peaks of memory by phase: what that phase used, not what an earlier one had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runner.train import memory_stats
from runner.train.memory_stats import GIB, Peaks
from tests.conftest import spec_of, train_here
from tests.support import tiny_llama

USES = """
import sys
from runner.train.memory_stats import Peaks
measured = Peaks(on_gpu=False)
if not measured.resets:
    sys.exit("no reset")
kept = []
def use(mib):
    held = [bytearray(64 * 1024) for _ in range(16 * mib)]  # small: from the heap, which stays
    kept.append(bytearray(64 * 1024))  # on top of the heap
use(10); measured.end("load")
use(600); measured.end("train")
use(100); measured.end("eval")
use(5); measured.end("save")
use(400); measured.end("eval")
print(*(measured.phases[name].resident for name in ("load", "train", "eval", "save")), measured.overall().resident)
"""


def test_a_phase_after_the_peak_has_its_own() -> None:
    """In a process whose parent holds more than any of its phases: `ru_maxrss` would begin with that."""
    ballast = bytearray(1 << 30)
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True)
    del ballast
    if "no reset" in done.stderr:
        pytest.skip("this kernel cannot reset the peak of a process")
    load, train, evaluation, save, overall = map(float, done.stdout.split())
    assert train - load == pytest.approx(590 / 1024, abs=0.03)
    assert evaluation - load == pytest.approx(390 / 1024, abs=0.03)  # the higher of two
    assert abs(save - load) < 0.03 and overall == train


def test_a_measurement_between_two_steps_is_no_part_of_trainings_peak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended: list[str] = []
    end = Peaks.end

    def told(self: Peaks, phase: str) -> None:
        ended.append(phase)
        end(self, phase)

    monkeypatch.setattr(Peaks, "end", told)
    words = (*tiny_llama.words(tmp_path), "train.max_steps=2", "eval.every_steps=1", "eval.num_prompts=0")
    train_here(spec_of(*words, f"run.output_dir={tmp_path / 'runs'}"))
    assert ended == ["load", "eval", "train", "eval", "train", "eval", "train", "eval", "save"]


def test_what_the_gpus_allocator_keeps_is_no_later_phase_s(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(allocated=0, reserved=0, peak=0, peak_allocated=0)

    def use(gib: int, stays: int = 0) -> None:
        memory.peak_allocated = max(memory.peak_allocated, memory.allocated + gib * GIB)
        memory.reserved = max(memory.reserved, memory.allocated + gib * GIB)
        memory.peak = max(memory.peak, memory.reserved)
        memory.allocated += stays * GIB

    def empty() -> None:
        memory.reserved = memory.allocated

    def reset() -> None:
        memory.peak, memory.peak_allocated = memory.reserved, memory.allocated

    monkeypatch.setattr(memory_stats, "gpu_in_use", lambda: True)
    for name, instead in {
        "empty_cache": empty,
        "reset_peak_memory_stats": reset,
        "max_memory_reserved": lambda: memory.peak,
        "max_memory_allocated": lambda: memory.peak_allocated,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    measured = Peaks(on_gpu=True)
    use(3, stays=2), measured.end("load")
    use(30), measured.end("train")
    use(6), measured.end("eval")
    use(1), measured.end("save")
    assert {name: peak.held for name, peak in measured.phases.items()} == {"load": 3, "train": 32, "eval": 8, "save": 3}
    assert measured.overall().reserved == 32
