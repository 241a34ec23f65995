""""Did you mean": the nearest key or choice to what was typed."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from pydantic import BaseModel

from runner.spec import RunSpec

# What other trainers call the same thing; people arrive with these in their fingers.
SYNONYMS = {
    "lr": "train.learning_rate",
    "epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "steps": "train.max_steps",
    "bs": "train.batch_size",
    "global_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "accumulation": "train.accumulation_steps",
    "cutoff_len": "train.max_length",
    "max_seq_length": "train.max_length",
    "sequence_len": "train.max_length",
    "seq_len": "train.max_length",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "scheduler": "train.schedule",
    "optim": "train.optimizer",
    "warmup": "train.warmup_ratio",
    "dtype": "train.precision",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "flash_attention": "train.attention",
    "attn_implementation": "train.attention",
    "grad_checkpointing": "train.gradient_checkpointing",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_target_modules": "method.target_modules",
    "dataset": "data",
    "gpus": "hw.num_gpus",
    "num_processes": "hw.num_processes",
    "hardware": "hw",
    "output_dir": "run.output_dir",
    "model_name_or_path": "model.id",
    "finetuning_type": "method",
    "stage": "deepspeed",
    "zero_stage": "deepspeed",
}


@cache
def known_keys() -> frozenset[str]:
    """Every dotted key of the schema, all variants of a union together."""
    return frozenset(_walk(RunSpec, ""))


def parts_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schema classes inside an annotation (a class, a union, an Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from parts_of(inner)


def _walk(part: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in part.model_fields.items():
        yield prefix + name
        for inner in parts_of(field.annotation):
            yield from _walk(inner, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The schema key a user most likely meant by `key`, or None."""
    leaf = key.rpartition(".")[2]
    if leaf in SYNONYMS:
        return SYNONYMS[leaf]
    keys = known_keys()
    same_leaf = sorted(k for k in keys if k.rpartition(".")[2] == leaf)
    if same_leaf:
        return nearest(key, same_leaf, cutoff=0.0)
    return nearest(key, keys) or nearest(leaf, {k.rpartition(".")[2]: k for k in sorted(keys)}, cutoff=0.75)


def nearest(word: str, candidates: Iterable[str] | dict[str, str], cutoff: float = 0.6) -> str | None:
    """The candidate most like `word` (for a mapping: the value behind the nearest key)."""
    table = candidates if isinstance(candidates, dict) else {c: c for c in candidates}
    lowered = {name.lower(): target for name, target in table.items()}
    word = word.lower()
    starts = sorted((name for name in lowered if name.startswith(word)), key=len) if len(word) > 2 else []
    found = starts or difflib.get_close_matches(word, sorted(lowered), n=1, cutoff=cutoff)
    return lowered[found[0]] if found else None
