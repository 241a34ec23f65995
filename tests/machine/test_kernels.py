"""FlashAttention is planned where it will run, and said to be assumed where nobody can look."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.provider import PodRequest
from runner.cloud.runpod.json_types import allowed_cuda, request_body
from runner.config import pod_packages
from runner.doctor import software
from runner.machine import detect, kernels
from tests.machine.test_hardware import H100, T4
from tests.support.front import LAPTOP, only_problem, runner, spec_of

pytestmark = pytest.mark.usefixtures("here")

RUN = ("model=mistral7b", "method=lora", "train.max_length=4096", "data=hub", "data.id=x/y", "train.max_steps=1")


def plan(*words: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(runner("plan", "--json", *RUN, *words).stdout)
    return content


@pytest.fixture
def h100_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "detect", lambda: replace(LAPTOP, gpus=(H100,)))


def attention(*words: str) -> str:
    return str(plan(*words)["attention"])


@pytest.mark.parametrize("hw", ["h100", "rtx3090"])
def test_without_any_package_no_mask_is_planned(hw: str) -> None:
    asked = ("auto", "sdpa", "flash_attention_2")
    here, sdpa, flash = (
        plan(f"hw={hw}", "train.gradient_checkpointing=true", f"train.attention={name}") for name in asked
    )
    assert here["attention"] == "varlen: a flash kernel, no mask"
    assert sdpa["attention"] == "sdpa: SDPA with a mask of all pairs of tokens"
    assert here["peak_gib"] == flash["peak_gib"] and here["peak_gib"]["expected"] < sdpa["peak_gib"]["expected"]


def test_where_no_flash_kernel_runs_documents_are_taken_one_by_one() -> None:
    one_by_one = "varlen: SDPA once per document, no mask"
    assert attention("hw=t4") == attention("hw=h100", "train.precision=fp32") == one_by_one
    assert attention("hw=cpu") == "varlen: each document in blocks, no mask"


@pytest.mark.parametrize("hw", ["h100", "t4", "cpu"])
def test_capped_scores_are_planned_as_they_run(hw: str) -> None:
    """Of Gemma 2, and not of Gemma 3, which has no cap."""
    gemma, words = f"hw={hw}", "varlen: each document's scores, no mask"
    assert attention(gemma, "model=gemma2_2b") == attention(gemma, "model=gemma2_2b", "train.attention=varlen") == words
    assert attention(gemma, "model=gemma3_1b") == attention(gemma)
    assert "train.attention=varlen" in only_problem(gemma, "model=gemma2_2b", "train.attention=sdpa").remedy


@pytest.mark.parametrize("hw", ["h100", "cpu"])
def test_what_gpt_oss_cannot_do_is_refused_before_it_is_rented(hw: str) -> None:
    model = f"hw={hw}", "model=gpt_oss_20b"
    assert attention(*model) == "varlen: each document's scores, no mask"
    for named in ("sdpa", "flash_attention_2"):
        assert "train.attention=varlen" in only_problem(*model, f"train.attention={named}").remedy
    assert "train.packing=false" in only_problem(*model, "train.packing=true").remedy


@pytest.mark.parametrize("model", ["qwen3_5_4b", "qwen3_5_35b_a3b"])
def test_linear_attention_is_not_packed(model: str) -> None:
    """transformers 5.23 raises for packed rows without two kernels that have no wheels for every machine."""
    assert spec_of("hw=h100", f"model={model}").train.packing is False
    assert "train.packing=false" in only_problem("hw=h100", f"model={model}", "train.packing=true").remedy


@pytest.mark.usefixtures("h100_here")
def test_here_flash_attention_3_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "flash_attn", lambda: "2.8.3")  # the same kernel as torch's
    assert attention("hw=local").startswith("varlen")
    monkeypatch.setattr(kernels, "flash_attn_3", lambda: "3.0.0")
    assert attention("hw=local") == "flash_attention_3: a flash kernel, no mask"
    assert attention("hw=local", "train.precision=fp32").startswith("varlen")  # it knows 16 bits alone
    assert attention("hw=local", "train.attention=sdpa").startswith("sdpa")
    assert attention("hw=local", "model=gpt_oss_20b").startswith("varlen")
    assert attention("hw=h100x3").startswith("varlen")  # not this machine


# ── in a pod ────────────────────────────────────────────────────────────────────────────────────


RENTED = ("where=runpod", "hw=h100")


def test_a_rented_run_needs_no_package_for_it() -> None:
    spec = spec_of(*RUN, *RENTED)
    assert (
        spec.train.attention == "varlen"
        and pod_packages.extra_requirements(spec) == []
        and pod_packages.flash_attn_wheels(spec) == []
    )
    chosen = spec_of("where=runpod", "model=mistral7b", "method=lora", "train.max_length=4096")  # without hw=
    assert chosen.hw.accelerator == "cuda" and chosen.train.attention == "varlen"


def test_flash_attention_that_is_named_is_planned_installed_and_its_host_asked_for() -> None:
    named = (*RENTED, "train.attention=flash_attention_2")
    assert plan(*named)["peak_gib"] == plan(*RENTED)["peak_gib"]
    spec = spec_of(*RUN, *named)
    assert pod_packages.extra_requirements(spec) == ["flash-attn", "einops"]
    wheels = pod_packages.flash_attn_wheels(spec)
    assert [wheel["build"] for wheel in wheels] == ["", "cu126"] and pod_packages.least_cuda(spec) is None
    assert all("torch2.13-cp312-cp312-linux_x86_64.whl" in wheel["url"] for wheel in wheels)
    blackwell = spec_of(*RUN, "where=runpod", "hw=b200", "train.attention=flash_attention_2")
    assert pod_packages.least_cuda(blackwell) == "13.0"
    image = "runpod/pytorch:1.0.7-cu1281-torch280-ubuntu2404"
    request = PodRequest("a", image, "secure", gpu_id="NVIDIA B200", min_cuda="13.0")
    assert request_body(request)["gpu"]["minCudaVersion"] == "13.0" and allowed_cuda(request)[0] == "13.0"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("hw=rtx5090", "no wheel of flash-attn is known for torch 2.13 on rtx5090 → write train.attention=varlen"),
        ("where.image=axolotl", "which Python axolotl has is not known"),
        ("where.template=abc", "which Python abc has is not known, and a wheel of flash-attn is for one alone → write"),
        ("where.pod=abc", "leave out where.pod"),
        ('hw=b200 where.cuda_versions=["12.8"]', "on b200 it needs CUDA 13.0 → leave out where.cuda_versions"),
        ("train.attention=flash_attention_3", "write train.attention=flash_attention_2 or varlen"),
    ],
)
def test_flash_attention_that_a_pod_cannot_get_is_refused_before_renting(
    words: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = dict(word.split("=", 1) for word in ("hw=h100", "train.attention=flash_attention_2", *words.split()))
    all_of_them = (*RUN, "where=runpod", *(f"{key}={value}" for key, value in chosen.items()))
    problem = only_problem(*all_of_them)
    assert says in f"{problem.what} → {problem.remedy}"
    monkeypatch.setenv(pod_packages.OWN_PYTHON, "/opt/python")  # which the pod looks at itself
    assert spec_of(*all_of_them).train.attention.startswith("flash")


def test_what_an_image_brings_is_said() -> None:
    (note,) = [note for note in plan(*RENTED, "where.image=unsloth")["notes"] if "where.image=unsloth brings" in note]
    assert "torch 2.11 for CUDA 12.8, Unsloth" in note and note.endswith("a run has packages of its own")
    assert not [note for note in plan(*RENTED)["notes"] if " brings " in note]


def test_doctor_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*gpus: detect.Gpu) -> list[tuple[str, str]]:
        found = software.software_findings(replace(LAPTOP, gpus=gpus), None, None)
        return [(finding.state, finding.found) for finding in found if finding.name == "attention"]

    monkeypatch.setattr(kernels, "flash_attn", lambda: None)
    assert of(H100) == [("ok", "torch's flash kernel (varlen)")]
    monkeypatch.setattr(kernels, "flash_attn", lambda: "2.8.3")
    assert of(H100) == [("ok", "torch's flash kernel (varlen), flash-attn 2.8.3")]
    assert of(T4) == of() == []
