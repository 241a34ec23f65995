"""Time of one optimiser step: arithmetic, memory traffic and communication.

What does not depend on the micro batch is made once (`work_of`, `machine_of`); `step_time` is then a few
multiplications. It is an estimate: of the 44 published measurements in tests/plan/test_step_time.py (LoRA and 4-bit
LoRA of 1.8B to 14B on one A100, a 7B under ZeRO on eight), to some of which it was fitted, the furthest is a quarter
off; where a note says "assumption", nobody has published one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from runner.plan.hardware_speed import (
    ADAPTERS,
    CPU_ADAM_S_PER_PARAMETER,
    CPU_PASS_S,
    CPU_PASS_WITHOUT_ADAPTER_S,
    HIDDEN_SHARE,
    INT8_SLOWDOWN,
    PASS_S,
    PASS_WITHOUT_ADAPTER_S,
    STREAM_SHARE,
    UNPACK_BYTES,
    UNPACK_SHARE,
    UPDATE_BYTES,
    Machine,
    efficiency,
    machine_of,
)
from runner.plan.model_shape import Shape, mixing_flops

__all__ = ["Machine", "StepTime", "Work", "evaluation_time", "flops_per_token", "machine_of", "step_time", "work_of"]

Stage = Literal["none", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


@lru_cache(maxsize=4096)
def flops_per_token(
    shape: Shape,
    seq: int,
    *,
    method: str,
    trained_layers: int,
    checkpointing: int,
    adapter_parameters: int = 0,
    backward_layers: int | None = None,
    quiet: int = 0,
    span: float | None = None,
) -> float:
    """Floating-point operations that the hardware executes for one token of a training step.

    A matrix of W weights costs 2·W forward, 2·W for the gradient of its input and 2·W for its own (Kaplan et al.
    2020, arXiv 2001.08361, table 1). So: the whole model forward; gradients of inputs in the `backward_layers`
    top ones, which the loss flows through (default: `trained_layers`, as if the trained ones were the last);
    gradients of weights where they train. Every `checkpointing`-th of those layers (0: none) runs forward once more,
    the head does not (Korthikanti et al. 2022, arXiv 2205.05198, appendix A). A mixture counts the experts a token is
    routed to.

    Attention adds 2·(s/2)·d for scores and as much for values, per token and layer (PaLM, arXiv 2204.02311,
    appendix B, halved: a causal kernel skips the masked half), twice that backward. `span` takes the place of s where
    it is another: the mean length of a packed document for a kernel without a mask, or twice the row for one with a
    mask, which computes all pairs of tokens and skips nothing.

    `quiet`: forward passes beside it of which nothing is kept (a reference model's).
    """
    layers = shape.num_layers
    reached = _reached(layers, method, trained_layers, backward_layers)
    all_active = sum(
        m.weights * _active_share(shape, m.count) * n
        for kind, n in Counter(shape.layers).items()
        for m in kind.matrices
    )
    active = all_active / layers
    head = (shape.head_outputs or shape.vocab_size) * shape.hidden_size
    span = seq if span is None else span
    # of attention 2 products × 2 operations × s/2 × d
    attention = sum(mixing_flops(shape, kind, span) * n for kind, n in Counter(shape.layers).items()) / layers
    per_layer = 2 * active + attention
    total = (1 + quiet) * (layers * per_layer + 2 * head)
    total += reached * (2 * active + 2 * attention) + 2 * head
    again = _recomputed(layers, reached, checkpointing)
    total += again * per_layer
    if method == "full":
        total += layers * 2 * active + 2 * head
    elif method in ADAPTERS:
        total += (6 + 2 * (again / reached if reached else 0)) * adapter_parameters
    else:
        total += min(layers, trained_layers) * 2 * active
    return float(total)


def _reached(layers: int, method: str, trained: int, backward: int | None) -> int:
    """Layers that the backward pass runs through."""
    return layers if method == "full" else min(layers, trained if backward is None else backward)


def _recomputed(layers: int, reached: int, every: int) -> int:
    """How many of the `reached` last layers are computed again: every `every`-th of all, from the first."""
    return math.ceil(layers / every) - math.ceil((layers - reached) / every) if every else 0


def _active_share(shape: Shape, count: int) -> float:
    experts = shape.num_experts
    return shape.experts_per_token / experts if experts and count % experts == 0 else 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """Operations and traffic of a run, independent of micro batch and hardware."""

    method: str
    flops_per_token: float
    seq: int
    """Tokens in a sequence."""
    passes: float
    """Passes over all layers in a micro batch: forward 1, backward 2, recomputation 1, where they are reached."""
    num_layers: int
    unpacked_weights: float
    """4-bit weights, and quantised experts, unpacked in a micro batch, each time counted."""
    trained_parameters: int
    weight_bytes: float
    """Bytes of all weights as stored: what ZeRO-3 gathers."""
    gradient_bytes: int
    """Bytes of one gradient as sent."""
    update_flops: float = 0.0
    """Operations of the update itself: Muon's."""


def work_of(
    shape: Shape,
    seq: int,
    *,
    method: str,
    trained_layers: int,
    checkpointing: int,
    trained_parameters: int,
    adapter_parameters: int = 0,
    backward_layers: int | None = None,
    weight_bytes: float | None = None,
    gradient_bytes: int = 2,
    quiet: int = 0,
    span: float | None = None,
    update_flops: float = 0.0,
) -> Work:
    """The work of a run; `weight_bytes` is 2 per parameter unless given, `quiet`, `span` as in `flops_per_token`."""
    layers = shape.num_layers
    reached = _reached(layers, method, trained_layers, backward_layers)
    share, again = reached / layers, _recomputed(layers, reached, checkpointing) / layers
    flops = flops_per_token(
        shape,
        seq,
        method=method,
        trained_layers=trained_layers,
        checkpointing=checkpointing,
        adapter_parameters=adapter_parameters,
        backward_layers=backward_layers,
        quiet=quiet,
        span=span,
    )
    unpacks = {"qlora4": ("linear", "fused"), "qlora8": ("fused",)}.get(method, ())  # int8 layers multiply in int8
    packed = shape.over_layers(
        lambda layer: sum(m.weights for m in layer.matrices if any(getattr(m, k) for k in unpacks))
    )
    unpacked = packed * (1 + quiet + share + again)  # forward, backward, recomputation
    stored = 2.0 * shape.num_parameters if weight_bytes is None else weight_bytes
    passes = 1 + quiet + 2 * share + again
    sizes = trained_parameters, stored, gradient_bytes
    return Work(method, flops, seq, passes, layers, unpacked, *sizes, update_flops)


def orthogonalisation_flops(matrices: Iterable[tuple[int, int, int]]) -> float:
    """Operations of Muon for matrices of m rows and n columns (m the shorter side), so many of each: five iterations of
    X·Xᵀ (2·m²·n), its square (2·m³) and the product with X (2·m²·n), as in torch 2.13, optim/_muon.py."""
    total = 0.0
    for rows, columns, count in matrices:
        m, n = sorted((rows, columns))
        total += count * 5 * (4.0 * m * m * n + 2.0 * m**3)
    return total


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimiser step, on every process alike."""

    compute_s: float
    communication_s: float
    """What computing does not hide."""
    update_s: float
    total_s: float
    efficiency: float
    """Share of the peak that the computing part reaches; 1 on a CPU, whose speed is a measured one."""
    notes: tuple[str, ...]


def step_time(
    work: Work,
    machine: Machine,
    *,
    micro_batch: int,
    accumulation: int,
    stage: Stage = "none",
    optimizer: str = "adamw",
) -> StepTime:
    """Time of `accumulation` micro batches of `micro_batch` sequences per process, and of the update."""
    flops = work.flops_per_token * micro_batch * work.seq
    source: tuple[str, ...] = ()
    if machine.on_gpu:
        share, said = efficiency(work.method, machine.capability, machine.tflops, machine.bandwidth)
        arithmetic = flops / (machine.flops * share) * (INT8_SLOWDOWN if work.method == "qlora8" else 1)
        launches = work.num_layers * work.passes * PASS_S.get(work.method, PASS_WITHOUT_ADAPTER_S)
        # The processor launches while the GPU computes, and each waits for the other now and then: hypot lies
        # 17% above Qwen-7B's 256 and 512 tokens and 2% below 1024; the larger of the two alone lies 15% below.
        one = math.hypot(arithmetic, launches)
        one += work.unpacked_weights * UNPACK_BYTES / (machine.bandwidth / STREAM_SHARE * UNPACK_SHARE)
        source = (f"speed: {said}",)
    else:
        one = flops / machine.flops
    compute = accumulation * one
    sent = _exposed(work, machine, accumulation, stage, compute)
    update = _update(work, machine, stage, optimizer)
    reached = accumulation * flops / (machine.flops * compute) if compute else 0.0
    return StepTime(compute, sent, update, compute + sent + update, reached, machine.notes + source)


def _exposed(work: Work, machine: Machine, accumulation: int, stage: Stage, compute_s: float) -> float:
    """Seconds of sending that computing does not hide (volumes: ZeRO, arXiv 1910.02054, section 7).

    Per step and process, (N−1)/N of: DDP reduces gradients with the last micro batch, 2 × their bytes (reduce-scatter
    and all-gather); ZeRO-1 reduces them then too, and gathers the updated weights; ZeRO-2 reduces in every micro
    batch; ZeRO-3 also gathers all weights for forward and for backward in every micro batch, frozen ones included,
    which makes 1.5 times the volume. Offload adds what goes to main memory and back: gradients each micro batch,
    updated weights each step, with ZeRO-3 the weights for each pass. Gathering after the update hides behind nothing.
    """
    world = machine.world_size
    kept = (world - 1) / world
    gradients, weights = work.gradient_bytes * work.trained_parameters, 2 * work.trained_parameters
    hidden = to_host = after = 0.0
    if stage == "none":
        hidden = 2 * gradients * kept
    elif stage == "zero1":
        hidden, after = gradients * kept, weights * kept / machine.link
    elif stage.startswith("zero2"):
        hidden, after = accumulation * gradients * kept, weights * kept / machine.link
    else:
        hidden = accumulation * (2 * work.weight_bytes + gradients) * kept
    if stage.endswith("offload"):
        to_host = accumulation * gradients / world
        after += weights / world / machine.host_link
        if stage == "zero3_offload":
            to_host += accumulation * 2 * work.weight_bytes / world
    during = hidden / machine.link + to_host / machine.host_link
    return after + max(0.0, during - HIDDEN_SHARE * compute_s)


def _update(work: Work, machine: Machine, stage: Stage, optimizer: str) -> float:
    """Seconds of the optimiser: memory-bound, so bytes over bandwidth; or DeepSpeed's Adam on the CPU."""
    if stage.endswith("offload"):
        return work.trained_parameters / machine.num_nodes * CPU_ADAM_S_PER_PARAMETER
    share = 1 if stage == "none" else machine.world_size
    moved = work.trained_parameters / share * UPDATE_BYTES[optimizer] / machine.bandwidth
    reached = efficiency(work.method, machine.capability, machine.tflops, machine.bandwidth)[0] if machine.on_gpu else 1
    return moved + (work.update_flops / (machine.flops * reached) if optimizer == "muon" else 0.0)


def evaluation_time(
    work: Work,
    machine: Machine,
    *,
    tokens: float,
    num_prompts: int,
    prompt_tokens: float,
    new_tokens: int,
    batch_size: int,
    stage: Stage = "none",
) -> float:
    """Seconds of one measurement: the loss of all held-out `tokens`, and `num_prompts` answers of `new_tokens`.

    Processes share both. Forward is a third of a full step's operations and at most half of a LoRA's: half is taken,
    for the loss and for reading prompts of `prompt_tokens`. Then all answers of a batch grow by one token at a time.
    """
    share = efficiency(work.method, machine.capability, machine.tflops, machine.bandwidth)[0] if machine.on_gpu else 1
    one_position = work.flops_per_token / 2 / (machine.flops * share)
    asked = math.ceil(num_prompts / machine.world_size)
    batches = math.ceil(asked / batch_size)
    decoding = batches * new_tokens * _token_time(work, machine, min(asked, batch_size) * one_position, stage)
    return (tokens / machine.world_size + asked * prompt_tokens) * one_position + decoding


def _token_time(work: Work, machine: Machine, arithmetic_s: float, stage: Stage) -> float:
    """Seconds in which every answer of a batch grows by one token.

    All weights are read once, and every layer is one pass. A GPU reads while the processor launches; on a CPU the same
    cores do both, one after the other, and `arithmetic_s` beside the reading. ZeRO-3 gathers all weights every time.
    """
    read = work.weight_bytes / machine.bandwidth
    if not machine.on_gpu:
        return work.num_layers * CPU_PASS_S.get(work.method, CPU_PASS_WITHOUT_ADAPTER_S) + max(read, arithmetic_s)
    world = machine.world_size
    gathered = work.weight_bytes * (world - 1) / world / machine.link if stage.startswith("zero3") else 0.0
    return max(work.num_layers * PASS_S.get(work.method, PASS_WITHOUT_ADAPTER_S), read) + gathered
