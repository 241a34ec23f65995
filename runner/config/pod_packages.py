"""Packages that a rented pod gets for a run: what is installed there, and what the plan counts on there."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

from runner.config.tracker_packages import package_of
from runner.errors import Problem, RequestError
from runner.paths import CONF, CONSTRAINTS
from runner.spec import RentedPlace, RunSpec

OWN_PYTHON = "RUNNER_POD_PYTHON"
FLASH = "flash_attention_2"


def extra_requirements(spec: RunSpec) -> list[str]:
    """Requirements beyond those of every run, as pip takes them. flash-attn is there only where it is named."""
    return [
        *(["boto3"] if str(spec.push.to).startswith("s3:") else []),
        *(["gguf>=0.19"] if spec.model.gguf_file else []),
        *(["liger-kernel"] if spec.train.liger is True else []),
        *(package.requirements if (package := package_of(spec.track.name)) else ()),
        *(["flash-attn", "einops"] if spec.train.attention == FLASH else []),
    ]


def has_flash(spec: RunSpec) -> bool:
    """The pod of a rented run will have flash-attn."""
    return "flash-attn" in extra_requirements(spec)


def flash_attn_wheels(spec: RunSpec) -> list[dict[str, Any]]:
    """Return flash-attn wheels for the pod's GPUs, torch and Python, one per build of torch; empty if none is known."""
    place, capability = spec.where, spec.hw.compute_capability
    if not isinstance(place, RentedPlace) or not has_flash(spec) or capability is None:
        return []
    python, torch = _python(place), _torch()
    return [
        wheel
        for wheel in runpod_table("flash_attn")
        if (wheel["torch"], wheel["python"]) == (torch, python)
        and wheel["capability"][0] <= capability <= wheel["capability"][1]
    ]


def least_cuda(spec: RunSpec) -> str | None:
    """Return the least CUDA version of the host's driver for a wheel."""
    builds = [wheel["build"] for wheel in flash_attn_wheels(spec)]
    return "13.0" if builds == [""] else None


def check_flash_attention(spec: RunSpec) -> None:
    """RequestError where FlashAttention is named for a pod that cannot get it."""
    attention, place = spec.train.attention, spec.where
    if not isinstance(place, RentedPlace) or not attention.startswith("flash") or os.environ.get(OWN_PYTHON):
        return
    own = f"or name a Python of the image that has it: {OWN_PYTHON}"
    if attention != FLASH:
        what = "no wheel of it is known for the torch that a pod gets"
        remedy = f"write train.attention={FLASH} or varlen"
    elif _python(place) is None:
        named = f"pod {place.pod}" if place.pod else place.template or place.image
        what = f"which Python {named} has is not known, and a wheel of flash-attn is for one alone"
        key = "pod" if place.pod else "template" if place.template else "image"
        remedy = f"write train.attention=varlen, or leave out where.{key}; {own}"
    elif not flash_attn_wheels(spec):
        what = f"no wheel of flash-attn is known for torch {_torch()} on {spec.hw.name}"
        remedy = f"write train.attention=varlen; {own}"
    elif least_cuda(spec) and place.cuda_versions and "13.0" not in place.cuda_versions:
        what = f"on {spec.hw.name} it needs CUDA 13.0"
        remedy = "leave out where.cuda_versions, or write where.cuda_versions='[\"13.0\"]'"
    else:
        return
    raise RequestError(Problem(f"train.attention={attention} in a pod: {what}", "train.attention", remedy))


def image_note(spec: RunSpec) -> str | None:
    """What the image brings, where it is one whose name says more than it is used for."""
    place = spec.where
    if not isinstance(place, RentedPlace) or place.template or place.pod:
        return None
    brings = runpod_table("images").get(place.image, {}).get("brings")
    own = "for shells and notebooks; a run has packages of its own"
    return f"where.image={place.image} brings {brings}, {own}" if brings else None


@cache
def runpod_table(name: str) -> Any:
    """A file of conf/runpod."""
    import yaml  # 20 ms

    return yaml.safe_load((CONF / "runpod" / f"{name}.yaml").read_text("utf-8"))


def _python(place: RentedPlace) -> str | None:
    """Version of the image's `python3`; None where it is not known."""
    if place.template is not None or place.pod is not None:
        return None
    for name, image in runpod_table("images").items():
        if place.image in (name, image["image"]):
            found: str | None = image.get("python")
            return found
    return None


@cache
def _torch() -> str | None:
    """`2.13` of the pins."""
    try:
        pinned = re.search(r"^torch==(\d+\.\d+)", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
    except OSError:
        return None
    return pinned[1] if pinned else None
