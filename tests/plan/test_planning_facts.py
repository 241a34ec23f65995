"""What happened to users, and two readings of others on fake tensors, against the plan of the same run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from docs.generate import planning_facts as facts
from docs.generate.planning_examples import planned, spec_of
from runner.plan.autograd.step_peak import Step, replay_step
from runner.plan.choose_stage import job_of
from runner.plan.memory import GIB, setting_of
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.spec import ModelSpec

SMOLLM2_360M: dict[str, Any] = {
    "id": "HuggingFaceTB/SmolLM2-360M", "architecture": "llama", "hidden_size": 960, "intermediate_size": 2560,
    "num_layers": 32, "num_heads": 15, "num_kv_heads": 5, "head_dim": 64, "vocab_size": 49152, "context_length": 8192,
    "tie_embeddings": True,
}  # fmt: skip


PLANNED = (
    ("28.24", "3.14", "29.5", "28.9–30.7"),  # GiB of tensors, of a temporary, planned (least–most) of 32
    ("23.4", "22.8–24.7", "8.5"),  # GiB planned (least–most) of 24, and with offload
    ("683 GiB", "693"),
    ("10.7", "35.7"),  # GiB between the passes, at the peak
    ("15.9", "16.0 GiB", "1.9 GiB", "7.8"),  # the last two: all logits at once, batch 1 and 4
    ("2.6 GiB per process",),
    ("30.9, 16.9 and 7.3 GiB", "15.0 GiB", "15.2 GiB"),
)
"""What the plan answers to each report, as in docs/planning.md."""


def test_every_reported_figure_is_answered_by_the_plans_own() -> None:
    head, rows = facts.facts()
    assert head == ("reported", "planned")
    for (reported, said), figures in zip(rows, PLANNED, strict=True):
        assert re.search(r"\d", reported)
        assert [figure for figure in figures if figure not in said] == []


# ── two readings with a plain head and SDPA's mask: all logits at once, in 16 bits and in fp32 ────────────────────


def simulated_by_others(model: ModelSpec | None, *words: str) -> tuple[Step, float]:
    """The step, and what is always there, GiB."""
    spec = spec_of(*words, "hw=h200")
    spec = spec.model_copy(update={"model": model}) if model else spec
    shape = shape_of(spec.model)
    training = training_of(shape, spec.method, "bf16", deepspeed=False)
    setting = setting_of(training, job_of(spec), int(spec.train.micro_batch_size))
    one = replay_step(shape, replace(setting, head="labelled", attention="sdpa"), training.trains)
    width = training.adapter_width if training.adapter else training.trained_width
    moments = 2 * width * training.trainable  # AdamW's two, as wide as the weights
    return one, (training.frozen_bytes + training.trained_bytes + moments) / GIB


def test_llama3_2_3b_with_lora_peaks_at_9_55_gib_in_backward() -> None:
    run = ("model=llama3_2_3b", "method=lora", "train.max_length=2048", "train.micro_batch_size=1",
           "train.batch_size=1", "train.gradient_checkpointing=true")  # fmt: skip
    one, fixed = simulated_by_others(None, *run)
    assert fixed + one.backward.total / GIB == pytest.approx(9.55, abs=0.01)
    assert one.backward.total > one.forward.total


def test_smollm2_360m_in_full_peaks_at_5_89_gib_in_backward() -> None:
    run = ("method=full", "method.master_weights=false", "train.max_length=512", "train.micro_batch_size=4",
           "train.batch_size=4", "train.gradient_checkpointing=false", "train.packing=false")  # fmt: skip
    one, fixed = simulated_by_others(ModelSpec.model_validate(SMOLLM2_360M), *run)
    assert fixed + one.backward.total / GIB == pytest.approx(5.89, abs=0.01)
    assert one.backward.total > one.forward.total


# ── users ──────────────────────────────────────────────────────────────────────────────────────


def test_qwen2_7b_needs_less_than_reported_as_its_logits_are_never_there() -> None:
    short, long = (planned(*facts.QWEN2, f"train.max_length={s}").peak_gib["expected"] for s in (1024, 2048))
    assert 15.5 < short < 17.9e9 / GIB
    assert short < long < 26.1e9 / GIB
    reported = (26.1 - 17.9) * 1e9 / GIB
    assert facts.all_logits(4, 2048) - facts.all_logits(4, 1024) == pytest.approx(reported, rel=0.05)
    assert facts.all_logits(1, 2048) - facts.all_logits(1, 1024) < reported / 3


def test_an_8b_passes_through_the_page_cache_while_it_loads() -> None:
    plan = planned(*facts.LOADED)
    assert plan.host_ram_gib < 5
    assert "loading" not in plan.host_ram


def test_torchtunes_adapters_agree_within_what_compiling_saves() -> None:
    lora, qlora = (facts.tensors_in(planned(*words)) for words in (facts.TUNED_LORA, facts.TUNED_QLORA))
    assert lora == pytest.approx(16.2, rel=0.05)
    assert qlora == pytest.approx(7.4, rel=0.05)
    assert planned(*facts.TUNED_LORA).fits and planned(*facts.TUNED_QLORA).fits


def test_in_full_the_gradients_that_torchtune_drops_are_what_does_not_fit() -> None:
    plan = planned(*facts.TUNED_FULL)
    assert not plan.fits
    without = facts.tensors_in(plan) - plan.phases["step"]["gradients"]
    assert without < 18.9 < plan.capacity_gib


def test_paged_states_make_room_on_the_gpu_and_count_in_main_memory() -> None:
    run = ("model=mistral7b", "method=full", "method.master_weights=false", "hw=a100", "hw.memory_gib=40",
           "train.max_length=512", "train.batch_size=1")  # fmt: skip
    held, paged = (planned(*run, f"train.optimizer={name}") for name in ("adamw_8bit", "paged_adamw_8bit"))
    assert not held.fits and paged.fits
    assert paged.host_ram["offloaded"] == pytest.approx(held.phases["step"]["optimizer"], abs=0.01)
    assert "optimizer" not in paged.phases["forward"]
    assert 0 < paged.phases["step"]["optimizer"] < 1  # of the largest trained weight
    assert any(note.startswith("paged: the optimiser's 13.7 GiB") for note in paged.notes)
    adapter = planned("model=mistral7b", "method=lora", "hw=a100", "train.optimizer=paged_adamw_8bit")
    assert adapter.phases["forward"]["optimizer"] > 0 and "offloaded" not in adapter.host_ram
