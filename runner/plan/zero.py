"""DeepSpeed ZeRO: bytes per GPU by stage, from the JSON of zero_config.py.

Sources are files of DeepSpeed 0.19.8 under `deepspeed/`, unless another library is named. Checked
against the tensors two real ranks hold: `tests/plan/test_zero.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from runner.plan.zero_config import Offload, Precision, ResolvedConfig, Zero, offload_of, offloads

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
    the largest trained parameter (`temp_grad_buffer_for_gpu_offload`)."""
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


def padded(sizes: Iterable[int], world: int) -> int:
    """Elements with every parameter padded to a multiple of `world`, as ZeRO-3 shards them (`_aligned_size`)."""
    return sum(-(-size // world) * world for size in sizes)


def terms(
    world: int,
    *,
    trainable: int,
    frozen: int,
    frozen_bytes: float,
    largest_layer_parameters: int,
    optimizer_bytes: float,
    config: ResolvedConfig,
    precision: Precision,
    largest_trained: int | None = None,
    persistent: int = 0,
) -> Terms:
    """Bytes on one GPU by term; `config` is what `resolved_config` returned.

    `largest_layer_parameters` is the largest single parameter, `largest_trained` the largest that
    trains (default: the same without frozen ones, else 0: adapters fit the bucket), `persistent` the
    elements in parameters below ZeRO-3's persistence threshold.
    Exact to the byte for ZeRO-3 where `trainable` and `frozen` come from `padded`.
    Quantised frozen weights: `frozen_bytes` is what stands in parameters; bitsandbytes' quantisation
    constants are no parameters and ZeRO-3 does not shard them.
    """
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
    if offloads(zero, "offload_optimizer"):
        host = _host_1_and_2(run, offload_of(zero, "offload_optimizer"), own, accumulates)
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
    if not offloads(zero, "offload_param"):
        weights += part + run.frozen_bytes / run.world
    host = _host_3(run, zero, own)
    if offloads(zero, "offload_optimizer"):
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
    alone = run.world == 1 and not offloads(zero, "offload_param")
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
    (`max_in_cpu`) for parameters (swap_tensor/partitioned_param_swapper.py); defaults of zero/offload_config.py. They
    are locked whatever `pin_memory`, by page and not by power of two (ops/csrc/pin_memory/page_alloc.cpp).
    """
    width, host = run.width, 0.0
    if offloads(zero, "offload_optimizer"):
        offload = offload_of(zero, "offload_optimizer")
        host += _pinned(own * width, offload)
        if offload.get("device") == "nvme":
            group = min(own, zero.get("sub_group_size", SUB_GROUP_SIZE))
            host += offload.get("buffer_count", 4) * group * FP32
        else:
            host += own * FP32 + _pinned(own * FP32, offload) + own * run.optimizer_bytes
    if offloads(zero, "offload_param"):
        offload = offload_of(zero, "offload_param")
        if offload.get("device") == "nvme":
            buffers = offload.get("buffer_count", 5) * offload.get("buffer_size", 100_000_000)
            host += buffers * width
            host += _pinned(min(own, offload.get("max_in_cpu", 1_000_000_000)) * width, {})
        else:
            # Trained ones are page-locked whatever `pin_memory` (`_create_param_groups_fp16_flat_cpu_memory`).
            host += _pinned(own * width, {}) + run.frozen_bytes / run.world
    return host
