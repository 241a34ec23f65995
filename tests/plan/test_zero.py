"""The plan's ZeRO arithmetic is what DeepSpeed does: its JSON, the bytes two real ranks hold, its refusals."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.errors import RequestError
from runner.paths import DEEPSPEED_CONFIGS
from runner.plan.zero import Terms, padded, terms
from runner.plan.zero_config import Precision, refusal, resolved_config

SUPPORT = Path(__file__).parents[1] / "support"
NAMES = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
WORLD = 2
HIDDEN = 24  # buckets of 24² = 576 elements, so that every weight below is beyond one and every bias within
ODD = [24, 33, 57, 35, 51, 45, 39]
DEEP = [64] * 25
LIVE = 6 * 64 * 64


def template(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEEPSPEED_CONFIGS / f"{name}.json").read_text("utf-8"))
    return loaded


def config(name: str, accumulation: int = 1, precision: Precision = "bf16", hidden: int = HIDDEN) -> dict[str, Any]:
    return resolved_config(
        template(name),
        micro_batch=2,
        accumulation=accumulation,
        world=WORLD,
        hidden_size=hidden,
        precision=precision,
        max_grad_norm=1.0,
    )


# The JSON


def flat(part: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in part.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", NAMES)
def test_the_json_is_the_one_transformers_fills_in(name: str, precision: Precision) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args = SimpleNamespace(
        world_size=WORLD,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_grad_norm=1.0,
        learning_rate=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        save_on_each_node=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        bf16_full_eval=False,
        fp16_full_eval=False,
        get_warmup_steps=lambda steps: 1,
    )
    theirs = HfTrainerDeepSpeedConfig(template(name))
    theirs.trainer_config_process(args)
    theirs.trainer_config_finalize(args, SimpleNamespace(config=SimpleNamespace(hidden_size=4096)), 100)
    ours = config(name, accumulation=3, precision=precision, hidden=4096)
    assert ours == theirs.config
    assert "auto" not in flat(ours).values()


def test_an_auto_that_nothing_decides_is_an_error_with_its_key() -> None:
    user = template("zero2") | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    with pytest.raises(RequestError, match=r"optimizer\.params\.lr"):
        resolved_config(
            user, micro_batch=1, accumulation=1, world=2, hidden_size=64, precision="bf16", max_grad_norm=1.0
        )


def on_nvme(name: str) -> dict[str, Any]:
    return resolved_config(
        template(name),
        micro_batch=1,
        accumulation=1,
        world=2,
        hidden_size=64,
        precision="bf16",
        max_grad_norm=1.0,
        nvme_path="/nvme",
    )


def test_nvme_moves_what_was_in_main_memory_and_nothing_else() -> None:
    zero = on_nvme("zero3_offload")["zero_optimization"]
    there = {"device": "nvme", "pin_memory": True, "nvme_path": "/nvme"}
    assert zero["offload_optimizer"] == zero["offload_param"] == there
    assert (
        template("zero3_offload")["zero_optimization"]["offload_param"]["device"] == "cpu"
    )  # the template is as it was


@pytest.mark.parametrize("name", ["zero2_offload", "zero3"])
def test_nvme_without_zero3_offload_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="NVMe"):
        on_nvme(name)


# The bytes, against two real ranks


CASES: dict[str, tuple[list[int], int, dict[str, Any]]] = {
    "zero1": (ODD, 0, config("zero1")),
    "zero1-accumulating": (ODD, 0, config("zero1", 2)),
    "zero1-frozen": (ODD, 2, config("zero1")),
    "zero1-fp32": (ODD, 0, config("zero1", precision="fp32")),
    "zero2": (ODD, 0, config("zero2")),
    "zero2-accumulating": (ODD, 0, config("zero2", 2)),
    "zero2-frozen": (ODD, 2, config("zero2")),
    "zero3": (ODD, 0, config("zero3")),
    "zero3-accumulating": (ODD, 0, config("zero3", 2)),
    "zero3-frozen": (ODD, 2, config("zero3")),
    "zero3-fp32": (ODD, 0, config("zero3", precision="fp32")),
    "zero2_offload": (ODD, 0, config("zero2_offload")),
    "zero3_offload": (ODD, 0, config("zero3_offload")),
    "zero3-deep": (DEEP, 0, config("zero3")),
}
CASES["zero3-deep"][2]["zero_optimization"] |= {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": 0}
for _case in CASES.values():
    _config = _case[2]
    _config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW in main memory: DeepSpeed's would be compiled first
    for _part in ("offload_optimizer", "offload_param"):
        if _part in _config["zero_optimization"]:
            _config["zero_optimization"][_part]["pin_memory"] = False  # a CPU has nothing to page-lock for

ZERO12 = [name for name in CASES if name[4] in "12" and "offload" not in name]
ZERO3 = [name for name in CASES if name[4] == "3" and "offload" not in name]
Measured = dict[str, list[dict[str, int]]]


def parameters(name: str) -> tuple[list[int], list[int]]:
    """Sizes of the frozen parameters and of the trained ones, in the model's order."""
    sizes, frozen, _ = CASES[name]
    every = [size for a, b in itertools.pairwise(sizes) for size in (a * b, b)]
    return every[: 2 * frozen], every[2 * frozen :]


def width(name: str) -> int:
    return 2 if CASES[name][2]["bf16"]["enabled"] else 4


def planned(name: str) -> Terms:
    sizes, _, resolved = CASES[name]
    frozen, trained = parameters(name)
    sharded = resolved["zero_optimization"]["stage"] == 3
    count = (lambda sizes: padded(sizes, WORLD)) if sharded else sum
    return terms(
        WORLD,
        trainable=count(trained),
        frozen=count(frozen),
        frozen_bytes=count(frozen) * width(name),
        largest_layer_parameters=max(frozen + trained),
        optimizer_bytes=8,
        config=resolved,
        precision="bf16" if width(name) == 2 else "fp32",
        largest_trained=max(trained),
        persistent=count(sizes[1:]) if sharded else 0,  # the biases: below 10 × 24 elements
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Bytes by term on each rank, for every case: one launch, since DeepSpeed takes 8 s to import."""
    folder = tmp_path_factory.mktemp("zero")
    cases = [{"name": name, "sizes": s, "frozen": f, "config": c} for name, (s, f, c) in CASES.items()]
    (folder / "cases.json").write_text(json.dumps(cases), "utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [*launch, str(SUPPORT / "zero_probe.py"), str(folder / "cases.json"), str(folder)]
    ran = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(WORLD)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(CASES)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZERO12, *ZERO3])
def test_weights_masters_and_optimiser_states_are_exact(name: str, measured: Measured) -> None:
    plan = planned(name)
    for rank in measured[name]:
        assert rank["weights"] + rank["persistent"] == plan.weights
        assert rank["master"] == plan.master
        assert rank["optimizer"] == plan.optimizer
        assert rank["buckets"] == plan.buckets


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZERO12, *ZERO3])
def test_after_a_step_a_rank_holds_the_plan_and_nothing_else(name: str, measured: Measured) -> None:
    """Every tensor the garbage collector finds, not only those known by name."""
    plan = planned(name)
    stays = plan.kept_gradients + plan.buckets if name in ZERO3 else 0  # ZeRO-3 allocates them once
    for rank in measured[name]:
        assert rank["total"] == plan.weights + plan.master + plan.optimizer + stays


def touching(name: str, rank: int) -> int:
    """Elements of the trained parameters that lie, at least in part, in the rank's part of the flat buffer."""
    _, trained = parameters(name)
    own = int(planned(name).kept_gradients) // width(name)
    ends = list(itertools.accumulate(trained))
    starts = [0, *ends[:-1]]
    return sum(e - s for s, e in zip(starts, ends, strict=True) if s < (rank + 1) * own and e > rank * own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO12)
def test_gradients_of_stages_1_and_2_are_exact_but_for_the_parameter_two_ranks_share(
    name: str, measured: Measured
) -> None:
    plan, w = planned(name), width(name)
    _, trained = parameters(name)
    twice = 2 if name == "zero2-accumulating" else 1
    for number, rank in enumerate(measured[name]):
        shared = touching(name, number) * w - plan.kept_gradients
        assert shared <= max(trained) * w
        assert rank["gradients"] == plan.kept_gradients + shared
        assert rank["gradients_kept"] == twice * rank["gradients"]
        if name.startswith("zero1"):
            # All of them at once; the planned peak is not passed, though buckets and parts already count.
            assert sum(trained) * w <= rank["gradients_whole"] <= plan.gradients + plan.buckets + shared
        else:
            assert plan.gradients == twice * plan.kept_gradients + max(trained) * w


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO3)
def test_gradients_of_stage_3_are_exact(name: str, measured: Measured) -> None:
    assert [rank["gradients"] for rank in measured[name]] == [planned(name).kept_gradients] * WORLD


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ZERO12, *ZERO3])
def test_the_step_adds_the_gradients_flattened_and_in_fp32(name: str, measured: Measured) -> None:
    plan = planned(name)
    bucket = plan.buckets if name in ZERO3 else 0
    in_fp32 = plan.step - bucket - plan.kept_gradients if width(name) == 2 else plan.step - bucket
    assert [rank["step"] for rank in measured[name]] == [in_fp32] * WORLD


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ZERO3 if n != "zero3-deep"])
def test_a_model_below_the_live_limit_is_gathered_whole(name: str, measured: Measured) -> None:
    plan, w = planned(name), width(name)
    persistent = measured[name][0]["persistent"]
    copied = CASES[name][2]["zero_optimization"]["stage3_prefetch_bucket_size"] * w
    assert [r["gathered"] - persistent for r in measured[name]] == [pytest.approx(plan.gathered - copied)] * WORLD


@pytest.mark.slow
def test_beyond_the_live_limit_prefetching_fills_it(measured: Measured) -> None:
    """Not the largest layer, as DeepSpeed's estimator has it: the look-ahead grows up to the limit."""
    for rank in measured["zero3-deep"]:
        live = rank["gathered"] - rank["persistent"]
        assert LIVE * 2 <= live <= planned("zero3-deep").gathered
        assert live > 5 * max(DEEP) ** 2 * 2


@pytest.mark.slow
def test_offloading_the_optimiser_leaves_weights_and_buffers(measured: Measured) -> None:
    plan = planned("zero2_offload")
    largest = max(parameters("zero2_offload")[1]) * 2
    assert plan.master == plan.optimizer == plan.kept_gradients == plan.step == 0
    for rank in measured["zero2_offload"]:
        assert rank["weights"] == plan.weights
        assert rank["buckets"] == plan.buckets - largest  # and one parameter's gradient on its way
        assert rank["total"] == plan.weights + largest + plan.host


@pytest.mark.slow
def test_offloading_everything_leaves_persistent_parameters_and_the_bucket(measured: Measured) -> None:
    plan = planned("zero3_offload")
    weights = padded(parameters("zero3_offload")[1], WORLD)  # 2 bytes, / 2 ranks
    rounded = (1 << (weights - 1).bit_length()) - weights  # these are page-locked whatever the JSON says
    for rank in measured["zero3_offload"]:
        assert rank["persistent"] == plan.weights
        assert rank["total"] == plan.weights + plan.buckets + plan.host - rounded


# The bytes, against DeepSpeed's estimators


def billion(name: str, world: int) -> Terms:
    resolved = config(name, hidden=4096)
    return terms(
        world,
        trainable=8_000_000_000,
        frozen=0,
        frozen_bytes=0,
        largest_layer_parameters=500_000_000,
        optimizer_bytes=8,
        config=resolved,
        precision="bf16",
    )


def test_zero2_agrees_with_deepspeeds_estimator_but_for_a_copy_in_the_step() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    _, theirs = estimate_zero2_model_states_mem_needs(8_000_000_000, num_gpus_per_node=8, cpu_offload=False)
    plan = billion("zero2", 8)
    ours = plan.weights + plan.master + plan.optimizer + plan.kept_gradients + plan.step
    # `step` flattens the 16-bit gradients before it casts them: 2 bytes more of this rank's part.
    assert ours - 2 * 1_000_000_000 == theirs


def test_zero3_holds_two_bytes_more_than_deepspeeds_estimator_adds_up() -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    _, theirs, largest = estimate_zero3_model_states_mem_needs(
        8_000_000_000, 500_000_000, num_gpus_per_node=8, cpu_offload=False, cpu_offload_params=False
    )
    plan = billion("zero3", 8)
    ours = plan.weights + plan.master + plan.optimizer + plan.kept_gradients + plan.step - plan.buckets
    # 2 weights + 2 gradients + 4 + 4 fp32 weights and gradients + 8 Adam are 20, where it writes 18; and
    # each sub-group of 1e9 elements is flattened in 16 bits before the cast, as in ZeRO-2.
    assert ours == theirs - largest + (2 + 2) * 1_000_000_000
    # It counts the largest layer and its gradient; the prefetcher holds up to max_live_parameters.
    assert plan.gathered > largest


def test_offload_needs_the_main_memory_deepspeeds_estimator_says_and_the_16_bit_copies() -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    theirs, _, _ = estimate_zero3_model_states_mem_needs(
        8_000_000_000, 500_000_000, num_gpus_per_node=8, additional_buffer_factor=1.0
    )
    resolved = config("zero3_offload", hidden=4096)
    for part in ("offload_optimizer", "offload_param"):
        resolved["zero_optimization"][part]["pin_memory"] = False
    host = terms(
        8,
        trainable=8_000_000_000,
        frozen=0,
        frozen_bytes=0,
        largest_layer_parameters=500_000_000,
        optimizer_bytes=8,
        config=resolved,
        precision="bf16",
    ).host
    rounded = 2**31 - 2_000_000_000  # 16-bit weights, page-locked: 2e9 bytes take 2³¹
    # 18 a parameter: 4 + 4 + 8 and 2 for the weights; 16-bit gradients (2) stand beside the fp32 ones.
    assert 8 * (host - rounded) == theirs + 2 * 8_000_000_000


def test_page_locked_buffers_are_rounded_to_a_power_of_two() -> None:
    pinned, pageable = (config("zero3_offload", hidden=4096) for _ in range(2))
    pageable["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
    hosts = [
        terms(
            8,
            trainable=8_000_000_000,
            frozen=0,
            frozen_bytes=0,
            largest_layer_parameters=500_000_000,
            optimizer_bytes=8,
            config=c,
            precision="bf16",
        ).host
        for c in (pinned, pageable)
    ]
    assert hosts[0] - hosts[1] == (2**32 - 4_000_000_000) + (2**31 - 2_000_000_000)


# What cannot work


@pytest.mark.parametrize(
    ("stage", "method", "optimizer", "precision", "masters", "part", "remedy"),
    [
        ("zero3", "qlora8", "adamw", "bf16", True, "8-bit base", "deepspeed=zero2"),
        ("zero3_offload", "qlora8", "adamw", "bf16", True, "8-bit base", "method=qlora4"),
        ("zero2_offload", "full", "adamw_8bit", "bf16", True, "AdamW on the CPU", "deepspeed=zero2"),
        ("zero3_offload", "full", "sgd", "bf16", True, "AdamW on the CPU", "train.optimizer=adamw"),
        ("zero1", "full", "adafactor", "bf16", True, "second moment", "deepspeed=none"),
        ("zero2_offload", "lora", "adafactor", "bf16", True, "second moment", "deepspeed=none"),
        ("zero3", "full", "adamw", "fp16", False, "fp16", "method.master_weights=true"),
        ("none", "freeze", "adamw", "fp16", False, "loss scaler", "method.master_weights=true"),
    ],
)
def test_what_cannot_work_is_refused_with_its_remedy(
    stage: str, method: str, optimizer: str, precision: str, masters: bool, part: str, remedy: str
) -> None:
    problem = refusal(stage, method, optimizer, precision, masters)
    assert problem is not None and problem.remedy is not None
    assert part in problem.what
    assert remedy in problem.remedy


@pytest.mark.parametrize("stage", ["none", *NAMES])
@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora4"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_usual_is_not_refused(stage: str, method: str, precision: str) -> None:
    assert refusal(stage, method, "adamw", precision, True) is None


def test_an_8_bit_matrix_outlives_the_parameter_zero3_frees() -> None:
    """The reason for refusing 8-bit under ZeRO-3, seen in bitsandbytes itself."""
    import torch
    from bitsandbytes.nn.modules import Linear8bitLt

    kind: Any = Linear8bitLt
    layer = kind(64, 32, bias=False, has_fp16_weights=False).to("cpu")
    layer(torch.ones(1, 64, dtype=torch.float16))
    layer.weight.data = torch.empty(0, dtype=torch.int8)  # what DeepSpeed's free_param does
    assert layer.state.CB.numel() == 64 * 32


def test_accelerate_puts_cpu_adam_in_place_of_any_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for refusing offload with another optimiser."""
    import deepspeed.ops.adam
    import torch
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    class Adam:
        def __init__(self, groups: Any, **options: Any) -> None:
            self.options = options

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", Adam)  # the real one is compiled first
    assert type(map_pytorch_optim_to_deepspeed(torch.optim.SGD([torch.zeros(1)], lr=0.1))) is Adam


def test_torch_refuses_to_unscale_fp16_gradients() -> None:
    """The reason for refusing fp16 without masters."""
    import torch

    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    scaler: Any = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum().float()).backward()
    with pytest.raises(ValueError, match="unscale FP16"):
        scaler.unscale_(torch.optim.SGD([weight], lr=0.1))
