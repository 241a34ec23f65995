"""`fit` and `table`: many plans at once, over whatever of the catalogue the request leaves open."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pydantic import BaseModel, TypeAdapter

from runner.config import conf_files, deepspeed_json, recipe_checks, spec_json
from runner.config.command_line import Request, check_request
from runner.config.provenance import COMMAND_LINE, flattened
from runner.errors import Problem, RequestError
from runner.plan.choose_stage import StageSearch
from runner.plan.memory import GIB
from runner.plan.model_shape import shape_of
from runner.plan.search import SearchRow, combinations, fit, ranked
from runner.resolve.plan_inputs import hardware, num_sequences
from runner.spec import HardwareSpec, Method, ModelSpec, RunSpec, TrainSpec

if TYPE_CHECKING:
    from runner.cloud.runpod.json_types import GpuType

ADVISED = 200
"""Up to so many combinations, those that do not fit are told what to change: that takes as long as the rest."""
METHOD: TypeAdapter[Method] = TypeAdapter(Method)


def candidate_methods(given: Mapping[str, object], folders: tuple[Path, ...] = ()) -> list[Method]:
    """full, freeze, lora, qlora4 and qlora8, as their files have them, and with what was typed for any.

    Variants of them, and PEFT's other adapters, need about what `lora` needs: they are looked at when they are named.
    """
    found = []
    for name in conf_files.options("method", folders):
        own = conf_files.load_choice("method", name, folders)
        if own.get("name") != name or "peft_type" in own:
            continue
        values = _with_typed(type(METHOD.validate_python(own)), own, given, "method")
        found += [METHOD.validate_python(values)] if values else []
    return found


def candidate_models(folders: tuple[Path, ...] = ()) -> list[ModelSpec]:
    """Every pretrained model of the catalogue whose shape is known."""
    found = [conf_files.load_choice("model", name, folders) for name in conf_files.options("model", folders)]
    return [
        ModelSpec.model_validate(values)
        for values in found
        if values.get("architecture") and not values.get("from_scratch")
    ]


def candidate_hardware(given: Mapping[str, object], folders: tuple[Path, ...] = ()) -> list[HardwareSpec]:
    """Every named GPU machine, with what was typed for any."""
    found = hardware(folders)
    values = [_with_typed(HardwareSpec, hw.model_dump(exclude_unset=True), given, "hw") for hw in found]
    told = [HardwareSpec.model_validate(content) for content in values if content]
    return list({(hw.gpu, hw.num_gpus, hw.num_nodes): hw for hw in reversed(told)}.values())[::-1]


def named_in(request: Request) -> dict[str, object]:
    """Groups and keys that the request names, with their values: on the command line, in its recipe, or in a spec.json.

    A group without a value is named; what is typed for one of its keys is not: `method.rank=8` holds for any method.
    """
    checked = check_request(request)
    if checked.request.spec_file is not None:
        return dict.fromkeys(conf_files.GROUPS)
    named: dict[str, object] = {}
    if checked.request.recipe:
        choices, keys = recipe_checks.choices_and_keys(
            recipe_checks.find_recipe(checked.request.recipe, request.config_dirs)
        )
        named = {**dict.fromkeys(choices), **keys}
    for override in checked.overrides:
        if override.key_or_group in conf_files.GROUPS:  # another choice: what a recipe says of it stays, as in a run
            named[override.key_or_group] = None
        elif not override.is_hydra_override() and not override.is_delete():
            named |= dict(flattened({override.key_or_group: override.value()}))
    return named


def _with_typed(
    part: type[BaseModel], values: dict[str, object], given: Mapping[str, object], group: str
) -> dict[str, object] | None:
    """One candidate of an open group with what was typed for the group; None if it has no such key."""
    content = dict(values)
    for key, value in given.items():
        if not key.startswith(f"{group}."):
            continue
        if key.split(".")[1] not in part.model_fields:
            return None
        spec_json.set_key(content, key.partition(".")[2], value)
    return content


def with_default_length(spec: RunSpec, given: Mapping[str, object]) -> RunSpec:
    """The run with sequences of the schema's length, not the demo's 256 tokens, where it names neither data nor length.

    `spec` is the run as it was asked for, its `auto`s open.
    """
    if "data" in given:
        return spec
    fields = TrainSpec.model_fields
    update = {key: fields[key].default for key in ("max_length", "batch_size") if f"train.{key}" not in given}
    return spec.model_copy(update={"train": spec.train.model_copy(update=update)})


def title(spec: RunSpec, rows: Sequence[SearchRow]) -> str:
    """Return the number of answers, and the sequences and batch they are for."""
    fitting = sum(row.fits for row in rows)
    size = f"sequences of {spec.train.max_length:,} tokens, batch {spec.train.batch_size}"
    return f"{fitting} of {len(rows)} combinations fit: {size}"


def fit_rows(spec: RunSpec, given: Mapping[str, object], by: str, folders: tuple[Path, ...] = ()) -> list[SearchRow]:
    """Combinations with their plans: of model, method and hardware those that `given` names, and all of the others.

    `spec` is what `with_default_length` returned.
    """
    open_models = [spec.model] if "model" in given else candidate_models(folders)
    open_methods = [spec.method] if "method" in given else candidate_methods(given, folders)
    open_hw = [spec.hw] if "hw" in given else candidate_hardware(given, folders)
    advice = len(open_models) * len(open_methods) * len(open_hw) <= ADVISED
    size = num_sequences(spec) if "data" in given else None
    work = partial(_fits_of, spec, open_methods, open_hw, size, advice)
    rows = _on_all_cores(work, open_models) if len(open_models) > 1 else map(work, open_models)
    return ranked(chain.from_iterable(rows), by)


def _fits_of(
    spec: RunSpec, methods: list[Method], hw: list[HardwareSpec], size: int | None, advice: bool, model: ModelSpec
) -> list[SearchRow]:
    options = StageSearch(deepspeed_json.deepspeed_templates(spec.deepspeed))
    return fit(combinations(spec, [model], methods, hw), options, sequences=size, advice=advice)


def _on_all_cores(work: Callable[[ModelSpec], list[SearchRow]], models: list[ModelSpec]) -> list[list[SearchRow]]:
    """A process per core, forked: the whole catalogue takes 1.7 s on one. Elsewhere than on Linux one after the other.

    Without the collector: a million short-lived sizes go by their reference counts, looking for cycles took 7%.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if cores == 1:
        return [work(model) for model in models]
    with ProcessPoolExecutor(min(cores, len(models)), multiprocessing.get_context("fork"), gc.disable) as pool:
        return list(pool.map(work, models))


def refuse_for_table(request: Request) -> None:
    """RequestError for words that change nothing of the table, which is for all methods and sizes."""
    typed = {o.key_or_group: str(o.input_line) for o in check_request(request).overrides}
    words = [word for key, word in typed.items() if key != "train.max_length"]
    files = [str(file) for file in (check_request(request).request.recipe, request.spec_file) if file]
    if words or files:
        said = " ".join([*files, *words])
        what = f"{said}: the table is of every method and size, and changes with train.max_length alone"
        raise RequestError(
            Problem(what, COMMAND_LINE, f"python -m runner plan {said} answers for one run, fit for many")
        )


TABLE_MODELS = ("llama2_7b", "llama2_13b", "llama30b", "llama65b", "llama2_70b", "mixtral_8x7b")
_TABLE = StageSearch({})
TABLE_ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full, fp32 weights", {"name": "full"}),
    ("full, bf16 weights", {"name": "full", "master_weights": False}),
    ("freeze, last 2 layers", {"name": "freeze"}),
    ("LoRA, rank 16", {"name": "lora"}),
    ("QLoRA, 8 bits", {"name": "qlora8"}),
    ("QLoRA, 4 bits", {"name": "qlora4"}),
)


class MethodRow(TypedDict):
    """One method of the memory table."""

    method: str
    cells: list[float]
    """GiB by model."""


class MemoryTable(TypedDict):
    """The answer of `table --json`."""

    title: str
    columns: list[str]
    """Models."""
    rows: list[MethodRow]
    assumptions: list[str]


def memory_table(spec: RunSpec, names: Iterable[str] = TABLE_MODELS) -> MemoryTable:
    """Method × model size: GiB on one GPU that is large enough, for one sequence at a time."""
    found = [ModelSpec.model_validate(conf_files.load_choice("model", name)) for name in names]
    length = min(spec.train.max_length, *(m.context_length or spec.train.max_length for m in found))
    base = table_run(spec, length)
    rows: list[MethodRow] = [
        {"method": label, "cells": [round(table_cell(base, model, method), 1) for model in found]}
        for label, method in TABLE_ROWS
    ]
    return {
        "title": "Memory of one GPU, in GiB",
        "columns": [model.name for model in found],
        "rows": rows,
        "assumptions": [
            f"one sequence of {length} tokens at a time, gradient checkpointing, bf16 arithmetic, AdamW",
            "training alone: answering held-out prompts (eval.num_prompts) can take more, which `plan` counts",
            "FlashAttention; TRL's fused head; the context of CUDA and 4% of slack are counted in",
            "full: fp32 weights, gradients and moments, 16 bytes per parameter, and 2 more for the copy in bf16",
            "several GPUs: `plan` with deepspeed=zero3 shards all of it but the activations",
        ],
    }


def table_run(spec: RunSpec, length: int) -> RunSpec:
    """The run that every cell of the table is of, but for its model and method: training alone, on an H200."""
    train = {"max_length": length, "gradient_checkpointing": True, "precision": "bf16", "attention": "auto"}
    return spec.model_copy(
        update={
            "hw": HardwareSpec.model_validate(conf_files.load_choice("hw", "h200")),
            "train": spec.train.model_copy(update=train),
            "eval": spec.eval.model_copy(update={"num_prompts": 0}),
        }
    )


def table_cell(base: RunSpec, model: ModelSpec, method: dict[str, object], micro_batch: int = 1) -> float:
    """GiB expected at the peak."""
    size = {"micro_batch_size": micro_batch, "accumulation_steps": 1, "batch_size": micro_batch}
    one = base.model_copy(
        update={"model": model, "method": METHOD.validate_python(method), "train": base.train.model_copy(update=size)}
    )
    return _TABLE.choice(one, shape_of(model), "none", micro_batch, 1, 1).memory.expected / GIB


_HELD_METHODS = {"full, bf16 weights": "full", "LoRA, rank 16": "lora", "QLoRA, 4 bits": "qlora4"}
_USABLE = 0.95
"""Usable share of a GPU's memory: the rest is the driver's, and room for fragments."""


class GpuRow(TypedDict):
    """A GPU type for rent: one of the answer of `gpus --json`."""

    id: str
    name: str
    memory_gb: int
    secure_usd: float | None
    community_usd: float | None
    max: int
    """How many a pod can have."""
    stock: str | None
    data_centers: list[str]
    host_memory_gib: float | None
    """Main memory of a pod with one, at least."""
    vcpus: int | None
    """vCPUs of a pod with one, at least."""
    hw: str | None
    """The profile in conf/hw."""
    holds: str
    """The largest model by method."""


def gpu_rows(gpus: list[GpuType], spec: RunSpec, *, min_memory: int, cloud: str | None) -> list[GpuRow]:
    """One row per GPU type with a price, cheapest first; `holds` is the largest model by method on one of them."""
    single = {values["runpod_gpu_id"]: (name, values) for name, values in _single_gpus() if values.get("runpod_gpu_id")}
    needs = _memory_needs(spec)
    rows: list[GpuRow] = []
    for gpu in gpus:
        prices = [usd for usd in (gpu.secure_usd, gpu.community_usd) if usd is not None]
        if gpu.memory_gb < min_memory or not prices or (cloud and gpu.usd(cloud) is None):
            continue
        name, values = single.get(gpu.id, (None, {}))
        rows.append(
            {
                "id": gpu.id, "name": gpu.name, "memory_gb": gpu.memory_gb, "secure_usd": gpu.secure_usd,
                "community_usd": gpu.community_usd, "max": max(gpu.max_secure, gpu.max_community), "stock": gpu.stock,
                "data_centers": [c for c, level in gpu.data_centers.items() if level != "NONE"],
                "host_memory_gib": values.get("rented_memory_gib_per_gpu"), "vcpus": values.get("rented_vcpus_per_gpu"),
                "hw": name, "holds": _largest_models(needs, gpu.memory_gb),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (_lowest_price(row, cloud), row["id"]))


def _lowest_price(row: GpuRow, cloud: str | None) -> float:
    prices = {"secure": row["secure_usd"], "community": row["community_usd"]}
    return min(usd for name, usd in prices.items() if usd is not None and cloud in (None, name))


def _single_gpus() -> list[tuple[str, dict[str, Any]]]:
    """Machines with one GPU: `hw=h100` before `hw=h100x3`."""
    found = [(name, conf_files.load_choice("hw", name)) for name in conf_files.options("hw")]
    return [(name, values) for name, values in found if values.get("num_gpus") == 1]


def _memory_needs(spec: RunSpec) -> dict[str, list[tuple[float, str, float]]]:
    """Method → (billions of parameters, model, GiB), largest first."""
    known = candidate_models()
    table = memory_table(spec, [model.name for model in known])
    size = {model.name: (model.num_parameters or 0) / 1e9 for model in known}
    rows = {row["method"]: row["cells"] for row in table["rows"]}
    return {
        method: sorted(((size[n], n, gib) for n, gib in zip(table["columns"], rows[label], strict=True)), reverse=True)
        for label, method in _HELD_METHODS.items()
    }


def _largest_models(needs: dict[str, list[tuple[float, str, float]]], memory_gb: int) -> str:
    """`full llama3_2_1b, lora llama3_8b, qlora4 llama30b`."""
    largest = {
        method: next((name for _, name, gib in sizes if gib <= _USABLE * memory_gb), None)
        for method, sizes in needs.items()
    }
    return ", ".join(f"{method} {name}" for method, name in largest.items() if name)
