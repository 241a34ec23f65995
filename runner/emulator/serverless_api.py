"""/v2/serverless: endpoints as configuration. No worker starts here, and so nothing is billed."""

from __future__ import annotations

from fastapi import APIRouter, Response

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json, known, page
from runner.emulator.pods_api import config_of
from runner.emulator.settings import stamp
from runner.emulator.state import World, new_id

CONTAINER = ("image", "args", "disk", "ports", "env", "registry")
QUEUE_URLS = {
    "run": "run", "runSync": "runsync", "status": "status/{job_id}", "stream": "stream/{job_id}",
    "cancel": "cancel/{job_id}", "retry": "retry/{job_id}", "purgeQueue": "purge-queue", "health": "health",
}  # fmt: skip


def router(world: World) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/v2/serverless")

    def endpoint(identity: str) -> Json:
        return known(world.endpoints, identity, "endpoint")

    @api.get("")
    def list_endpoints(cursor: str | None = None) -> Json:
        return page("endpoints", [shown(e) for e in world.endpoints.values()], cursor, world.settings.page_size)

    @api.post("", status_code=201)
    def create_endpoint(body: Json) -> Json:
        made = _made(world, body)
        world.endpoints[made["id"]] = made
        return shown(made)

    @api.get("/{identity}")
    def get_endpoint(identity: str) -> Json:
        return shown(endpoint(identity))

    @api.delete("/{identity}", status_code=204)
    def delete_endpoint(identity: str) -> Response:
        del world.endpoints[endpoint(identity)["id"]]
        return Response(status_code=204)

    return api


def shown(endpoint: Json) -> Json:
    """The schema `Endpoint`."""
    return {name: value for name, value in endpoint.items() if name != "templateId"}


def _made(world: World, body: Json) -> Json:
    config = _config(world, body)
    if ("gpu" in body) == ("cpu" in body):
        raise ApiProblem(400, "exactly one of gpu or cpu is required")
    identity, workers = new_id(14), body.get("workers", {})
    volumes = [known(world.volumes, volume, "network volume")["id"] for volume in body.get("networkVolumes", [])]
    made: Json = {
        "id": identity, "name": body["name"], "type": body["type"], "requestUrls": _urls(identity, body["type"]),
        **config, "workers": {"min": workers.get("min", 0), "max": workers.get("max", 3)},
        "scaling": body["scaling"], "dataCenterIds": body.get("dataCenterIds", []),
        "networkVolumes": volumes, "timeout": body.get("timeout", 300_000),
        "flashboot": body.get("flashboot", "OFF"), "createdAt": stamp(world.clock.now()),
        "templateId": body.get("templateId"),
    }  # fmt: skip
    if made["workers"]["min"] > made["workers"]["max"]:
        raise ApiProblem(400, "workers.min must not exceed workers.max")
    if made["scaling"]["type"] == "QUEUE_DELAY" or body["type"] == "LOAD_BALANCER":
        made["workers"]["idleTimeout"] = workers.get("idleTimeout", 10)
    elif "idleTimeout" in workers:
        raise ApiProblem(400, "workers.idleTimeout is not applicable to scaling by requestCount")
    made |= _compute(body)
    return made


def _config(world: World, body: Json) -> Json:
    """Container settings, from the body over those of its template."""
    template: Json = {}
    if "templateId" in body:
        template = known(world.templates, body["templateId"], "template")
        if not template["serverless"]:
            raise ApiProblem(422, "Request validation failed.", ["$.templateId: is not a serverless template"])
    merged = {name: template[name] for name in CONTAINER if name in template} | body
    merged["env"] = {**template.get("env", {}), **body.get("env", {})}
    return {name: value for name, value in config_of(merged).items() if name in CONTAINER}


def _compute(body: Json) -> Json:
    if "cpu" in body:
        cpus = [cpu for cpu in body["cpu"] if cpu["id"] in hardware_catalog.cpus()]
        if len(cpus) < len(body["cpu"]):
            raise ApiProblem(400, "CPU flavor not found")
        memory = [int(c["vcpuCount"] * hardware_catalog.cpus()[c["id"]].ram_gb_per_vcpu) for c in cpus]
        return {"cpu": [{**cpu, "memory": gb} for cpu, gb in zip(cpus, memory, strict=True)]}
    gpu = body["gpu"]
    types = {one.id for one in hardware_catalog.gpus().values() if one.pool in gpu["pools"]}
    if unknown := set(gpu["pools"]) - {one.pool for one in hardware_catalog.gpus().values()}:
        raise ApiProblem(400, f"GPU pool {min(unknown)!r} not found")
    if strange := {text.strip() for text in gpu.get("excludedTypes", [])} - types:
        raise ApiProblem(400, f"excludedTypes: {min(strange)!r} is not in one of the pools")
    cuda = {"allowedCudaVersions": gpu.get("allowedCudaVersions", []), "minCudaVersion": gpu.get("minCudaVersion")}
    return {"gpu": {"count": 1, **gpu, **cuda}}


def _urls(identity: str, kind: str) -> Json:
    if kind == "QUEUE":
        return {name: f"https://api.runpod.ai/v2/{identity}/{path}" for name, path in QUEUE_URLS.items()}
    base = f"https://{identity}.api.runpod.ai"
    return {"base": base, "health": f"{base}/ping"}
