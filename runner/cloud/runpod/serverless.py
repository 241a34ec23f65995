"""Image, GPUs and variables that serve a tuned model on RunPod serverless."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from runner.errors import CannotRunError, Problem
from runner.paths import CONF
from runner.spec import ModelSpec

VOLUME = "/runpod-volume"
"""Where a serverless worker finds a network volume (a pod has the same one at /workspace)."""
MOST_GPUS = 8


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights are: a repository on the Hub, or a folder on a network volume."""

    path: str
    """`org/name`, or a path below `VOLUME`."""
    volume_id: str | None = None
    rank: int | None = None
    """Of an adapter, which needs its base beside it; None for a whole model."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """What one worker gets."""

    pools: list[str]
    count: int


@cache
def facts() -> dict[str, Any]:
    """conf/runpod/serving.yaml."""
    content: dict[str, Any] = yaml.safe_load((CONF / "runpod" / "serving.yaml").read_text("utf-8"))
    return content


def gpus_for(model: ModelSpec) -> Gpus:
    """The smallest GPUs of which one holds the weights in 16 bits, or else as few as divide the heads."""
    needed = weights_gb(model) / facts()["weights_share"]
    pools: dict[str, int] = facts()["pools"]
    for count in (1, 2, 4, MOST_GPUS):
        if model.num_heads and model.num_heads % count:
            continue  # vLLM shares out whole heads
        fitting = {name: size for name, size in pools.items() if size * count >= needed}
        if fitting:
            least = min(fitting.values())
            return Gpus([name for name, size in fitting.items() if size == least], count)
    what = f"{model.name} needs {needed:.0f} GB to be served in 16 bits, and {MOST_GPUS} GPUs have less"
    raise CannotRunError(Problem(what, None, "serve a smaller model, or a quantised one of your own"))


def weights_gb(model: ModelSpec) -> float:
    """The weights in 16 bits, in 10⁹ bytes; CannotRunError where their number is not known."""
    if model.num_parameters is None:
        what = f"the number of parameters of {model.id} is not known, and so neither is the GPU that holds it"
        raise CannotRunError(Problem(what, "model.num_parameters", "write --gpu POOL"))
    return model.num_parameters * 2 / 1e9


def variables(spec_model: ModelSpec, source: Source, name: str, context: int, secret: str | None) -> dict[str, str]:
    """The worker's environment (docs.runpod.io/serverless/vllm/environment-variables). `secret`: the name of the secret
    in RunPod's console that holds HF_TOKEN; the token itself is never sent."""
    env = {"MAX_MODEL_LEN": str(context), "OPENAI_SERVED_MODEL_NAME_OVERRIDE": name}
    if source.rank is None:
        env["MODEL_NAME"] = source.path
    else:
        adapter = {"name": name, "path": source.path, "base_model_name": spec_model.id}
        env |= {"MODEL_NAME": spec_model.id, "ENABLE_LORA": "true", "LORA_MODULES": json.dumps([adapter])}
        env |= {"MAX_LORA_RANK": str(_rank(source.rank)), "OPENAI_SERVED_MODEL_NAME_OVERRIDE": f"{name}-base"}
        if spec_model.revision:
            env["MODEL_REVISION"] = spec_model.revision
    if secret:
        env["HF_TOKEN"] = "{{ RUNPOD_SECRET_" + secret + " }}"
    return env


def _rank(rank: int) -> int:
    """The next that vLLM knows (`MaxLoRARanks`, vllm/config/lora.py)."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def template(name: str, model: ModelSpec, env: dict[str, str]) -> dict[str, Any]:
    """The request for the template that the endpoint is made from."""
    disk = facts()["spare_disk_gb"] + (round(weights_gb(model)) if model.num_parameters else 0)
    return {
        "name": name, "image": facts()["image"], "serverless": True, "env": env, "disk": disk,
        "startSsh": False, "startJupyter": False,
    }  # fmt: skip


def endpoint(name: str, template_id: str, gpus: Gpus, source: Source, max_workers: int, idle_s: int) -> dict[str, Any]:
    """The request for the endpoint. Without requests there is no worker, and nothing is paid for."""
    body: dict[str, Any] = {
        "name": name,
        "templateId": template_id,
        "type": "QUEUE",
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        "gpu": {"pools": gpus.pools, "count": gpus.count, "minCudaVersion": facts()["min_cuda"]},
        "workers": {"min": 0, "max": max_workers, "idleTimeout": idle_s},
        "flashboot": "FLASHBOOT",
    }
    if source.volume_id:
        body["networkVolumes"] = [source.volume_id]
    return body
