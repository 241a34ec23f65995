"""Main memory of rented machines: in the plan where it is known, and looked at in the pod before anything is sent."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from runner.cloud.transfer import check_memory
from runner.config import conf_files
from runner.errors import CannotRunError
from runner.machine import detect
from runner.resolve.plan_inputs import plan
from tests.support.front import runner, spec_of

OFFLOADED = ("model=llama2_70b", "method=full", "hw=h200", "deepspeed=zero3_offload", "data=guanaco")


def _here(words: str) -> tuple[int, str, str]:
    done = subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.usefixtures("laptop")
def test_offloading_more_than_a_rented_host_has_is_refused_before_renting() -> None:
    found = plan(spec_of(*OFFLOADED, "where=runpod"), [])
    assert not found.fits and any("main memory; such a pod is sure of 257 GiB" in reason for reason in found.reasons)
    eight = plan(spec_of(*OFFLOADED[:2], "hw=h200x8", *OFFLOADED[3:], "where=runpod"), [])
    assert eight.fits, eight.reasons  # eight of them have 2,056 GiB
    assert not any("such a pod" in reason for reason in plan(spec_of(*OFFLOADED), []).reasons)  # here it is not known
    own = plan(spec_of(*OFFLOADED, "where=runpod", "hw.host_memory_gib=4000"), [])
    assert own.fits, own.reasons


def test_a_pod_with_too_little_memory_is_no_good() -> None:
    at: Any = SimpleNamespace(connection=SimpleNamespace(attempt=_here))
    here = detect.detect().memory_gib or 0.0
    check_memory(at, 0.5 * here)
    with pytest.raises(CannotRunError, match=f"the pod has .* and the plan needs {2 * here:.0f} GiB"):
        check_memory(at, 2 * here)


def test_a_pod_that_does_not_say_is_believed() -> None:
    at: Any = SimpleNamespace(connection=SimpleNamespace(attempt=lambda words: (127, "", "sed: not found")))
    check_memory(at, 1e6)


@pytest.mark.usefixtures("laptop")
@pytest.mark.parametrize("name", ["a100_40gb", "a100pcie", "h100pcie", "h100nvl"])
def test_more_hardware_plans(name: str) -> None:
    assert name in conf_files.options("hw")
    result = runner("plan", "model=mistral7b", "method=qlora4", f"hw={name}")
    assert result.exit_code == 0, result.output
