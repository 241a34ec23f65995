"""Main memory of one node: what a run needs there, and whether the node has as much."""

from __future__ import annotations

from collections.abc import Mapping

from runner.plan import host_memory
from runner.plan.choose_stage import StageChoice
from runner.plan.memory import FREE_SHARE, GIB, states_per_value
from runner.plan.trainable import Training, saved_projections
from runner.spec import RunSpec


def weight_bytes(spec: RunSpec, training: Training) -> host_memory.WeightBytes:
    """The weights and optimiser states of a run, as main memory and disk count them."""
    return host_memory.WeightBytes(
        method_name=training.method,
        parameters=training.shape.num_parameters,
        trainable=training.trainable,
        bytes_trained=training.adapter_width if training.adapter else training.trained_width,
        bytes_16=training.width,
        bytes_optimizer=states_per_value(training, spec.train.optimizer),
        projections=saved_projections(training),
    )


def stage_number(stage: str) -> int:
    """ZeRO's number of a stage; 0 without ZeRO."""
    return int(stage[4]) if stage.startswith("zero") else 0


def terms(spec: RunSpec, training: Training, option: StageChoice, data_tokens: int = 0) -> dict[str, float]:
    """Bytes at the peak by term; their sum is the peak. `data_tokens` are those that every process tokenises itself."""
    on_gpu = spec.hw.accelerator == "cuda"
    per_node = spec.hw.processes_per_node
    ram = host_memory.host_ram(
        weight_bytes(spec, training),
        stage_number(option.stage),
        processes=per_node,
        accelerator="cuda" if on_gpu else "cpu",
        held=training.frozen_bytes + training.trained_bytes,
        largest_matrix=training.largest_matrix,
        data_tokens=0 if spec.objective.name == "pretrain" else data_tokens,  # text is tokenised as a stream
        training=0.0 if on_gpu else option.memory.expected - host_memory.CPU_PROCESS,
    )
    if option.memory.host:
        ram["offloaded"] = ram.get("offloaded", 0.0) + per_node * option.memory.host
    return ram


def there(spec: RunSpec) -> float | None:
    """GiB that one node has (a rented one at least); None where nobody says."""
    return spec.hw.main_memory_gib(rented=spec.is_rented)


def lacking(spec: RunSpec, ram: Mapping[str, float]) -> str | None:
    """The need and the main memory of a machine with GPUs, where it has too little. On a CPU all of it is the memory
    that the training itself is held against (`StageChoice.fits`)."""
    needed, has = sum(ram.values()) / GIB, there(spec)
    if not has or spec.hw.accelerator != "cuda" or needed <= FREE_SHARE * has:
        return None
    sure = "the machine has" if spec.hw.host_memory_gib else "such a pod is sure of"
    return f"needs {needed:.0f} GiB of main memory; {sure} {has:.0f} GiB"
