"""Keys that identify a choice: changing one would leave the other facts of the choice behind, so it is refused.

`model.id` beside `model=mistral7b` would be planned with Mistral's sizes, `hw.gpu` beside `hw=rtx4090` with the 4090's
memory. A choice without facts of its own (`GENERIC`) takes any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from runner.config import conf_files
from runner.config.did_you_mean import nearest_choice, remedy_for_file
from runner.config.schema_keys import known_keys
from runner.config.validation import SourceOf
from runner.errors import Problem

GENERIC = {"model": ("hub",), "data": ("hub", "file"), "hw": ("local",)}
"""Choices that are described by the keys beside them."""
NAMING = {
    "model": ("id", "package", "gguf_file"),
    "data": ("source", "id"),
    "hw": ("gpu", "runpod_gpu_id"),
}
"""Keys besides `name` that say which thing it is."""
_NOUN = {"hw": "GPU", "data": "data set", "deepspeed": "ZeRO stage", "where": "place", "track": "tracker"}
ARCHITECTURE = (
    "architecture", "num_parameters", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "vocab_size", "tie_embeddings", "attention_bias", "num_experts", "experts_per_token",
    "dense_layers", "dense_intermediate_size", "shared_intermediate_size", "qk_norm",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
"""Facts of `model` that a pretrained model has, whatever is written beside it."""


def identity_problems(
    choices: Mapping[str, str | None], values: Mapping[str, object], folders: tuple[Path, ...], source_of: SourceOf
) -> Iterator[Problem]:
    """One problem per key of the composed `values` that contradicts the choice it belongs to."""
    for group, choice in choices.items():
        held = values.get(group)
        if group in conf_files.GROUPS and choice is not None and isinstance(held, dict):
            own = conf_files.load_choice(group, choice, folders)
            yield from _of_choice(group, choice, own, held, folders, source_of)


def repeat_problems(
    before: Mapping[str, object], after: Mapping[str, object], exchange: tuple[str, ...], source_of: SourceOf
) -> Iterator[Problem]:
    """The same for a `spec.json` with single values changed."""
    for group in conf_files.GROUPS:
        own, held = before.get(group), after.get(group)
        if isinstance(own, dict) and isinstance(held, dict):
            changed = [k for k in _naming(group) if held.get(k) != own.get(k) and not _taken_away(group, k, held)]
            noun = _NOUN.get(group, group)
            for key in changed:
                what = f"{group}.{key}={held.get(key)} is another {noun} than {own.get(key)} in the spec.json"
                remedy = f"write {group}={held.get(key)}" if group in exchange else "start from a recipe"
                yield Problem(what, source_of(f"{group}.{key}"), remedy)


def _of_choice(
    group: str,
    choice: str,
    own: Mapping[str, object],
    held: Mapping[str, object],
    folders: tuple[Path, ...],
    source_of: SourceOf,
) -> Iterator[Problem]:
    generic = choice in GENERIC.get(group, ())
    for key in _naming(group):
        value = held.get(key)
        if "${" in str(own.get(key)) or value == own.get(key, choice if key == "name" else None):
            continue
        if _taken_away(group, key, held) or (generic and _describes(group, key, held, folders)):
            continue
        if key == "name" and value is None:
            what = f"{group}.name=null: the YAML file of {group}={choice} has no name"
            yield Problem(what, None, _name_for(group, choice, held))
            continue
        what = f"{group}.{key}={value} names another {_NOUN.get(group, group)}"
        remedy, source = _instead(group, key, str(value), folders), source_of(f"{group}.{key}")
        if source != "command line":
            remedy = remedy_for_file(remedy)
        yield Problem(f"{what}, and the rest would stay that of {group}={choice}", source, remedy)
    if group == "model" and not generic and own.get("architecture") and not held.get("from_scratch"):
        for key in ARCHITECTURE:
            if held.get(key) != own.get(key):
                what = (
                    f"model.{key}={held.get(key)} would change the plan and not the model: {choice} has {own.get(key)}"
                )
                remedy = "leave it out; model=scratch_… takes sizes of your own"
                yield Problem(what, source_of(f"model.{key}"), remedy)


def _name_for(group: str, choice: str, held: Mapping[str, object]) -> str:
    """The line that a choice's file lacks."""
    if group == "track":
        return f"write name: {'own' if held.get('code') else 'tensorboard'} into it"
    if group == "objective":
        return "write name: sft into it, or the name of another objective whose rows it takes"
    return f"write name: {choice} into it"


def _naming(group: str) -> tuple[str, ...]:
    return ("name", *NAMING.get(group, ()))


def _taken_away(group: str, key: str, held: Mapping[str, object]) -> bool:
    """`model.package=null` loads the same model from the Hub, and so without a GGUF file."""
    return group == "model" and key in ("package", "gguf_file") and held.get(key) is None


def _describes(group: str, key: str, held: Mapping[str, object], folders: tuple[Path, ...]) -> bool:
    """A generic choice is told by this key what it is, facts included."""
    if key == "name":
        return held.get(key) not in conf_files.options(group, folders)
    if group == "hw":  # its memory and speed are looked at, not told, unless it says itself that it is a GPU
        return held.get("accelerator") == "cuda" and held.get("memory_gib") is not None
    return key != "source"


def _instead(group: str, key: str, value: str, folders: tuple[Path, ...]) -> str:
    names = conf_files.options(group, folders)
    if key == "name" and value in names:
        return f"write {group}={value}"
    if group == "data" and key == "source":
        return f"write data={'python_docs' if value == 'pydoc' else value}"
    if key == "id":
        return f"write {group}=hub {group}.id={value}"
    if group == "hw":
        near = nearest_choice("hw", value.removeprefix("NVIDIA ").removeprefix("GeForce "), names)
        said = f"write hw={near}" if near else "python -m runner list hw shows all"
        return f"{said}; hw=local with hw.accelerator=cuda, hw.gpu, hw.memory_gib and hw.num_gpus describes any other"
    if group == "model" and key != "name":
        return f"write model=hub model.id=… model.{key}={value}"
    near = nearest_choice(group, value, names)
    if group == "track" and value == "own":
        lines = "DIR/track/mine.yaml with the lines name: own and code: FILE.py:CLASS"
        return f"write {lines}, and --config-dir DIR track=mine"
    people = f"{group}.title is for people, and " if f"{group}.title" in known_keys() else ""
    return f"write {group}={near}" if near else f"leave it out: {people}run.name names a run"
