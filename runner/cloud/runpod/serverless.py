"""Serverless endpoints: deploy a run's model behind one, and delete it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from runner.cloud.provider_errors import CloudError, UnclearError
from runner.cloud.runpod.account_key import CONSOLE
from runner.cloud.runpod.api import Api
from runner.errors import CannotRunError, Problem, RequestError
from runner.paths import CONF
from runner.rundir.directory import RunDir
from runner.spec import ModelSpec, Peft, RunSpec

VOLUME = "/runpod-volume"
"""Where a serverless worker finds a network volume (a pod has the same one at /workspace)."""
MOST_GPUS = 8


@dataclass(frozen=True, slots=True)
class Source:
    """Source of the weights: a repository on the Hub, or a folder on a network volume."""

    path: str
    """`org/name`, or a path below `VOLUME`."""
    volume_id: str | None = None
    rank: int | None = None
    """Of an adapter, which needs its base beside it; None for a whole model."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs of one worker."""

    pools: list[str]
    count: int


@cache
def serving_facts() -> dict[str, Any]:
    """conf/runpod/serving.yaml."""
    content: dict[str, Any] = yaml.safe_load((CONF / "runpod" / "serving.yaml").read_text("utf-8"))
    return content


def gpus_for(model: ModelSpec) -> Gpus:
    """The smallest GPUs of which one holds the weights in 16 bits, or else as few as divide the heads."""
    needed = weights_gb(model) / serving_facts()["weights_share"]
    pools: dict[str, int] = serving_facts()["pools"]
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
        what = f"the number of parameters of {model.id} is not known, so no GPU can be chosen for it"
        raise CannotRunError(Problem(what, "model.num_parameters", "write --gpu POOL"))
    return model.num_parameters * 2 / 1e9


def worker_variables(
    spec_model: ModelSpec, source: Source, name: str, context: int, secret: str | None
) -> dict[str, str]:
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


def template_request(name: str, model: ModelSpec, env: dict[str, str]) -> dict[str, Any]:
    """The request for the template that the endpoint is made from."""
    disk = serving_facts()["spare_disk_gb"] + (round(weights_gb(model)) if model.num_parameters else 0)
    return {
        "name": name, "image": serving_facts()["image"], "serverless": True, "env": env, "disk": disk,
        "startSsh": False, "startJupyter": False,
    }  # fmt: skip


def endpoint_request(
    name: str, template_id: str, gpus: Gpus, source: Source, max_workers: int, idle_s: int
) -> dict[str, object]:
    """The request for the endpoint. Without requests there is no worker, and nothing is paid for."""
    body: dict[str, Any] = {
        "name": name,
        "templateId": template_id,
        "type": "QUEUE",
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        "gpu": {"pools": gpus.pools, "count": gpus.count, "minCudaVersion": serving_facts()["min_cuda"]},
        "workers": {"min": 0, "max": max_workers, "idleTimeout": idle_s},
        "flashboot": "FLASHBOOT",
    }
    if source.volume_id:
        body["networkVolumes"] = [source.volume_id]
    return body


RECORD = "endpoint.json"
"""In the run's folder: what was asked for, written before it is, and what came of it."""
CONTEXT = 4096
"""Tokens of a request and its answer, where the model is not known to have fewer: keys and values take memory."""


@dataclass(frozen=True)
class DeployOptions:
    """Options of `deploy`."""

    repo: str | None = None
    volume: str | None = None
    merged: bool = False
    pools: tuple[str, ...] = ()
    max_workers: int = 1
    idle_seconds: int = 10
    secret: str | None = None


def deploy(run_dir: Path, wanted: DeployOptions, agreed: Callable[[str], bool]) -> dict[str, object]:
    """Make template and endpoint; the facts of `endpoint.json`. `agreed` is asked before anything is made.

    RequestError where the model is in no place that a worker reaches, or has an endpoint already.
    """
    run = RunDir.find(run_dir)
    spec = run.spec
    known = run.read(RECORD)
    if known.get("endpoint"):
        remedy = f"python -m runner deploy --delete {quote(str(run.path))}"
        raise RequestError(Problem(f"{run.path} has the endpoint {known['endpoint']} already", None, remedy))
    source = _source(run, spec, wanted)
    gpus = Gpus(list(wanted.pools), 1) if wanted.pools else gpus_for(spec.model)
    name = f"runner-{run.id}"
    context = min(spec.model.context_length or CONTEXT, CONTEXT)
    env = worker_variables(spec.model, source, run.id, context, wanted.secret)
    what = f"{source.path} on {gpus.count} × {' or '.join(gpus.pools)}, 0 to {wanted.max_workers} workers, paid by use"
    if not agreed(what):
        raise RequestError(Problem("not deployed", None, "--yes deploys without asking"))
    api = Api()
    run.write(RECORD, {"name": name, "model": source.path})
    body = template_request(name, spec.model, env)
    template = _made(lambda: api.create_template(body), api.templates, name)
    try:
        request = endpoint_request(name, template, gpus, source, wanted.max_workers, wanted.idle_seconds)
        identity = _made(lambda: str(api.create_endpoint(request)["id"]), api.endpoints, name)
    except Exception:
        with suppress(CloudError):
            api.delete_template(template)
        raise
    facts = {
        "name": name, "model": source.path, "template": template, "endpoint": identity, "gpus": gpus.pools,
        "gpu_count": gpus.count, "openai_base_url": f"https://api.runpod.ai/v2/{identity}/openai/v1",
        "served_model": run.id, "console": f"{CONSOLE}/serverless/user/endpoint/{identity}",
    }  # fmt: skip
    run.write(RECORD, facts)
    return facts


def delete(run_dir: Path) -> list[str]:
    """Delete the endpoint and the template of a run, found by their name; what was deleted. Absence is confirmed.

    CloudError where something is still there.
    """
    run = RunDir.find(run_dir)
    name = run.read(RECORD).get("name") or f"runner-{run.id}"
    api, gone = Api(), []
    kinds = ((api.endpoints, api.delete_endpoint, "endpoint"), (api.templates, api.delete_template, "template"))
    for listed, remove, kind in kinds:  # a template in use cannot be deleted
        for identity in _named(listed, name):
            remove(identity)
            gone.append(f"{kind} {identity}")
        left = _named(listed, name)
        if left:
            what, remedy = f"the {kind} {left[0]} is still there", f"delete it at {CONSOLE}/serverless"
            raise CloudError(Problem(what, None, remedy))
    (run.path / RECORD).unlink(missing_ok=True)
    return gone


def _source(run: RunDir, spec: RunSpec, wanted: DeployOptions) -> Source:
    """Where a worker finds the weights; RequestError where it finds none."""
    adapter = spec.method.adapts and not wanted.merged
    if adapter and isinstance(spec.method, Peft):
        what = f"a worker loads adapters of LoRA alone, and method={spec.method.name} is {spec.method.peft_type}"
        remedy = f"python -m runner merge {quote(str(run.path))}, push --merged, and deploy --merged"
        raise RequestError(Problem(what, None, remedy))
    rank = getattr(spec.method, "rank", None) if adapter else None
    if adapter and (spec.model.package or Path(spec.model.id).is_dir()):
        what, remedy = f"a worker cannot reach the base of the adapter, {spec.model.id}", "merge it, push --merged, and"
        raise RequestError(Problem(what, None, f"{remedy} deploy --merged"))
    folder = "merged" if wanted.merged else "model"
    if wanted.volume:
        return Source(f"{VOLUME}/runs/{run.id}/{folder}", wanted.volume, rank)
    pushed = run.read("pushed.json")
    repo = wanted.repo or (pushed.get("repo") if pushed.get("folder") == folder else None)
    if repo is None:
        flag = " --merged" if wanted.merged else ""
        push = f"python -m runner push {quote(str(run.path))} org/name{flag}"
        remedy = f"{push}, or name where it is: --repo org/name, --volume ID"
        raise RequestError(Problem(f"{folder}/ of {run.path} is not on the Hub", None, remedy))
    return Source(str(repo), None, rank)


def _made(make: Callable[[], str], listed: Callable[[], list[dict[str, object]]], name: str) -> str:
    """The id of what is made; where the answer was lost, of what bears the name. A create is never sent twice."""
    try:
        return make()
    except UnclearError:
        found = _named(listed, name)
        if not found:
            raise
        return found[0]


def _named(listed: Callable[[], list[dict[str, Any]]], name: str) -> list[str]:
    """Ids by name. RunPod adds ` -fb` to the name of an endpoint with FlashBoot."""
    return [str(entry["id"]) for entry in listed() if str(entry.get("name", "")).removesuffix(" -fb") == name]
