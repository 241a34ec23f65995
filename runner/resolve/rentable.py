"""GPUs that RunPod has now, and which models of the catalogue each one holds."""

from __future__ import annotations

from typing import Any

from runner.cloud.runpod.types import GpuType
from runner.config import catalog
from runner.resolve.fit import memory_table, models
from runner.spec import ModelSpec, RunSpec

METHODS = {"full, bf16 weights": "full", "LoRA, rank 16": "lora", "QLoRA, 4 bits": "qlora4"}
USABLE = 0.95
"""Of a GPU's memory: the rest is the driver's, and room for fragments."""


def gpu_rows(gpus: list[GpuType], spec: RunSpec, *, min_memory: int, cloud: str | None) -> list[dict[str, Any]]:
    """One row per GPU type with a price, cheapest first; `holds` is the largest model by method on one of them."""
    named = {values["runpod_gpu_id"]: name for name, values in _profiles() if values.get("runpod_gpu_id")}
    needs = _needs(spec)
    rows = []
    for gpu in gpus:
        prices = [usd for usd in (gpu.secure_usd, gpu.community_usd) if usd is not None]
        if gpu.memory_gb < min_memory or not prices or (cloud and gpu.usd(cloud) is None):
            continue
        rows.append(
            {
                "id": gpu.id, "name": gpu.name, "memory_gb": gpu.memory_gb, "secure_usd": gpu.secure_usd,
                "community_usd": gpu.community_usd, "max": max(gpu.max_secure, gpu.max_community), "stock": gpu.stock,
                "data_centers": [c for c, level in gpu.data_centers.items() if level != "NONE"],
                "hw": named.get(gpu.id), "holds": _held(needs, gpu.memory_gb),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (_price(row, cloud), row["id"]))


def _price(row: dict[str, Any], cloud: str | None) -> float:
    found = [row[f"{name}_usd"] for name in ((cloud,) if cloud else ("secure", "community"))]
    return min(float(usd) for usd in found if usd is not None)


def _profiles() -> list[tuple[str, dict[str, Any]]]:
    """Machines with one GPU: `hw=h100` before `hw=h100x3`."""
    found = [(name, catalog.load("hw", name)) for name in catalog.options("hw")]
    return [(name, values) for name, values in found if values.get("num_gpus") == 1]


def _needs(spec: RunSpec) -> dict[str, list[tuple[float, str, float]]]:
    """Method → (billions of parameters, model, GiB), largest first."""
    known: list[ModelSpec] = models()
    table = memory_table(spec, [model.name for model in known])
    size = {model.name: (model.num_parameters or 0) / 1e9 for model in known}
    rows = {row["method"]: row["cells"] for row in table["rows"]}
    return {
        method: sorted(((size[n], n, gib) for n, gib in zip(table["columns"], rows[label], strict=True)), reverse=True)
        for label, method in METHODS.items()
    }


def _held(needs: dict[str, list[tuple[float, str, float]]], memory_gb: int) -> str:
    """`full llama3_2_1b, lora llama3_8b, qlora4 llama30b`."""
    largest = {
        method: next((name for _, name, gib in sizes if gib <= USABLE * memory_gb), None)
        for method, sizes in needs.items()
    }
    return ", ".join(f"{method} {name}" for method, name in largest.items() if name)
