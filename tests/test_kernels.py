"""FlashAttention is planned where it will run, and said to be assumed where nobody can look."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner import hardware, kernels
from runner.doctor import software
from tests.front import LAPTOP, here, laptop, runner
from tests.test_hardware import H100, T4

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

RUN = ("model=mistral7b", "method=lora", "train.max_length=4096", "data=hub", "data.id=x/y", "train.max_steps=1")


def plan(*words: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(runner("plan", "--json", *RUN, *words).stdout)
    return content


def about_attention(content: dict[str, Any]) -> list[str]:
    return [note for note in content["notes"] if "flash-attn" in note]


@pytest.fixture
def h100_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda: replace(LAPTOP, gpus=(H100,)))


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(kernels, "flash_attn", lambda: version)


def test_elsewhere_a_plan_says_that_it_assumes_flash_attention_and_what_it_takes_without() -> None:
    content, plain = plan("hw=h100"), plan("hw=h100", "train.attention=sdpa")
    assert about_attention(content) == [
        f"attention: assumes that flash-attn is installed; with SDPA {plain['peak_gib']['expected']:.1f} GiB"
    ]
    assert content["peak_gib"]["expected"] < plain["peak_gib"]["expected"]
    assert about_attention(plain) == []


def test_what_fits_with_flash_attention_only_is_said() -> None:
    full = plan("hw=h100", "train.micro_batch_size=1")["peak_gib"]["expected"]
    (note,) = about_attention(plan("hw=h100", f"hw.memory_gib={full + 0.01}", "train.micro_batch_size=1"))
    assert note.endswith("which does not fit")


@pytest.mark.usefixtures("h100_here")
def test_here_what_is_installed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    without = plan("hw=local")
    assert about_attention(without) == [kernels.NO_FLASH]
    spec = json.loads(runner("show", "--json", *RUN, "hw=local").stdout)
    assert spec["train"]["attention"] == "sdpa"
    installed(monkeypatch, "2.8.3")
    assert plan("hw=local")["peak_gib"]["expected"] < without["peak_gib"]["expected"]
    assert about_attention(plan("hw=local", "train.attention=sdpa")) == []


def test_a_card_without_it_and_a_cpu_need_no_note() -> None:
    assert about_attention(plan("hw=t4")) == about_attention(plan("hw=cpu")) == []


def test_doctor_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*gpus: hardware.Gpu) -> list[tuple[str, str]]:
        found = software.findings(replace(LAPTOP, gpus=gpus), None, None)
        return [(finding.state, finding.found) for finding in found if finding.name == "attention"]

    installed(monkeypatch, None)
    assert of(H100) == [("note", kernels.NO_FLASH)]
    installed(monkeypatch, "2.8.3")
    assert of(H100) == [("ok", "flash-attn 2.8.3")]
    assert of(T4) == of() == []
