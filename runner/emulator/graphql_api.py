"""/graphql, as long as RunPod serves it: `myself`, which the SDK asks after new ssh keys, and pods with a bid (spot).

REST v2 has no spot. Of GraphQL there is no more here than these two, and mutations take their input as `$input`.
"""

from __future__ import annotations

from fastapi import APIRouter

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json
from runner.emulator.pods_api import NO_CAPACITY, placed
from runner.emulator.state import World

LOWEST_BID = 0.5
"""Of the community price: what is bid must not be less. RunPod publishes a minimum per GPU."""


def router(world: World) -> APIRouter:
    """The route."""
    api = APIRouter()

    @api.post("/graphql")
    def graphql(body: Json) -> Json:
        query, variables = str(body.get("query", "")), body.get("variables") or {}
        try:
            if "podRentInterruptable" in query:
                return {"data": {"podRentInterruptable": _rent(world, variables["input"])}}
            if "myself" in query:
                return {"data": {"myself": _myself(world)}}
        except ApiProblem as problem:
            return {"errors": [{"message": problem.detail}], "data": None}
        except KeyError as missing:
            return {"errors": [{"message": f"Field {missing} of required type was not provided."}], "data": None}
        return {"errors": [{"message": "Cannot query field: the emulator knows myself and podRentInterruptable"}]}

    return api


def _myself(world: World) -> Json:
    volumes = [
        {"id": v["id"], "name": v["name"], "size": v["size"], "dataCenterId": v["dataCenter"]}
        for v in world.volumes.values()
    ]
    balance = world.settings.balance_usd - world.billed()
    keys = "\n".join(world.ssh_keys)
    return {"id": "user_emulated", "pubKey": keys, "networkVolumes": volumes, "clientBalance": balance}


def _rent(world: World, asked: Json) -> Json:
    """A pod that may be taken away; it costs what was bid."""
    gpu, count = hardware_catalog.gpus().get(asked["gpuTypeId"]), int(asked.get("gpuCount", 1))
    bid = float(asked["bidPerGpu"])
    cloud = "COMMUNITY" if asked.get("cloudType") == "COMMUNITY" else "SECURE"
    if gpu is None or bid < LOWEST_BID * gpu.usd_per_hour(cloud):
        raise ApiProblem(400, NO_CAPACITY)
    body: Json = {
        "name": asked["name"], "image": asked["imageName"], "cloud": cloud,
        "gpu": {"id": gpu.id, "count": count, "allowedCudaVersions": asked.get("allowedCudaVersions")},
        "args": asked.get("dockerArgs") or "", "disk": int(asked.get("containerDiskInGb") or 10),
        "ports": [port for port in (asked.get("ports") or "").split(",") if port],
        "env": {pair["key"]: pair["value"] for pair in asked.get("env") or []},
        "dataCenterIds": [asked["dataCenterId"]] if asked.get("dataCenterId") else [],
        "startSsh": bool(asked.get("startSsh")),
    }  # fmt: skip
    path = asked.get("volumeMountPath") or "/workspace"
    if asked.get("networkVolumeId"):
        body["mounts"] = {"network": [{"volumeId": asked["networkVolumeId"], "path": path}]}
    elif asked.get("volumeInGb"):
        body["mounts"] = {"persistent": {"size": int(asked["volumeInGb"]), "path": path}}
    with world.engine.lock:
        pod = placed(world, body)
        pod.usd_per_hour, pod.interruptible = bid * count, True
        world.engine.add(pod)
    machine = {"podHostId": f"{pod.id}-{pod.key[-8:].lower()}"}
    return {
        "id": pod.id,
        "imageName": body["image"],
        "machineId": pod.id,
        "costPerHr": pod.usd_per_hour,
        "machine": machine,
    }
