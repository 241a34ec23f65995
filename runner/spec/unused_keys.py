"""Keys that differ from their default and have no effect in this combination, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runner.spec.data import SIZES
from runner.spec.part import is_own
from runner.spec.run import RunSpec
from runner.spec.where import RentedPlace

_Keys = Iterator[tuple[str, str]]


def unused_keys(spec: RunSpec, typed: Callable[[str], bool] = lambda key: False) -> Iterator[str]:
    """One sentence for each such key. Facts that the files of model and hardware state only where they are `typed`."""
    for key, why in _candidates(spec):
        group, _, leaf = key.partition(".")
        part: Any = getattr(spec, group)
        if getattr(part, leaf) != type(part).model_fields[leaf].get_default(call_default_factory=True):
            yield f"{key} has no effect: {why}"
    for key, why in _facts(spec):
        if typed(key):
            yield f"{key} has no effect: {why}"


def _candidates(spec: RunSpec) -> _Keys:
    train, objective, hw = spec.train, spec.objective, spec.hw
    if spec.track.name not in ("wandb", "mlflow"):
        yield "track.project", f"track={spec.track.name}"
    if spec.track.name != "wandb":
        yield "track.entity", f"track={spec.track.name}"
    if spec.run.notify is None:
        yield "run.notify_on", "run.notify is not set"
    if spec.track.name != "own":
        yield "track.code", f"track={spec.track.name}"
    if train.on_loss_spike == "ignore":
        yield "train.spike_factor", "train.on_loss_spike=ignore"
    if not objective.asks_prompts:
        for key in ("num_prompts",) * bool(spec.eval.num_prompts) + ("max_new_tokens",):
            yield f"eval.{key}", f"objective={objective.name} asks no prompts"
    elif not spec.eval.num_prompts:
        yield "eval.max_new_tokens", "eval.num_prompts=0"
    if not objective.asks_prompts or not spec.eval.num_prompts:
        yield "eval.batch_size", "no prompts are asked"
    if hw.num_nodes == 1:
        yield from ((f"hw.{key}", "hw.num_nodes=1") for key in ("rendezvous", "node_address"))
    if spec.model.package or spec.model.from_scratch or Path(spec.model.id).is_dir():
        yield "model.revision", "the model is not loaded from the Hub"
    if spec.deepspeed.name not in ("auto", "none") and hasattr(spec.method, "master_weights"):
        yield "method.master_weights", f"deepspeed={spec.deepspeed.name} keeps master weights of its own"
    yield from _of_data(spec)
    yield from objective.unused(spec)
    if isinstance(spec.where, RentedPlace):
        yield from _of_pod(spec.where, hw.accelerator == "cpu")


def _of_data(spec: RunSpec) -> _Keys:
    data, objective = spec.data, spec.objective
    if data.source != "hub":
        for key in SIZES:
            yield f"data.{key}", f"the rows of data={data.name} are counted"
    if objective.name != "sft":
        yield "data.on_long", f"objective={objective.name} {objective.on_long}"
    if data.own_formats and all(is_own(one.format or data.format) for one in data.sources or (data,)):
        for key in type(data).model_fields:
            if key.endswith("_field") and key != "weight_field":
                yield f"data.{key}", "a format of your own reads the columns itself"
    sharded = objective.sharded
    if sharded:
        yield "data.on_error", "a row that is wrong always stops the making of shards"
        for key in type(data).model_fields:
            if key.endswith("_field") and key != "text_field":
                yield f"data.{key}", "shards are made of data.text_field"
    held = "eval_path" if data.eval_path else "eval_split" if data.eval_split else None
    if held or data.source == "commands" or sharded:
        mine = f"data.{held} names the held-out rows" if held else f"data={data.name} has held-out rows of its own"
        yield "data.eval_fraction", "objective.val_ratio decides" if sharded and not held else mine


def _of_pod(place: RentedPlace, cpu: bool) -> _Keys:
    if place.pod is not None:
        for key in ("data_centers", "country", "image", "template", "cuda_versions", "max_replacements"):
            yield f"where.{key}", "where.pod names a pod that is there already"
        return
    if not cpu or place.gpu_types:
        yield "where.cpu_type", "the pod has GPUs"
    if place.template is not None:
        yield "where.image", "where.template names the image"
    if place.volume is not None or cpu:
        yield "where.volume_gb", "where.volume is the disk" if place.volume else "a CPU pod has no volume disk"
    if cpu and not place.gpu_types:
        yield "where.cuda_versions", "the pod has no GPU"


def _facts(spec: RunSpec) -> _Keys:
    yield "model.num_parameters", "parameters are counted from the model's sizes"
    yield "model.aliases", "it is what a person may type for model="
    yield "hw.aliases", "it is what a person may type for hw="
    if spec.model.package:
        yield "model.gated", f"the weights come with the package {spec.model.package}"
    if spec.train.max_steps is not None:
        yield "train.num_epochs", "train.max_steps says how long"
    yield (
        f"model.learning_rate_{'full' if spec.method.adapts else 'adapter'}",
        f"method={spec.method.name} starts from the other",
    )
    if spec.hw.accelerator == "cpu":
        for key in ("gpu", "flash_attention", "compute_capability", "tflops_bf16", "bandwidth_gb_s", "interconnect",
                    "usd_per_hour", "price_date", "rented_memory_gib_per_gpu",
                    "rented_vcpus_per_gpu"):  # fmt: skip
            yield f"hw.{key}", f"hw={spec.hw.name} has no GPU"
    elif spec.hw.num_gpus == 1:
        yield "hw.interconnect", "there is one GPU"
