"""DeepSpeed ZeRO: bytes per GPU by stage, and the JSON with no "auto" left.

Sources are files of DeepSpeed 0.19.8 under `deepspeed/`, unless another library is named. Checked
against the tensors two real ranks hold: `tests/plan/test_zero.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict, cast

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


FP32 = 4
"""Bytes of a master weight, and of a gradient in the step: `_configure_master_weights`, runtime/base_optimizer.py."""
PARTITION_ALIGNMENT = 2
"""Flat buffers end on a multiple of this × world elements: `nccl_start_alignment_factor`, zero/stage_1_and_2.py."""
SUB_GROUP_SIZE = 1_000_000_000
"""Elements ZeRO-3 updates at once: default of `sub_group_size`, zero/config.py."""
LIVE_PARAMETERS = 1_000_000_000
"""Elements ZeRO-3 may hold gathered: default of `stage3_max_live_parameters`, zero/config.py."""
REDUCE_BUCKET = 500_000_000
"""Default of `reduce_bucket_size`, zero/config.py."""
REUSE_DISTANCE = 1_000_000_000
"""Default of `stage3_max_reuse_distance`, zero/config.py."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Bytes on one GPU (`host`: in main memory, for one process).

    Backward holds weights + master + optimizer + gathered + gradients + buckets; the optimiser step
    holds weights + master + optimizer + kept_gradients + step. The collectives' own buffers (NCCL)
    and activations are not here.
    """

    weights: float
    """As held between steps. ZeRO-1/2: trained ones flattened and padded, frozen ones as they are
    (`flatten_dense_tensors_aligned`, zero/stage_1_and_2.py). ZeRO-3: all of them / world, plus whole
    the few below `stage3_param_persistence_threshold`, if told (`_partition_param`,
    zero/partition_parameters.py; `mark_persistent_parameters`, zero/parameter_offload.py)."""
    gradients: float
    """At the end of backward, at its peak. ZeRO-1: all of them until they are reduced, and this rank's
    part (`reduce_gradients`). ZeRO-2: this rank's part, twice with accumulation, when the new part
    stands beside the accumulated one (`copy_grads_in_partition`); a parameter that two ranks share is
    whole on both, which is left out. ZeRO-3: this rank's part, allocated once
    (`grad_partitions_flat_buffer`, zero/stage3.py). ZeRO-2/3 also: the largest trained matrix's, which
    is beyond the bucket and waits for its reduction (`extra_large_param_to_reduce`)."""
    kept_gradients: float
    """Part of `gradients` still there in the optimiser step: trained / world (`averaged_gradients`)."""
    master: float
    """fp32 copies of this rank's part: 4 × trained / world (`single_partition_of_fp32_groups`;
    `_create_fp32_partitions`, zero/stage3.py). In fp32 too: ZeRO-3 means to share the storage
    then, but compares a device with a string."""
    optimizer: float
    """`optimizer_bytes` × trained / world: the optimiser sees one flat tensor per parameter group."""
    buckets: float
    """`reduce_bucket_size` elements; two buckets with overlap_comm in ZeRO-1/2 (`setup_buckets`), one in
    ZeRO-3 (`_setup_for_real_optimizer`). The all-gather after the step writes into the weights and needs
    none, whatever `allgather_bucket_size` (`all_gather_dp_groups`, runtime/utils.py). Offload in ZeRO-1/2 adds
    the largest trained parameter (`temp_grad_buffer_for_gpu_offload`). Without ZeRO, DDP's copy of
    the gradients: accelerate 1.15 leaves `gradient_as_bucket_view` off (accelerate/utils/dataclasses.py)."""
    step: float
    """Beyond `kept_gradients`: this rank's gradients flattened, and those again in fp32 (`step`,
    zero/stage_1_and_2.py); ZeRO-3 takes them by sub-groups (`_prepare_fp32_grad_for_sub_group`) and
    keeps its bucket allocated."""
    gathered: float
    """ZeRO-3: parameters whole at once. Every module's hook prefetches, also that of one without
    parameters, so the look-ahead grows until `stage3_max_live_parameters`; one more parameter may cross that line
    (`_fetch_sub_module_impl`, zero/partitioned_param_coordinator.py). Several parameters gathered in
    one call are copied out of a flat buffer: one prefetch bucket more (`_all_gather_dtype`)."""
    host: float
    """Main memory of one process for what is offloaded; page-locked tensors rounded to a power of two."""


class _Run(NamedTuple):
    """What the stages' arithmetic reads of `terms`' arguments; `width` is the bytes of a value in training."""

    world: int
    width: int
    trainable: int
    frozen_bytes: float
    optimizer_bytes: float
    largest_trained: int
    waiting: int  # elements of a gradient beyond the bucket, which waits for its reduction
    persistent: int


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
    parts = [part for part in OFFLOADS if _offloads(zero, part)]
    if zero["stage"] != 3 or not parts:
        remedy = "write deepspeed=zero3_offload"
        raise RequestError(Problem("offloading to NVMe needs ZeRO-3 with offload", None, remedy))
    for part in parts:
        zero[part] = {**_offload(zero, part), "device": "nvme", "nvme_path": path}


def _offload(zero: Zero, part: OffloadPart) -> Offload:
    """The block, empty where nothing is offloaded."""
    return zero.get(part) or {}


def _offloads(zero: Zero, part: OffloadPart) -> bool:
    return _offload(zero, part).get("device", "none") != "none"


def padded(sizes: Iterable[int], world: int) -> int:
    """Elements with every parameter padded to a multiple of `world`, as ZeRO-3 shards them (`_aligned_size`)."""
    return sum(-(-size // world) * world for size in sizes)


def terms(
    stage: str,
    world: int,
    *,
    trainable: int,
    frozen: int,
    frozen_bytes: float,
    largest_layer_parameters: int,
    optimizer_bytes: float,
    config: ResolvedConfig | None,
    precision: Precision,
    largest_trained: int | None = None,
    persistent: int = 0,
    trained_bytes: float = FP32,
) -> Terms:
    """Bytes on one GPU by term; `config` is what `resolved_config` returned (None for stage "none").

    `largest_layer_parameters` is the largest single parameter, `largest_trained` the largest that
    trains (default: the same without frozen ones, else 0: adapters fit the bucket), `persistent` the
    elements in parameters below ZeRO-3's persistence threshold, `trained_bytes` those of one trained
    value as DDP sees it.
    Exact to the byte for ZeRO-3 where `trainable` and `frozen` come from `padded`.
    Quantised frozen weights: `frozen_bytes` is what stands in parameters; bitsandbytes' quantisation
    constants are no parameters and ZeRO-3 does not shard them.
    """
    if stage == "none":
        bucket = trainable * trained_bytes if world > 1 else 0.0
        return Terms(0.0, 0.0, 0.0, 0.0, 0.0, bucket, 0.0, 0.0, 0.0)
    assert config is not None  # of every stage but "none"
    zero = config["zero_optimization"]
    width = 4 if precision == "fp32" else 2
    if largest_trained is None:
        largest_trained = 0 if frozen else largest_layer_parameters
    waiting = largest_trained if largest_trained > zero.get("reduce_bucket_size", REDUCE_BUCKET) else 0
    run = _Run(world, width, trainable, frozen_bytes, optimizer_bytes, largest_trained, waiting, persistent)
    if zero["stage"] < 3:
        return _stage_1_and_2(run, zero, config.get("gradient_accumulation_steps", 1) > 1)
    return _stage_3(run, zero, _gathered(run, zero, frozen, largest_layer_parameters))


def _stage_1_and_2(run: _Run, zero: Zero, accumulates: bool) -> Terms:
    """Stages 1 and 2: the constructor, `setup_buckets` and `step` of zero/stage_1_and_2.py, in this order."""
    width, align = run.width, PARTITION_ALIGNMENT * run.world
    whole = -(-run.trainable // align) * align
    own = whole // run.world
    weights = whole * width + run.frozen_bytes
    buckets = zero.get("reduce_bucket_size", REDUCE_BUCKET) * width * (2 if zero.get("overlap_comm") else 1)
    held = run.trainable if zero["stage"] == 1 else run.waiting
    if _offloads(zero, "offload_optimizer"):
        host = _host_1_and_2(run, _offload(zero, "offload_optimizer"), own, accumulates)
        buckets += run.largest_trained * width
        return Terms(weights, held * width, 0.0, 0.0, 0.0, buckets, 0.0, 0.0, host)
    part = own * width
    twice = accumulates and zero["stage"] == 2
    gradients = held * width + (2 * part if twice else part)
    step = part + (own * FP32 if width < FP32 else 0)
    return Terms(weights, gradients, part, own * FP32, own * run.optimizer_bytes, buckets, step, 0.0, 0.0)


def _stage_3(run: _Run, zero: Zero, live: float) -> Terms:
    """Stage 3: `_create_fp32_partitions`, `_setup_for_real_optimizer` and `step` of zero/stage3.py."""
    width, own = run.width, -(-run.trainable // run.world)
    part, waiting = own * width, run.waiting * width
    bucket = zero.get("reduce_bucket_size", REDUCE_BUCKET) * width
    weights = float(run.persistent * width)
    if not _offloads(zero, "offload_param"):
        weights += part + run.frozen_bytes / run.world
    host = _host_3(run, zero, own)
    if _offloads(zero, "offload_optimizer"):
        return Terms(weights, waiting, 0.0, 0.0, 0.0, bucket, bucket, live, host)
    master = own * FP32
    group = min(own, zero.get("sub_group_size", SUB_GROUP_SIZE))
    step = bucket + group * (width + (FP32 if width < FP32 else 0))
    return Terms(weights, part + waiting, part, master, own * run.optimizer_bytes, bucket, step, live, host)


def _gathered(run: _Run, zero: Zero, frozen: int, largest: int) -> float:
    """Bytes of parameters whole at once; persistent ones are in `weights` already.

    DeepSpeed counts elements of storage: of a quantised weight, the bytes it is packed into.
    """
    elements = run.trainable - run.persistent + min(frozen, run.frozen_bytes)
    alone = run.world == 1 and not _offloads(zero, "offload_param")
    if elements <= 0 or alone:  # alone, a gathered parameter is a view of its part (`_no_gather_coalesced`)
        return 0.0
    size = (run.trainable - run.persistent) * run.width + run.frozen_bytes
    # A parameter is kept from forward to backward where less than the reuse distance lies between the two uses,
    # that is, twice what comes after it: the last half distance of the model at most.
    kept = zero.get("stage3_max_reuse_distance", REUSE_DISTANCE) // 2
    limit = max(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS), kept) + largest
    copied = min(zero.get("stage3_prefetch_bucket_size", 0), elements)
    return float((min(elements, limit) + copied) * (size / elements))


def _pinned(size: float, offload: Offload) -> float:
    """Bytes of a page-locked tensor: torch 2.13 rounds to a power of two (ATen/core/CachingHostAllocator.h)."""
    if size <= 0 or not offload.get("pin_memory", True):  # DeepSpeed's default is to pin: zero/offload_config.py
        return size
    return float(1 << (int(size) - 1).bit_length())


def _host_1_and_2(run: _Run, offload: Offload, own: int, accumulates: bool) -> float:
    """fp32 weights, their gradients, 16-bit copies to send back, one parameter's gradient, Adam's states.

    With accumulation the gradients wait in 16 bits too (`async_accumulate_grad_in_cpu_via_gpu`).
    """
    width = run.width
    buffers = (
        2 * _pinned(own * FP32, offload) + _pinned(own * width, offload) + _pinned(run.largest_trained * width, offload)
    )
    return buffers + own * run.optimizer_bytes + (own * width if accumulates else 0)


def _host_3(run: _Run, zero: Zero, own: int) -> float:
    """`_create_fp32_partitions`, `initialize_optimizer_states` and `grad_partitions_flat_buffer` of zero/stage3.py.

    On NVMe stay the swap buffers: `buffer_count` (4) × the largest sub-group in fp32 for the optimiser
    (`OptimizerSwapper`, swap_tensor/optimizer_utils.py), 5 × 1e8 elements and the first 1e9 trained ones
    (`max_in_cpu`) for parameters (swap_tensor/partitioned_param_swapper.py); defaults of zero/offload_config.py.
    """
    width, host = run.width, 0.0
    if _offloads(zero, "offload_optimizer"):
        offload = _offload(zero, "offload_optimizer")
        host += _pinned(own * width, offload)
        if offload.get("device") == "nvme":
            group = min(own, zero.get("sub_group_size", SUB_GROUP_SIZE))
            host += offload.get("buffer_count", 4) * group * FP32
        else:
            host += own * FP32 + _pinned(own * FP32, offload) + own * run.optimizer_bytes
    if _offloads(zero, "offload_param"):
        offload = _offload(zero, "offload_param")
        if offload.get("device") == "nvme":
            buffers = offload.get("buffer_count", 5) * offload.get("buffer_size", 100_000_000)
            host += _pinned(buffers * width, offload)
            host += _pinned(min(own, offload.get("max_in_cpu", 1_000_000_000)) * width, {})
        else:
            # Trained ones are page-locked whatever `pin_memory` (`_create_param_groups_fp16_flat_cpu_memory`).
            host += _pinned(own * width, {}) + run.frozen_bytes / run.world
    return host


def refusal(stage: str, method_name: str, optimizer: str, precision: str, master_weights: bool) -> Problem | None:
    """What cannot work, with its remedy; None where nothing stands against the combination."""
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
