"""The DeepSpeed JSONs, ours and a user's own: one validated reading, for the plan and the run alike.

A JSON of one's own decides what the run leaves at `auto` (stage, precision, micro batch); what both say must agree. The
optimiser, its schedule and the batch are the run's: blocks that agree with it are left out of what DeepSpeed is handed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config import json_text
from runner.config.deepspeed_keys import AUTO, ELSEWHERE, KEYS, Kind, Known
from runner.config.did_you_mean import nearest
from runner.config.provenance import display_path
from runner.config.validation import SourceOf
from runner.errors import Problem, RequestError
from runner.paths import DEEPSPEED_CONFIGS
from runner.spec import DeepSpeedSpec, RunSpec

_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}
"""DeepSpeed's Adam is AdamW unless `adam_w_mode` is false: runtime/config.py."""
_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class DeepSpeedJson:
    """One file, read and valid."""

    file: str
    """As a user would recognise it."""
    text: str
    content: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value under a dotted key; None for "auto" and for what is not there."""
        value: Any = self.content
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        return None if value == "auto" else value

    def place(self, key: str) -> str:
        """File and line of a dotted key: each step is looked for after the one before."""
        position = 0
        for step in key.split("."):
            found = re.compile(rf"{re.escape(json.dumps(step))}\s*:").search(self.text, position)
            if found is None:
                return self.file
            position = found.start()
        return f"{self.file}:{self.text.count(chr(10), 0, position) + 1}"

    @property
    def offloads(self) -> bool:
        """Something waits in main memory or on NVMe."""
        parts = ("offload_optimizer", "offload_param")
        return any(self.get(f"zero_optimization.{part}.device") in ("cpu", "nvme") for part in parts)

    @property
    def stage(self) -> str:
        """The choice of `deepspeed=` that it is."""
        return f"zero{self.get('zero_optimization.stage')}{'_offload' * self.offloads}"

    @property
    def precision(self) -> str | None:
        """bf16, fp16, fp32 where both are switched off, or None where it leaves that to the run."""
        on = {key: self.get(f"{key}.enabled") for key in ("bf16", "fp16")}
        if on == {"bf16": False, "fp16": False}:
            return "fp32"
        return next((key for key, enabled in on.items() if enabled), None)


def deepspeed_templates(deepspeed: DeepSpeedSpec | None = None) -> dict[str, dict[str, object]]:
    """The JSONs by stage, with "auto" where the run decides; the user's own in the place of its stage.

    RequestError for a file that is not there, or wrong.
    """
    found = {file.stem: json_text.loads(file.read_text("utf-8")) for file in DEEPSPEED_CONFIGS.glob("*.json")}
    if deepspeed is not None and deepspeed.config and deepspeed.name not in ("none", "auto"):
        content = dict(read_deepspeed_json(deepspeed.config).content)
        for key in ("optimizer", "scheduler"):
            content.pop(key, None)
        precision = {key: {**content.get(key, {}), "enabled": "auto"} for key in ("bf16", "fp16")}
        decided = {**dict.fromkeys((*_BATCH, "gradient_clipping"), "auto"), **precision}
        found[deepspeed.name] = {"zero_allow_untested_optimizer": True, **content, **decided}
    return found


def read_deepspeed_json(name: str) -> DeepSpeedJson:
    """A file of `deepspeed_configs/` by its name, or one's own by its path; RequestError with all that is wrong."""
    ours = "/" not in name and os.path.isfile(DEEPSPEED_CONFIGS / name)  # ./zero2.json is the user's
    file = DEEPSPEED_CONFIGS / name if ours else Path(name).expanduser()
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        names = ", ".join(sorted(f.name for f in DEEPSPEED_CONFIGS.glob("*.json")))
        raise RequestError(Problem(f"deepspeed.config={name}: {why}", None, f"a path, or {names}")) from None
    try:
        content = json_text.loads(text, object_pairs_hook=json_text.once)
    except json_text.RepeatedKeyError as error:
        what = f"deepspeed.config={name}: {error} in one object"
        raise RequestError(Problem(what, display_path(file), "leave one of them out")) from None
    except ValueError as error:
        raise RequestError(Problem(f"deepspeed.config={name} is not JSON: {error}", display_path(file))) from None
    if not isinstance(content, dict):
        what = f"deepspeed.config={name} holds {_kind(content)}, and not a mapping of keys"
        raise RequestError(Problem(what, display_path(file), "begin with a copy of deepspeed_configs/zero2.json"))
    found = DeepSpeedJson(display_path(file), text, _whole(content))
    problems = [Problem(what, found.place(key), remedy) for key, what, remedy in _mapping(content, KEYS, "")]
    problems += [] if problems else list(_senseless(found))
    if problems:
        raise RequestError(*problems)
    return found


def apply(spec: RunSpec, source_of: SourceOf) -> RunSpec:
    """The run with what its own JSON decides; RequestError for what the two say differently."""
    if not spec.deepspeed.config:
        return spec
    config = read_deepspeed_json(spec.deepspeed.config)
    train: dict[str, Any] = {}
    if spec.train.precision == "auto" and config.precision:
        train["precision"] = config.precision
    for key, ours in zip(_BATCH[1:], ("micro_batch_size", "accumulation_steps"), strict=True):
        if getattr(spec.train, ours) == "auto" and config.get(key):
            train[ours] = config.get(key)
    name = config.stage if spec.deepspeed.name == "auto" else spec.deepspeed.name
    deepspeed = spec.deepspeed.model_copy(update={"name": name})
    found = spec.model_copy(update={"train": spec.train.model_copy(update=train), "deepspeed": deepspeed})
    problems = [
        Problem(f"{key} is {_text(theirs)} in {config.place(key)}, and {ours}={value}", source_of(ours), remedy)
        for key, theirs, ours, value, remedy in _contradictions(found, config)
    ]
    if problems:
        raise RequestError(*problems)
    return found


def _contradictions(spec: RunSpec, config: DeepSpeedJson) -> Iterator[tuple[str, Any, str, Any, str]]:
    """Key and value of the JSON, key and value of the run, and what to write, for everything that differs."""
    if config.stage != spec.deepspeed.name:
        key = "zero_optimization.stage"
        theirs = config.get(key)
        if config.stage.removesuffix("_offload") == spec.deepspeed.name.removesuffix("_offload"):
            key, theirs = "zero_optimization", f"{'with' if config.offloads else 'without'} offload"
        yield key, theirs, "deepspeed", spec.deepspeed.name, f"write deepspeed={config.stage}"
    train = spec.train
    same = [
        ("train_batch_size", "train.batch_size", train.batch_size),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size", train.micro_batch_size),
        ("gradient_accumulation_steps", "train.accumulation_steps", train.accumulation_steps),
        ("gradient_clipping", "train.max_grad_norm", train.max_grad_norm),
        ("optimizer.params.lr", "train.learning_rate", train.learning_rate),
        ("optimizer.params.weight_decay", "train.weight_decay", train.weight_decay),
        ("scheduler.params.warmup_max_lr", "train.learning_rate", train.learning_rate),
    ]
    for key, ours, value in same:
        theirs = config.get(key)
        if key == "train_batch_size" and theirs is not None:
            theirs = value if _rounded(theirs, spec) == value else theirs
        if theirs is not None and value != "auto" and theirs != value:
            yield key, theirs, ours, value, f'write {ours}={theirs}, or "auto" in the JSON'
    for key, table, ours, kept in (
        ("optimizer.type", _OPTIMIZERS, "train.optimizer", train.optimizer),
        ("scheduler.type", _SCHEDULES, "train.schedule", train.schedule),
    ):
        theirs = config.get(key)
        meant = table.get(theirs.lower() if table is _OPTIMIZERS else theirs) if theirs else None
        if theirs and meant != kept:
            block = f"leave the {key.split('.')[0]} block out"
            yield key, theirs, ours, kept, f"write {ours}={meant}, or {block}" if meant else block
    if train.precision != "auto":
        for key in ("bf16", "fp16"):
            theirs, wanted = config.get(f"{key}.enabled"), train.precision == key
            if theirs is not None and theirs != wanted:
                remedy = f"write train.precision={config.precision or 'auto'}" if theirs else 'write "auto" in the JSON'
                yield f"{key}.enabled", theirs, "train.precision", train.precision, remedy
    nvme = spec.deepspeed.nvme_path
    for part in ("offload_param", "offload_optimizer"):
        theirs = config.get(key := f"zero_optimization.{part}.nvme_path")
        if theirs and nvme and theirs != nvme:
            yield key, theirs, "deepspeed.nvme_path", nvme, "leave one of the two out"
        if config.get(f"zero_optimization.{part}.device") == "nvme" and not (theirs or nvme):
            key = f"zero_optimization.{part}.device"
            yield key, "nvme", "deepspeed.nvme_path", "null", "write deepspeed.nvme_path=/mnt/nvme, say"


def _rounded(batch: int, spec: RunSpec) -> int:
    """A global batch as the processes divide it: what a finished spec.json says of a run that asked for `batch`."""
    micro, accumulation = spec.train.micro_batch_size, spec.train.accumulation_steps
    if not (isinstance(micro, int) and isinstance(accumulation, int)):
        return batch
    step = micro * spec.hw.world_size
    return max(1, round(batch / step)) * step


def _senseless(config: DeepSpeedJson) -> Iterator[Problem]:
    """What DeepSpeed would not take, or this runner has no use for, in a JSON whose keys are right."""
    stage, key = config.get("zero_optimization.stage"), "zero_optimization.stage"
    if stage not in (1, 2, 3):
        what = "zero_optimization is missing" if "zero_optimization" not in config.content else f"{key} is missing"
        what = f"{key} is {stage}" if stage is not None else what
        instead = "write deepspeed=none instead" if stage == 0 else 'write "zero_optimization": {"stage": 2}, say'
        yield Problem(f"{what}: expected 1, 2 or 3", config.place(key), instead)
        return
    for part, least in (("offload_optimizer", 2), ("offload_param", 3)):
        if config.get(f"zero_optimization.{part}.device") in ("cpu", "nvme") and stage < least:
            key = f"zero_optimization.{part}"
            yield Problem(f"{key} needs stage {least}, and the stage is {stage}", config.place(key), "leave one out")
    if config.get("bf16.enabled") and config.get("fp16.enabled"):
        yield Problem("bf16 and fp16 are both switched on", config.place("fp16"), 'write "auto" in both')
    yield from _blocks(config)


_DEFAULTS = {"betas": [0.9, 0.999], "eps": 1e-8, "adam_w_mode": True, "torch_adam": True, "momentum": 0,
             "bias_correction": True, "warmup_min_lr": 0}  # fmt: skip
"""What a run does: any other value of these cannot be had."""
_RUNS = ("lr", "weight_decay", "warmup_max_lr")


def _blocks(config: DeepSpeedJson) -> Iterator[Problem]:
    for block, known in (("optimizer", None), ("scheduler", _SCHEDULES)):
        if block not in config.content:
            continue
        kind = config.get(f"{block}.type")
        if kind is None:
            yield Problem(f"{block}.type is missing", config.place(block), f"leave the {block} block out")
        elif known is not None and kind not in known:
            instead = "leave the block out: train.schedule decides it"
            yield Problem(f"{block}.type={kind} is none of {', '.join(known)}", config.place(f"{block}.type"), instead)
        for name in config.get(f"{block}.params") or {}:
            value = config.get(f"{block}.params.{name}")
            if value is not None and name not in _RUNS and _DEFAULTS.get(name, ...) != value:
                key = f"{block}.params.{name}"
                what = f"{key} is {_text(value)}: the {block} is the run's own, which does not have it"
                yield Problem(what, config.place(key), 'write "auto", or leave it out')


def _mapping(value: Mapping[str, object], known: Known, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Key, what is wrong and what to write, for every key of one level."""
    for key, inner in value.items():
        name = prefix + key
        if name in ELSEWHERE:
            yield name, f"{name} has no place in a run", ELSEWHERE[name]
        elif key not in known:
            near = nearest(key, list(known))
            yield name, f"unknown key {name}", f"did you mean {near}?" if near else "leave it out"
        elif isinstance(kind := known[key], Mapping):
            if isinstance(inner, dict):
                yield from _mapping(inner, kind, f"{name}.")
            elif inner is not None or not key.startswith("offload"):  # "offload_param": null offloads nothing
                yield name, f"{name} is {_text(inner)}: expected a mapping", f'write "{key}": {_example(kind, inner)}'
        elif inner == "auto":
            if name not in AUTO and not prefix.endswith("params."):
                yield name, f'{name} is "auto", which nothing decides', "write a value, or leave it out"
        elif not _fits(inner, kind):
            yield name, f"{name} is {json.dumps(inner)}: expected {_expected(kind)}", _written(key, inner, kind)


def _fits(value: object, kind: Kind) -> bool:
    if isinstance(kind, tuple):
        return value in kind
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return 0 <= value < math.inf and (kind is float or value == int(value))
    return isinstance(value, kind)


def _expected(kind: Kind) -> str:
    if isinstance(kind, tuple):
        return "one of " + ", ".join(kind)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}[kind]


def _example(known: Known, value: object) -> str:
    """`"offload_param": "cpu"` means `{"device": "cpu"}`."""
    key = next(iter(known))
    kind = known[key]
    assert not isinstance(kind, Mapping)  # blocks begin with a plain key
    right = value if _fits(value, kind) else kind[0] if isinstance(kind, tuple) else "auto" if kind is bool else 2
    return json.dumps({key: right})


def _written(key: str, value: object, kind: Kind) -> str:
    """The value without its quotes, where that is what is wrong with it."""
    try:
        inner = json_text.loads(str(value).lower())
    except ValueError:
        inner = None
    if isinstance(value, str) and not isinstance(kind, tuple) and _fits(inner, kind):
        return f'write "{key}": {json.dumps(inner)}'
    return "leave it out, or see DeepSpeed's documentation"


def _whole(value: object) -> Any:
    """1e9 is a whole number to DeepSpeed and a float to Python's json."""
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _kind(value: object) -> str:
    return "null" if value is None else "a list" if isinstance(value, list) else json.dumps(value)
