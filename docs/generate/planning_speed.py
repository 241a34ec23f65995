"""Speed and money in `docs/planning.md`: the efficiency table with its sources, links, and one run worked out."""

from __future__ import annotations

import math
from collections.abc import Callable

from docs.generate.planning_examples import RUN, Table, planned, spec_of, trained, weights
from runner.plan import cost
from runner.plan.hardware_speed import (
    BALANCE,
    BEST_SHARE,
    CPU_BANDWIDTH,
    CPU_PASS_S,
    CPU_PASS_WITHOUT_ADAPTER_S,
    HIDDEN_SHARE,
    INT8_SLOWDOWN,
    NETWORK_GB_S,
    NO_FLASH,
    NVLINK_GB_S,
    PASS_S,
    PASS_WITHOUT_ADAPTER_S,
    PCIE_GB_S,
    STREAM_SHARE,
    UNPACK_BYTES,
    UNPACK_SHARE,
    UPDATE_BYTES,
    efficiency,
    machine_of,
)
from runner.plan.run_time import GB
from runner.plan.step_time import flops_per_token
from runner.resolve.plan_inputs import hardware
from runner.spec import HardwareSpec

FIGURES: dict[str, Callable[[], str]] = {
    "pass_lora": lambda: f"{1000 * PASS_S['lora']:g}",
    "pass_quantised": lambda: f"{1000 * PASS_S['qlora4']:g}",
    "pass_whole": lambda: f"{1000 * PASS_WITHOUT_ADAPTER_S:g}",
    "cpu_pass_lora": lambda: f"{1000 * CPU_PASS_S['lora']:g}",
    "cpu_pass_whole": lambda: f"{1000 * CPU_PASS_WITHOUT_ADAPTER_S:g}",
    "cpu_bandwidth": lambda: f"{CPU_BANDWIDTH / 1e9:g}",
    "unpack_bytes": lambda: f"{UNPACK_BYTES:g}",
    "unpack_share": lambda: f"{UNPACK_SHARE:g}",
    "int8_slowdown": lambda: f"{INT8_SLOWDOWN:g}",
    "best_share": lambda: f"{BEST_SHARE:g}",
    "balance": lambda: f"{BALANCE:g}",
    "no_flash": lambda: f"{NO_FLASH:g}",
    "hidden_share": lambda: f"{HIDDEN_SHARE:g}",
    "network": lambda: f"{NETWORK_GB_S:g}",
    "update_bytes": lambda: ", ".join(f"`{name}` {size}" for name, size in UPDATE_BYTES.items()),
}
"""Figures that the text names."""

RENTED = ("method=full", "where=runpod", *RUN)


def _gpus() -> list[HardwareSpec]:
    """One machine per kind of GPU, the smallest."""
    found: dict[str, HardwareSpec] = {}
    for hw in sorted(hardware(), key=lambda hw: hw.num_gpus):
        if hw.gpu and hw.tflops_bf16:
            found.setdefault(hw.gpu, hw)
    return sorted(found.values(), key=lambda hw: (hw.compute_capability or 0, hw.tflops_bf16 or 0))


def efficiencies() -> Table:
    """Every GPU of the catalogue, the share of its peak that a step reaches, and who says so."""
    rows: list[tuple[str, ...]] = []
    for hw in _gpus():
        machine = machine_of(hw, "bf16")
        assert machine is not None
        whole, adapter = (
            efficiency(method, machine.capability, machine.tflops, machine.bandwidth) for method in ("full", "lora")
        )
        said = whole[1] if whole[1] == adapter[1] else f"weights: {whole[1]}; adapters: {adapter[1]}"
        size = f"{hw.tflops_bf16:g}", f"{hw.bandwidth_gb_s:g}"
        rows.append((hw.gpu or hw.name, *size, f"{whole[0]:.2f}", f"{adapter[0]:.2f}", said))
    return ("GPU", "peak TFLOP/s, 16 bits", "GB/s", "full, freeze", "adapters", "source"), rows


def links() -> Table:
    """GB/s in one direction that collectives reach, by compute capability."""
    rows: list[tuple[str, ...]] = []
    for capability in sorted({hw.compute_capability for hw in _gpus() if hw.compute_capability}):
        names = ", ".join(hw.gpu or hw.name for hw in _gpus() if hw.compute_capability == capability)
        nvlink, pcie = NVLINK_GB_S.get(capability), PCIE_GB_S[int(capability)]
        rows.append((names, f"{nvlink:g}" if nvlink else "–", f"{pcie:g}"))
    return ("GPU", "NVLink, GB/s", "PCIe, GB/s"), rows


def time_example() -> str:
    """Seconds of a step of the worked run."""
    spec = spec_of("method=full", *RUN)
    shape, training, _ = trained(spec)
    machine = machine_of(spec.hw, "bf16")
    assert machine is not None
    s, layers, head = 2048, shape.num_layers, shape.vocab_size * shape.hidden_size
    attention = 2 * s * shape.num_heads * shape.head_dim
    total = 8 * layers * weights(shape) + 4 * layers * attention + 6 * head
    assert math.isclose(total, flops_per_token(shape, s, method="full", trained_layers=layers, checkpointing=True))
    share, _ = efficiency("full", machine.capability, machine.tflops, machine.bandwidth)
    arithmetic = total * s / (machine.flops * share)
    launches = layers * 4 * PASS_WITHOUT_ADAPTER_S
    update = training.trainable * UPDATE_BYTES["adamw"] / machine.bandwidth
    return (
        f"8·L·W + 4·L·2·s·h + 6·V·h = {total / 1e9:.2f} GFLOP a token; × {s:,} tokens / ({machine.tflops:g} TFLOP/s × "
        f"{share:.2f}) = {arithmetic:.4f} s; launches {layers} × 4 × {1000 * PASS_WITHOUT_ADAPTER_S:g} ms = "
        f"{launches:.4f} s; the two as a hypotenuse {math.hypot(arithmetic, launches):.4f} s; update "
        f"{UPDATE_BYTES['adamw']}·P bytes / ({spec.hw.bandwidth_gb_s:,.0f} GB/s × {STREAM_SHARE:g}) = {update:.4f} s. "
        f"Together **{planned('method=full', *RUN).step_seconds} s** a step."
    )


def money_example() -> str:
    """Hours and US$ of the same run, rented, for 1,000 steps."""
    plan = planned(*RENTED)
    assert plan.hours_parts is not None and plan.hours is not None and plan.usd_per_hour is not None
    parts = " + ".join(f"{name} {hours:.3f}" for name, hours in plan.hours_parts.items())
    disk = sum(plan.disk.values()) * 2**30 / GB
    storage = disk * cost.STORAGE_USD_PER_GB_MONTH * plan.hours / cost.HOURS_PER_MONTH
    return (
        f"{parts} = {plan.hours:.3f} hours; × ${plan.usd_per_hour:g} = ${plan.hours * plan.usd_per_hour:.2f}; disk "
        f"{disk:.0f} GB × ${cost.STORAGE_USD_PER_GB_MONTH:g} × {plan.hours:.3f} / {cost.HOURS_PER_MONTH} = "
        f"${storage:.3f}. Together **${plan.usd:.2f}**."
    )
