"""The spec of a run that another machine has ordered, as its pod tells it: data, with nothing that acts here.

A pod is a stranger's machine. `resume`, `merge`, `chat` and `push` read files of this machine, run reward functions,
set variables, reach hosts, upload and pass keys, all by the spec: of what a pod writes there, only what does none of
that is kept.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from runner.cloud.transfer import DEMO
from runner.config import json_text
from runner.errors import Problem, RequestError
from runner.paths import DEEPSPEED_CONFIGS
from runner.spec import RentedPlace, RunSpec
from runner.spec.input_paths import OF_POD, get_place, is_code, named_places, put_place

LARGEST = 1 << 20
"""Characters of a spec.json; one with 1,000 sources has 200,000."""
DEFAULTS: dict[str, Any] = {
    "hw.hostfile": None, "hw.rendezvous": None, "hw.node_address": None, "deepspeed.nvme_path": None,
    "push": {"to": None, "every_steps": None, "keep_checkpoints": 1}, "run.on_changed_inputs": "stop",
    "run.notify": None,
}  # fmt: skip
"""Keys that set variables, reach hosts, write elsewhere or upload, and what they become."""
PLAN_KEYS = ("usd", "usd_per_hour", "hours", "disk_gib", "host_ram_gib")
"""What is read here of a plan once its run has begun."""
URL = re.compile(r"(s3|gs|https?|hf)://[^\s:]+(:\d+)?[^\s:]*", re.ASCII)
"""Addresses of other machines: neither `file://` nor a chain such as `zip://x::file://y`, which fsspec reads, too."""
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
SWITCH = re.compile(r"NCCL_[A-Z0-9_]+_DISABLE", re.ASCII)
"""Variables of the profiles in conf/hw, which only switch something off."""
IN_PODS = "/workspace/"
NOWHERE = re.compile(OF_POD + r"[A-Za-z0-9]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class AdoptedSpec:
    """The spec, and a line for each key that is not as the pod said."""

    spec: RunSpec
    changes: list[str]


def adopt_spec(text: str, pod_id: str, volume: str | None, output_dir: Path, cloud: str) -> AdoptedSpec:
    """The spec in a pod's `spec.json`, for a run directory below `output_dir` and a pod of that `cloud`.
    RequestError where it is none."""
    try:
        if len(text) > LARGEST:
            raise ValueError
        told = RunSpec.model_validate(json_text.object_of(text))
    except (ValueError, ValidationError, RecursionError):
        remedy = f"python -m runner pods ssh {pod_id} looks; pods terminate {pod_id} ends the pod"
        raise RequestError(
            Problem(f"pod {pod_id} has no spec of a run: its spec.json is damaged", None, remedy)
        ) from None
    values = told.model_dump(mode="json")
    changes = [*_defaults(values), *_model(values, pod_id, output_dir), *_places(told, values, pod_id, output_dir)]
    values["where"] = RentedPlace(name=cloud, volume=volume).model_dump(mode="json")
    values["run"]["output_dir"] = str(output_dir)
    return AdoptedSpec(RunSpec.model_validate(values), changes)


def adopt_plan(text: str) -> dict[str, float]:
    """The finite numbers of a pod's `plan.json` that are read here."""
    found = {
        key: value
        for key, value in json_text.object_of(text).items()
        if key in PLAN_KEYS and type(value) in (int, float)
    }
    return {key: value for key, value in found.items() if 0 <= value < 1e12 and math.isfinite(value)}


def _defaults(values: dict[str, Any]) -> Iterator[str]:
    for key, default in DEFAULTS.items():
        *parents, leaf = key.split(".")
        part = values
        for parent in parents:
            part = part[parent]
        if part[leaf] != default:
            part[leaf] = default
            yield f"{key} is left out"
    env = values["hw"]["env"]
    values["hw"]["env"] = {k: v for k, v in env.items() if SWITCH.fullmatch(k) and v in ("0", "1")}
    if left := [name for name in env if name not in values["hw"]["env"]]:
        yield f"hw.env is left out: {', '.join(map(ascii, left))[:200]}"
    tracker = values["track"]["name"]
    if tracker not in ("none", "tensorboard", "own"):  # an account and a project of the pod's choice, with our key
        values["track"] = {**values["track"], "name": "none", "entity": None}
        yield f"track={tracker} is left out"
    if values["objective"].get("root") is not None:
        values["objective"]["root"] = None
        yield "objective.root is left out"


def _model(values: dict[str, Any], pod_id: str, output_dir: Path) -> Iterator[str]:
    """A package is one that this project knows, a GGUF file lies in the model's folder, an id is on the Hub."""
    model = values["model"]
    if model["package"] is not None and model["package"] not in DEMO:
        model["package"] = None
        yield "model.package is left out"
    if model["gguf_file"] is not None and (".." in model["gguf_file"] or model["gguf_file"].startswith("/")):
        model["gguf_file"] = None
        yield "model.gguf_file is left out"
    if not _is_kept(model["id"], output_dir, hub=True):
        model["id"] = _unusable(model["id"], pod_id)
        yield f"model.id is {model['id']}"


def _places(told: RunSpec, values: dict[str, object], pod_id: str, output_dir: Path) -> Iterator[str]:
    keys = {key for key, _ in named_places(told)} | ({"data.id"} if told.data.id else set())
    if told.data.chat_template is not None and "/" in told.data.chat_template:
        keys.add("data.chat_template")
    for key in sorted(keys - {"model.id"}):
        place = get_place(values, key)
        if key == "deepspeed.config" and "/" not in place and (DEEPSPEED_CONFIGS / place).is_file():
            continue
        if is_code(key):
            place = place.rpartition(":")[0]
        if not _is_kept(place, output_dir, hub=key in ("data.id", "objective.tokenizer")):
            put_place(values, key, _unusable(place, pod_id))
            yield f"{key} is {get_place(values, key)}"


def _is_kept(place: str, output_dir: Path, hub: bool) -> bool:
    """An address, an id on the Hub, or a place on a pod's disk; none of them may be a file or folder of this machine,
    or become one: what a pod sends is put below `output_dir`."""
    if URL.fullmatch(place):
        return True
    if "\0" in place or os.path.lexists(os.path.expanduser(place)):
        return False
    if NOWHERE.fullmatch(place) or (hub and HUB_ID.fullmatch(place)):
        return True
    if not place.startswith(IN_PODS) or os.path.normpath(place) != place:
        return False
    return not Path(place).is_relative_to(output_dir.absolute()) and not Path(place).resolve().is_relative_to(
        output_dir.resolve()
    )


def _unusable(place: str, pod_id: str) -> str:
    """A path that is nowhere, and says where it was."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", PurePosixPath(place).name).lstrip("-.") or "file"
    return f"{OF_POD}{re.sub(r'[^A-Za-z0-9]+', '', pod_id)}/{name[:100]}"
