"""What an objective adds to the plan: sequences, a reference model, passes without gradients, answers."""

from __future__ import annotations

from typing import Any

import pytest

from runner.plan.memory import GIB
from runner.resolve.plan_inputs import plan
from tests.conftest import spec_of

WORDS = (
    "model=mistral7b", "hw=h200", "data=hub", "data.id=org/rows", "train.max_length=1024", "train.max_steps=100",
    "train.batch_size=8", "train.micro_batch_size=2",
)  # fmt: skip
PARAMETERS = 7_241_732_096


def planned(*words: str) -> Any:
    """The plan of Mistral 7B on one H200."""
    return plan(spec_of(*WORDS, *words), [])


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_model_that_trains_whole_needs_a_copy_of_what_it_was(objective: str) -> None:
    found = planned("method=full", f"objective={objective}")
    assert found.phases["step"]["reference"] == pytest.approx(2 * PARAMETERS / GIB, abs=1e-3)
    assert "reference" in found.phases["load"]


@pytest.mark.parametrize(
    "words",
    [
        ("method=lora", "objective=dpo"),
        ("method=qlora4", "objective=kto"),
        ("method=full", "objective=dpo", "objective.precompute_reference=true"),
        ("method=full", "objective=dpo", "objective.loss=simpo"),
        ("method=full", "objective=orpo"),
        ("method=full", "objective=reward"),
        ("method=full", "objective=grpo"),
    ],
)
def test_these_need_no_copy(words: tuple[str, ...]) -> None:
    assert not any("reference" in terms for terms in planned(*words).phases.values())


def test_zero3_shards_the_copy_and_zero2_does_not() -> None:
    words = ("method=full", "objective=dpo", "hw=h200x8", "train.batch_size=16")
    shared = planned(*words, "deepspeed=zero3").phases["step"]["reference"]
    whole = planned(*words, "deepspeed=zero2").phases["step"]["reference"]
    assert whole == pytest.approx(8 * shared, rel=1e-3)


def test_two_sequences_a_pair_keep_twice_the_activations() -> None:
    pairs, rows = planned("method=lora", "objective=dpo"), planned("method=lora", "train.packing=false")
    double = planned("method=lora", "train.packing=false", "train.micro_batch_size=4")
    assert pairs.phases["backward"]["activations"] == double.phases["backward"]["activations"]
    assert pairs.phases["backward"]["activations"] > 1.5 * rows.phases["backward"]["activations"]


def test_time_counts_both_sequences_and_the_passes_without_gradients() -> None:
    """LoRA with checkpointing: forward, recomputation and gradients of inputs, 3 forward passes' worth of operations;
    the reference adds one. Two sequences a pair."""
    # So long that launching kernels takes next to nothing.
    long = ("method=lora", "train.max_length=8192", "train.gradient_checkpointing=true")
    sft = planned(*long, "train.packing=false").step_seconds
    dpo, orpo, kto = (planned(*long, f"objective={name}").step_seconds for name in ("dpo", "orpo", "kto"))
    assert orpo == pytest.approx(2 * sft, rel=0.1)
    assert dpo == pytest.approx(2 * sft * 4 / 3, rel=0.1)
    assert kto == pytest.approx(sft * 6 / 3, rel=0.1)  # three passes beside it


def test_all_logits_of_the_older_trainers_are_counted() -> None:
    """2 sequences × 2 × 1,023 positions × 32,000 words, at least 10 bytes each."""
    found = planned("method=lora", "objective=orpo").phases
    assert found["backward"]["head_and_loss"] > 10 * 4 * 1023 * 32_000 / GIB * 0.99
    assert planned("method=lora", "objective=dpo").phases["backward"]["head_and_loss"] < 1


def test_a_reward_model_has_no_head_for_words() -> None:
    full, reward = planned("method=full"), planned("method=full", "objective=reward")
    assert full.trainable_parameters - reward.trainable_parameters == 32_000 * 4096 - 4096
    lora = planned("method=lora"), planned("method=lora", "objective=reward")
    assert lora[1].trainable_parameters - lora[0].trainable_parameters == 4096  # the new head trains


def test_answers_count_as_time_and_as_memory_of_keys_and_values() -> None:
    """8 answers of 512 tokens a step, at 32 layers × 2 × 8 heads × 128 × 2 bytes a token."""
    words = ("method=lora", "objective=grpo")
    long = planned(*words, "objective.max_new_tokens=512")
    short = planned(*words, "objective.max_new_tokens=64")
    assert long.step_seconds > 4 * short.step_seconds
    one_by_one = planned(*words, "objective.max_new_tokens=900", "train.batch_size=64", "train.micro_batch_size=1")
    assert one_by_one.phases["forward"]["kv_cache"] == pytest.approx(64 * 1024 * 32 * 2 * 8 * 128 * 2 / GIB, rel=0.01)


def test_kto_never_takes_rows_one_by_one() -> None:
    spec = spec_of(*WORDS[:-1], "train.micro_batch_size=auto", "objective=kto", "train.batch_size=1")
    assert spec.train.micro_batch_size == 2
