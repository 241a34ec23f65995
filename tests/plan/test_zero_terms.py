"""ZeRO's bytes worked out by hand from DeepSpeed 0.19.8's sources, in numbers small enough to follow, and its defaults.

`tests/plan/test_zero.py` holds the same arithmetic to what two real ranks hold.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest

from runner.plan import zero, zero_config
from runner.plan.zero import padded, terms
from runner.plan.zero_config import offload_of, offloads, refusal, resolved_config


def found(stage: dict[str, Any], *, precision: Any = "bf16", accumulation: int = 1, **changes: Any) -> dict[str, float]:
    """The terms of 10 trained values on 3 GPUs that are not 0; the largest of all parameters has 7."""
    asked = {
        "world": 3, "trainable": 10, "frozen": 0, "frozen_bytes": 0.0, "largest_layer_parameters": 7,
        "optimizer_bytes": 8.0,
    } | changes  # fmt: skip
    config: Any = {"zero_optimization": stage, "gradient_accumulation_steps": accumulation}
    made = asdict(terms(precision=precision, config=config, **asked))
    return {name: size for name, size in made.items() if size != 0}


# --- stages 1 and 2 ------------------------------------------------------------------------------
# Flat buffers end on a multiple of 2 × 3: 12 values, 4 of them on each GPU.


def test_zero1_holds_whole_gradients_beside_its_part_and_shards_the_rest() -> None:
    assert found({"stage": 1, "reduce_bucket_size": 6}) == {
        "weights": 12 * 2, "gradients": (10 + 4) * 2, "kept_gradients": 4 * 2, "master": 4 * 4, "optimizer": 4 * 8,
        "buckets": 6 * 2, "step": 4 * 2 + 4 * 4,
    }  # fmt: skip


def test_zero2_holds_its_part_and_the_gradient_that_is_beyond_the_bucket() -> None:
    beyond = found({"stage": 2, "reduce_bucket_size": 6})
    assert beyond == {
        "weights": 12 * 2, "gradients": (7 + 4) * 2, "kept_gradients": 4 * 2, "master": 4 * 4, "optimizer": 4 * 8,
        "buckets": 6 * 2, "step": 4 * 2 + 4 * 4,
    }  # fmt: skip
    for within in (7, 8):
        assert found({"stage": 2, "reduce_bucket_size": within})["gradients"] == 4 * 2


def test_accumulated_parts_stand_beside_new_ones_in_zero2_alone() -> None:
    zero1, zero2 = ({"stage": stage, "reduce_bucket_size": 6} for stage in (1, 2))
    assert found(zero2, accumulation=2)["gradients"] == (7 + 2 * 4) * 2
    assert found(zero1, accumulation=2)["gradients"] == (10 + 4) * 2


def test_overlapping_takes_two_buckets_and_fp32_no_copy_in_the_step() -> None:
    assert found({"stage": 2, "reduce_bucket_size": 6, "overlap_comm": True})["buckets"] == 2 * 6 * 2
    assert found({"stage": 2, "reduce_bucket_size": 6, "overlap_comm": False})["buckets"] == 6 * 2
    for precision, width, step in (("fp32", 4, 4 * 4), ("fp16", 2, 4 * 2 + 4 * 4)):
        held = found({"stage": 2, "reduce_bucket_size": 6}, precision=precision)
        assert held["weights"] == 12 * width and held["buckets"] == 6 * width and held["step"] == step


def test_frozen_weights_are_whole_and_nothing_of_them_waits() -> None:
    frozen = found({"stage": 2, "reduce_bucket_size": 6}, frozen=5, frozen_bytes=11.0)
    assert frozen["weights"] == 12 * 2 + 11 and frozen["gradients"] == 4 * 2
    told = found({"stage": 2, "reduce_bucket_size": 6}, frozen=5, frozen_bytes=11.0, largest_trained=9)
    assert told["gradients"] == (9 + 4) * 2


def offloading(**more: Any) -> dict[str, Any]:
    return {"stage": 2, "reduce_bucket_size": 6, "offload_optimizer": {"device": "cpu", **more}}


def test_an_offloaded_optimiser_leaves_weights_gradients_and_buckets() -> None:
    """And in main memory fp32 weights and gradients, 16-bit copies, one parameter's gradient, the states."""
    held = found(offloading(pin_memory=False))
    host = 4 * 4 + 4 * 4 + 4 * 2 + 7 * 2 + 4 * 8
    assert held == {"weights": 12 * 2, "gradients": 7 * 2, "buckets": 6 * 2 + 7 * 2, "host": host}
    assert found(offloading(pin_memory=False), accumulation=2)["host"] == host + 4 * 2
    assert found(offloading(pin_memory=True))["host"] == host + 2  # 14 bytes, page-locked: 16; the others are powers
    assert found(offloading())["host"] == host + 2  # pinned unless it says otherwise
    assert "host" not in found({"stage": 2, "offload_optimizer": {"device": "none"}})


# --- stage 3 -------------------------------------------------------------------------------------
# 10 values in three parts: 4 on each GPU.


def test_zero3_shards_weights_gradients_and_states() -> None:
    held = found({"stage": 3, "reduce_bucket_size": 6})
    assert held == {
        "weights": 4 * 2, "gradients": (4 + 7) * 2, "kept_gradients": 4 * 2, "master": 4 * 4, "optimizer": 4 * 8,
        "buckets": 6 * 2, "step": 6 * 2 + 4 * (2 + 4), "gathered": 10 * 2,
    }  # fmt: skip
    fp32 = found({"stage": 3, "reduce_bucket_size": 6}, precision="fp32")
    assert (fp32["weights"], fp32["buckets"], fp32["gathered"]) == (4 * 4, 6 * 4, 10 * 4)
    assert fp32["step"] == 6 * 4 + 4 * 4


def test_zero3_steps_by_sub_groups() -> None:
    held = found({"stage": 3, "reduce_bucket_size": 6, "sub_group_size": 3})
    assert held["step"] == 6 * 2 + 3 * (2 + 4)
    assert held["master"] == 4 * 4


def test_zero3_shards_frozen_weights_and_keeps_small_ones_whole() -> None:
    held = found({"stage": 3, "reduce_bucket_size": 6}, frozen=6, frozen_bytes=12.0, persistent=2)
    assert held["weights"] == 2 * 2 + 4 * 2 + 12 / 3
    assert held["gathered"] == (10 - 2) * 2 + 12


def test_gathered_ends_at_the_live_limit_and_one_parameter_more() -> None:
    """The limit in values, and half the reuse distance where that is more; a prefetch is copied once more."""
    live = {"stage": 3, "reduce_bucket_size": 99, "stage3_max_live_parameters": 20, "stage3_max_reuse_distance": 30}
    many: dict[str, Any] = {"trainable": 100}
    assert found(live, **many)["gathered"] == (20 + 7) * 2
    for distance in (60, 61):
        assert found(live | {"stage3_max_reuse_distance": distance}, **many)["gathered"] == (30 + 7) * 2
    assert found(live | {"stage3_prefetch_bucket_size": 5}, **many)["gathered"] == (20 + 7 + 5) * 2
    assert found(live | {"stage3_prefetch_bucket_size": 500}, trainable=15)["gathered"] == 2 * 15 * 2
    # A frozen base in 4 bits: its 50 values are 25 bytes, and the tensors that hold them have 25 elements.
    quantised: dict[str, Any] = {"trainable": 10, "frozen": 50, "frozen_bytes": 25.0}
    assert found(live, **quantised)["gathered"] == pytest.approx(27 * (10 * 2 + 25) / 35)


def test_alone_nothing_is_gathered_unless_parameters_are_offloaded() -> None:
    """A gathered parameter is a view of its part (`_no_gather_coalesced`)."""
    alone: dict[str, Any] = {"world": 1, "frozen": 3, "frozen_bytes": 6.0}
    stage = {"stage": 3, "reduce_bucket_size": 6}
    assert "gathered" not in found(stage, **alone)
    assert found(stage | {"offload_param": {"device": "cpu"}}, **alone)["gathered"] == 10 * 2 + 6
    assert "gathered" not in found(stage | {"offload_param": {"device": "none"}}, **alone)
    assert "gathered" not in found(stage, persistent=10)  # nothing but what is whole anyway
    assert found(stage, persistent=9)["gathered"] == 2  # one value
    assert "gathered" in found(stage, world=2)


def test_zero3_offload_leaves_what_is_small_and_the_bucket() -> None:
    """In main memory: fp32 weights and gradients, 16-bit gradients and the states; the 16-bit weights."""
    optimizer = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    param = {"offload_param": {"device": "cpu", "pin_memory": False}}
    stage, base = {"stage": 3, "reduce_bucket_size": 6}, {"world": 2, "frozen": 6, "frozen_bytes": 12.0}
    own = 5
    both = found(stage | optimizer | param, **base, largest_trained=9, persistent=2)
    assert both == {
        "weights": 2 * 2, "gradients": 9 * 2, "buckets": 6 * 2, "step": 6 * 2, "gathered": 8 * 2 + 12,
        "host": own * 2 + 2 * own * 4 + own * 8 + 16 + 12 / 2,  # 10 bytes of weights, page-locked whatever it says: 16
    }  # fmt: skip
    states = found(stage | optimizer, **base)
    assert states["weights"] == own * 2 + 12 / 2 and states["host"] == own * 2 + 2 * own * 4 + own * 8
    assert "master" not in states and "optimizer" not in states and "kept_gradients" not in states
    weights = found(stage | param, **base)
    assert "weights" not in weights and weights["host"] == 16 + 12 / 2
    assert weights["master"] == own * 4 and weights["optimizer"] == own * 8
    pinned = found(stage | {"offload_optimizer": {"device": "cpu"}}, **base)["host"]
    assert pinned == 16 + own * 4 + 32 + own * 8  # of 10 and of 20 bytes


def test_on_nvme_the_swap_buffers_stay_in_main_memory() -> None:
    """Those of the optimiser hold the largest sub-group in fp32, those of the weights are of one size; both are locked
    by `new_cpu_locked_tensor` (ops/csrc/pin_memory/page_alloc.cpp), which rounds to no power of two."""
    optimizer: dict[str, Any] = {"offload_optimizer": {"device": "nvme", "pin_memory": False}}
    stage = {"stage": 3, "reduce_bucket_size": 6, "sub_group_size": 3}
    base: dict[str, Any] = {"world": 2, "frozen": 6, "frozen_bytes": 12.0}
    own = 5
    assert found(stage | optimizer, **base)["host"] == own * 2 + 4 * 3 * 4
    fewer = {"offload_optimizer": {"device": "nvme", "pin_memory": True, "buffer_count": 3}}
    assert found(stage | fewer | {"sub_group_size": 99}, **base)["host"] == 16 + 3 * own * 4
    param: dict[str, Any] = {"device": "nvme", "buffer_count": 3, "buffer_size": 7, "max_in_cpu": 3}
    for pin in (True, False):  # both are locked whatever it says
        assert found(stage | {"offload_param": {**param, "pin_memory": pin}}, **base)["host"] == 3 * 7 * 2 + 8
    assert found(stage | {"offload_param": {**param, "max_in_cpu": 99}}, **base)["host"] == 3 * 7 * 2 + 16
    assert found(stage | {"offload_param": {"device": "nvme"}}, **base)["host"] == 5 * 100_000_000 * 2 + 16
    many: dict[str, Any] = {"trainable": 6_000_000_000, "world": 2}
    large = found({"stage": 3, "offload_optimizer": {"device": "nvme", "pin_memory": False}}, **many)
    assert large["host"] == 3_000_000_000 * 2 + 4 * 1_000_000_000 * 4
    large = found({"stage": 3, "offload_param": {"device": "nvme"}}, **many)
    assert large["host"] == 5 * 100_000_000 * 2 + 2**31  # 1e9 values of 2 bytes, page-locked by torch


# --- what a JSON leaves out ----------------------------------------------------------------------


def test_what_a_json_leaves_out_is_as_deepspeed_has_it() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    theirs = DeepSpeedZeroConfig()
    assert theirs.reduce_bucket_size == zero.REDUCE_BUCKET and theirs.sub_group_size == zero.SUB_GROUP_SIZE
    assert theirs.max_live_parameters == zero.LIVE_PARAMETERS and theirs.max_reuse_distance == zero.REUSE_DISTANCE
    param, optimizer = DeepSpeedZeroOffloadParamConfig(), DeepSpeedZeroOffloadOptimizerConfig()
    assert (param.buffer_count, param.buffer_size, param.max_in_cpu) == (5, 100_000_000, 1_000_000_000)
    assert optimizer.buffer_count == 4 and optimizer.pin_memory and param.pin_memory


def test_the_defaults_count() -> None:
    many: dict[str, Any] = {"trainable": 6_000_000_000, "world": 2, "largest_trained": 500_000_001}
    for stage in (2, 3):
        held = found({"stage": stage}, **many)
        assert held["buckets"] == 500_000_000 * 2
        assert held["gradients"] == (3_000_000_000 + 500_000_001) * 2
    assert found({"stage": 2}, **many | {"largest_trained": 500_000_000})["gradients"] == 3_000_000_000 * 2
    three = found({"stage": 3}, **many)
    assert three["step"] == 500_000_000 * 2 + 1_000_000_000 * (2 + 4)
    assert three["gathered"] == (1_000_000_000 + 7) * 2  # half the reuse distance is less
    far = {"stage": 3, "stage3_max_live_parameters": 5}
    assert found(far, **many)["gathered"] == (500_000_000 + 7) * 2
    config: Any = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 6}}  # no accumulation
    asked: dict[str, Any] = {"trainable": 10, "frozen": 0, "frozen_bytes": 0.0, "largest_layer_parameters": 6}
    once = terms(3, **asked, optimizer_bytes=8.0, config=config, precision="bf16")
    assert once.gradients == 4 * 2


def test_every_parameter_is_padded_to_the_number_of_gpus() -> None:
    assert padded([1, 3, 4, 6], 3) == 3 + 3 + 6 + 6
    assert padded([1, 3, 4], 1) == 8


# --- the JSON ------------------------------------------------------------------------------------


def resolved(template: dict[str, Any], **changes: Any) -> Any:
    asked: dict[str, Any] = {
        "micro_batch": 2, "accumulation": 3, "world": 5, "hidden_size": 15, "precision": "bf16", "max_grad_norm": 0.7,
    }  # fmt: skip
    return resolved_config(template, **asked | changes)


def test_every_auto_becomes_what_transformers_makes_of_it() -> None:
    """`HfTrainerDeepSpeedConfig` (integrations/deepspeed.py); test_zero.py compares the project's own five JSONs."""
    sizes = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    asked = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    template = {
        **dict.fromkeys(asked, "auto"), "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {"stage": 3, "sub_group_size": 7, **dict.fromkeys(sizes, "auto")},
    }  # fmt: skip
    assert resolved(template) == {
        "train_batch_size": 30, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.7, "bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {
            "stage": 3, "sub_group_size": 7, "reduce_bucket_size": 225, "stage3_prefetch_bucket_size": 202,
            "stage3_param_persistence_threshold": 150,
        },
    }  # fmt: skip
    half = resolved(template, precision="fp16")
    assert (half["bf16"]["enabled"], half["fp16"]["enabled"]) == (False, True)
    full = resolved(template, precision="fp32")
    assert (full["bf16"]["enabled"], full["fp16"]["enabled"]) == (False, False)


def test_every_auto_that_nothing_decides_is_named() -> None:
    from runner.errors import RequestError

    template = {"a": "auto", "zero_optimization": {"stage": 2, "b": {"c": "auto"}}}
    with pytest.raises(RequestError) as caught:
        resolved(template)
    assert [(p.what, p.remedy) for p in caught.value.problems] == [
        (f'"{key}" is "auto" in the DeepSpeed JSON', "write a value") for key in ("a", "zero_optimization.b.c")
    ]


def test_nvme_takes_each_part_that_is_offloaded() -> None:
    from runner.errors import RequestError

    cpu = {"device": "cpu", "pin_memory": True}
    there = {"device": "nvme", "pin_memory": True, "nvme_path": "/fast"}
    for parts in (("offload_param",), ("offload_optimizer",), ("offload_optimizer", "offload_param")):
        zero_part = {"stage": 3, **dict.fromkeys(parts, cpu), "offload_none": {"device": "none"}}
        found_zero = resolved({"zero_optimization": zero_part}, nvme_path="/fast")["zero_optimization"]
        assert found_zero == {"stage": 3, **dict.fromkeys(parts, there), "offload_none": {"device": "none"}}
    for refused in ({"stage": 2, "offload_optimizer": cpu}, {"stage": 3}, {"stage": 3, "offload_param": None}):
        with pytest.raises(RequestError) as caught:
            resolved({"zero_optimization": refused}, nvme_path="/fast")
        (problem,) = caught.value.problems
        assert (problem.what, problem.remedy) == (
            "offloading to NVMe needs ZeRO-3 with offload", "write deepspeed=zero3_offload",
        )  # fmt: skip


def test_what_is_offloaded_is_told_from_what_is_not() -> None:
    for block, there in (({"device": "cpu"}, True), ({"device": "nvme"}, True), ({"device": "none"}, False)):
        part: Any = {"stage": 3, "offload_param": block}
        assert offloads(part, "offload_param") is there and offload_of(part, "offload_param") == block
    for part in (
        {"stage": 3},
        {"stage": 3, "offload_param": None},
        {"stage": 3, "offload_param": {"pin_memory": True}},
    ):
        assert not offloads(part, "offload_param")
    assert offload_of({"stage": 3}, "offload_param") == {}
    assert zero_config.OFFLOADS == ("offload_optimizer", "offload_param")


# --- what is refused, and what is next to it -----------------------------------------------------


USUAL = {
    "deepspeed": "none", "method": "lora", "train.optimizer": "adamw", "train.precision": "bf16",
    "method.master_weights": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("refused", "allowed"),
    [
        (("zero3", "qlora8"), [("zero2", "qlora8"), ("zero3", "qlora4"), ("none", "qlora8")]),
        (("zero3_offload", "peft"), [("zero2", "peft"), ("zero3_offload", "lora")]),
        (("zero1", "full", "adafactor"), [("none", "full", "adafactor"), ("zero1", "full", "sgd")]),
        (("zero2_offload", "full", "sgd"), [("zero2", "full", "sgd"), ("zero2_offload", "full", "adamw")]),
        (("none", "full", "adamw", "fp16", False), [("none", "full", "adamw", "bf16", False),
                                                    ("none", "full", "adamw", "fp16", True),
                                                    ("none", "lora", "adamw", "fp16", False)]),
        (("zero2", "freeze", "adamw", "fp16", False), [("zero2", "freeze", "adamw", "fp32", False)]),
    ],
)  # fmt: skip
def test_the_combination_is_refused_and_not_what_differs_in_one_part(
    refused: tuple[Any, ...], allowed: list[tuple[Any, ...]]
) -> None:
    usual = (*USUAL.values(),)
    assert refusal(*(*refused, *usual[len(refused) :])) is not None
    for one in allowed:
        assert refusal(*(*one, *usual[len(one) :])) is None


@pytest.mark.parametrize(
    "asked",
    [
        ("zero3", "qlora8"), ("zero3_offload", "peft"), ("zero1", "full", "adafactor"),
        ("zero2_offload", "full", "sgd"), ("none", "full", "adamw", "fp16", False),
        ("zero2", "freeze", "adamw", "fp16", False),
    ],
)  # fmt: skip
def test_each_of_the_two_things_that_a_refusal_says_to_write_is_accepted(asked: tuple[Any, ...]) -> None:
    values: dict[str, Any] = {**USUAL, **dict(zip(USUAL, asked, strict=False))}
    problem = refusal(*values.values())
    assert problem is not None and str(problem.remedy).startswith("write ")
    written = re.findall(r"([\w.]+)=(\w+)", str(problem.remedy))
    assert len(written) == 2
    for key, value in written:
        assert key in values and refusal(*{**values, key: value == "true" or value}.values()) is None


def test_a_refusal_says_who_refuses_and_names_the_stage_without_offload() -> None:
    torchs = refusal("none", "full", "adamw", "fp16", False)
    deepspeeds = refusal("zero2", "full", "adamw", "fp16", False)
    cannot = "method.master_weights=false cannot train in fp16"
    assert torchs is not None and torchs.what == f"{cannot}: torch's loss scaler refuses fp16 gradients"
    assert deepspeeds is not None and deepspeeds.what == f"{cannot}: DeepSpeed keeps fp32 copies under fp16"
    states = refusal("zero3_offload", "full", "paged_adamw", "bf16", True)
    assert states is not None and states.remedy == "write train.optimizer=adamw, or deepspeed=zero3"


def test_muon_is_refused_with_deepspeed_and_not_without() -> None:
    assert refusal("none", "full", "muon", "bf16", True) is None
    for stage in ("zero1", "zero2", "zero3", "zero3_offload"):
        problem = refusal(stage, "full", "muon", "bf16", True)
        assert problem is not None and problem.what.startswith(f"deepspeed={stage} hands the optimiser flat parts")
