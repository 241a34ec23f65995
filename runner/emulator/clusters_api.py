"""/v2/clusters: several pods under one name. All of them are this machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastapi import APIRouter, Response

from runner.emulator.clocks import stamp
from runner.emulator.errors import not_found
from runner.emulator.paging import page
from runner.emulator.pod_creation import placed
from runner.emulator.pods import Pod
from runner.emulator.state import World, new_id

Json = dict[str, Any]
ROLES = {"SLURM": ("SLURM_CONTROLLER", "SLURM_COMPUTE"), "RAY": ("RAY_HEAD", "RAY_WORKER")}


def router(world: World) -> APIRouter:
    """The routes."""
    api, engine = APIRouter(prefix="/v2/clusters"), world.engine

    def members(identity: str) -> list[Pod]:
        with engine.lock:
            return [pod for pod in engine.pods.values() if pod.cluster and pod.cluster["id"] == identity]

    def shown(identity: str) -> Json:
        if identity not in world.clusters:
            raise not_found("cluster")
        pods = members(identity)
        summary = {"total": len(pods), "byStatus": dict(Counter(pod.status for pod in pods))}
        primary = {"podId": pods[0].id, "status": pods[0].status} if pods else None
        found = {**world.clusters[identity], "pods": summary}
        if pods and pods[0].data_center:
            found["dataCenterId"] = pods[0].data_center
        return {**found, "primary": primary} if primary else found

    @api.get("")
    def list_clusters(cursor: str | None = None) -> Json:
        return page("clusters", [shown(identity) for identity in world.clusters], cursor, world.settings.page_size)

    @api.post("", status_code=201)
    def create_cluster(body: Json) -> Json:
        compute, identity = body["compute"], new_id()
        gpu = {"id": compute["gpuTypeId"], "count": compute["gpuCountPerPod"]}
        pod_body = {k: v for k, v in body.items() if k not in ("compute", "type")} | {"gpu": gpu}
        pod_body.setdefault("image", "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404")
        with engine.lock:  # all of them or none
            pods = [
                placed(world, {**pod_body, "name": f"{body['name']}-{rank}"}, _member(identity, rank, body["type"]))
                for rank in range(compute["podCount"])
            ]
            world.clusters[identity] = {
                "id": identity, "name": body["name"], "type": body["type"], "compute": compute,
                "network": {"cidr": "127.0.0.0/8"}, "createdAt": stamp(world.clock.now()),
            }  # fmt: skip
            for pod in pods:
                engine.add(pod)
        return shown(identity)

    @api.get("/{identity}")
    def get_cluster(identity: str) -> Json:
        return shown(identity)

    @api.patch("/{identity}")
    def update_cluster(identity: str, body: Json) -> Json:
        shown(identity)
        world.clusters[identity].update(body)
        return shown(identity)

    @api.delete("/{identity}", status_code=204)
    def delete_cluster(identity: str) -> Response:
        shown(identity)
        for pod in members(identity):
            engine.terminate(pod)
        del world.clusters[identity]
        return Response(status_code=204)

    @api.get("/{identity}/pods")
    def cluster_pods(identity: str) -> Json:
        shown(identity)
        return {"pods": [pod.answer(world.settings.runtime_s) for pod in members(identity)]}

    return api


def _member(identity: str, rank: int, kind: str) -> Json:
    member: Json = {"id": identity, "rank": rank, "ip": "127.0.0.1"}
    if kind in ROLES:
        member["role"] = ROLES[kind][0 if rank == 0 else 1]
    return member
