"""The DeepSpeed JSON with no "auto" left, and the combinations that DeepSpeed cannot train.

Sources are files of DeepSpeed 0.19.8 under `deepspeed/`, unless another library is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict, cast

from runner.errors import Problem, RequestError

Precision = Literal["bf16", "fp16", "fp32"]


class Offload(TypedDict, total=False):
    """`offload_optimizer` or `offload_param`; DeepSpeed's defaults are in zero/offload_config.py."""

    device: str
    nvme_path: str
    pin_memory: bool
    buffer_count: int
    buffer_size: int
    max_in_cpu: int


OffloadPart = Literal["offload_optimizer", "offload_param"]
OFFLOADS: tuple[OffloadPart, ...] = ("offload_optimizer", "offload_param")


class _Stage(TypedDict):
    stage: int


class Zero(_Stage, total=False):
    """`zero_optimization` of a resolved JSON: the keys that decide sizes."""

    reduce_bucket_size: int
    overlap_comm: bool
    sub_group_size: int
    stage3_max_reuse_distance: int
    stage3_max_live_parameters: int
    stage3_prefetch_bucket_size: int
    offload_optimizer: Offload | None
    offload_param: Offload | None


class _Sharded(TypedDict):
    zero_optimization: Zero


class ResolvedConfig(_Sharded, total=False):
    """A DeepSpeed JSON without "auto": the keys that the plan reads."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    gradient_clipping: float


def resolved_config(
    template: Mapping[str, object],
    *,
    micro_batch: int,
    accumulation: int,
    world: int,
    hidden_size: int,
    precision: Precision,
    max_grad_norm: float,
    nvme_path: str | None = None,
) -> ResolvedConfig:
    """The template with every "auto" filled in as transformers 5.23 does (integrations/deepspeed.py).

    `nvme_path` moves what the template offloads from main memory to that folder.
    Raises RequestError for an "auto" that the plan does not decide, and for NVMe without ZeRO-3 offload.
    """
    known: dict[str, object] = {
        "train_batch_size": micro_batch * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
    }
    unknown: list[str] = []
    config = cast("ResolvedConfig", _filled(template, known, "", unknown))
    if unknown:
        raise RequestError(
            *(Problem(f'"{key}" is "auto" in the DeepSpeed JSON', None, "write a value") for key in unknown)
        )
    if nvme_path is not None:
        _to_nvme(config["zero_optimization"], nvme_path)
    return config


def _filled(
    part: Mapping[str, object], known: Mapping[str, object], prefix: str, unknown: list[str]
) -> dict[str, object]:
    """A copy of one level of the JSON, without "auto"; keys that nothing fills go to `unknown`."""
    result: dict[str, object] = {}
    for key, value in part.items():
        name = prefix + key
        if isinstance(value, Mapping):
            value = _filled(value, known, name + ".", unknown)
        elif value == "auto":
            if name not in known:
                unknown.append(name)
            value = known.get(name)
        result[key] = value
    return result


def _to_nvme(zero: Zero, path: str) -> None:
    """Move the offload devices to NVMe. ZeRO-1/2 would take it for main memory without a word (`cpu_offload`)."""
    parts = [part for part in OFFLOADS if offloads(zero, part)]
    if zero["stage"] != 3 or not parts:
        remedy = "write deepspeed=zero3_offload"
        raise RequestError(Problem("offloading to NVMe needs ZeRO-3 with offload", None, remedy))
    for part in parts:
        zero[part] = {**offload_of(zero, part), "device": "nvme", "nvme_path": path}


def offload_of(zero: Zero, part: OffloadPart) -> Offload:
    """The block, empty where nothing is offloaded."""
    return zero.get(part) or {}


def offloads(zero: Zero, part: OffloadPart) -> bool:
    """Something is offloaded."""
    return offload_of(zero, part).get("device", "none") != "none"


def refusal(stage: str, method_name: str, optimizer: str, precision: str, master_weights: bool) -> Problem | None:
    """Return why a combination cannot work, with its remedy; None if it can."""
    if stage.startswith("zero3") and method_name == "qlora8":
        # Int8Params.CB and Linear8bitLt.state.CB (bitsandbytes 0.50 nn/modules.py) keep the storage that
        # DeepSpeed means to free when it sets `param.data` (`free_param`, zero/partition_parameters.py).
        return Problem(
            f"deepspeed={stage} cannot shard an 8-bit base: bitsandbytes keeps every int8 matrix whole beside it",
            None,
            "write deepspeed=zero2, which takes as much memory, or method=qlora4, which ZeRO-3 shards",
        )
    if stage.startswith("zero3") and method_name == "peft":
        # peft 0.21: LoHa and LoKr give their update the shape of the base's weight, which is [0] once it is sharded
        # (`weight.reshape(base_layer.weight.shape)`); the other types have not been tried.
        return Problem(
            f"deepspeed={stage} shards the base, whose shape PEFT's other adapters than LoRA need whole",
            None,
            "write deepspeed=zero2, or method=lora",
        )
    if stage != "none" and optimizer == "adafactor":
        # transformers 5.23 optimization.py: it factors matrices only, and clips by the RMS of every tensor; ZeRO hands
        # it flat parts. The fourth step's loss was 1.6% off the one without ZeRO, and 0.4% off between one process and
        # two of ZeRO-3, where AdamW's agree to 1e-7 (benchmarks/matrix.py, without this refusal).
        return Problem(
            f"deepspeed={stage} hands Adafactor flat parts of the weights: it would keep a whole second moment, and "
            "take other steps with every number of processes",
            None,
            "write train.optimizer=adamw, or deepspeed=none",
        )
    if stage != "none" and optimizer == "muon":
        # deepspeed 0.19.8 has a Muon of its own (runtime/zero/muon), built from a block of its JSON alone. It scales
        # updates by max(1, rows/columns)^½ (`_aspect_ratio_scale`), which AdamW's learning rates do not fit.
        return Problem(
            f"deepspeed={stage} hands the optimiser flat parts of the weights, and Muon orthogonalises whole matrices",
            None,
            "write deepspeed=none, or train.optimizer=adamw",
        )
    if stage.endswith("_offload") and optimizer != "adamw":
        # The states are in main memory, where bitsandbytes' optimisers do not run; of torch's only AdamW has a fused
        # kernel there. A user's JSON without zero_force_ds_cpu_optimizer=false gets DeepSpeedCPUAdam, an AdamW as well.
        return Problem(
            f"deepspeed={stage} runs AdamW on the CPU, not train.optimizer={optimizer}",
            None,
            f"write train.optimizer=adamw, or deepspeed={stage.removesuffix('_offload')}",
        )
    if precision == "fp16" and method_name in ("full", "freeze") and not master_weights:
        # torch 2.13 amp/grad_scaler.py: "Attempting to unscale FP16 gradients."; DeepSpeed,
        # runtime/base_optimizer.py `_configure_master_weights`: fp16 masters only with offload to DeepSpeedCPUAdam.
        who = (
            "torch's loss scaler refuses fp16 gradients"
            if stage == "none"
            else "DeepSpeed keeps fp32 copies under fp16"
        )
        return Problem(
            f"method.master_weights=false cannot train in fp16: {who}",
            None,
            "write method.master_weights=true, or train.precision=bf16",
        )
    return None
