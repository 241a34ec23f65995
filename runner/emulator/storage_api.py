"""/v2/network-volumes: storage that outlives pods, in one data centre."""

from __future__ import annotations

import shutil
from typing import Any

from fastapi import APIRouter, Response

from runner.emulator import catalog
from runner.emulator.errors import ApiProblem, not_found
from runner.emulator.paging import page
from runner.emulator.state import World, new_id

Json = dict[str, Any]


def router(world: World) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/v2/network-volumes")

    def volume(identity: str) -> Json:
        if identity not in world.volumes:
            raise not_found("network volume")
        return world.volumes[identity]

    @api.get("")
    def list_volumes(cursor: str | None = None) -> Json:
        return page("networkVolumes", list(world.volumes.values()), cursor, world.settings.page_size)

    @api.post("", status_code=201)
    def create_volume(body: Json) -> Json:
        center = catalog.data_centers().get(body["dataCenter"])
        if center is None:
            raise ApiProblem(400, f"data center {body['dataCenter']!r} not found")
        kind = body.get("type") or center.volume_types[0]
        if kind not in center.volume_types:
            raise ApiProblem(400, f"data center {center.id} has no {kind} network volumes")
        made = {"id": new_id(), "name": body["name"], "size": body["size"], "dataCenter": center.id, "type": kind}
        folder(world, made["id"]).mkdir(parents=True)
        world.volumes[made["id"]], world.volume_since[made["id"]] = made, world.clock.billed()
        return made

    @api.get("/{identity}")
    def get_volume(identity: str) -> Json:
        return volume(identity)

    @api.patch("/{identity}")
    def update_volume(identity: str, body: Json) -> Json:
        found = volume(identity)
        if body.get("size", found["size"]) < found["size"]:
            raise ApiProblem(400, "the size of a network volume can only be increased")
        found.update(body)
        return found

    @api.delete("/{identity}", status_code=204)
    def delete_volume(identity: str) -> Response:
        volume(identity)
        for pod in list(world.engine.pods.values()):
            if (pod.network() or {}).get("volumeId") == identity:
                raise ApiProblem(400, f"network volume is in use by pod {pod.id}")
        del world.volumes[identity]
        shutil.rmtree(folder(world, identity), ignore_errors=True)
        return Response(status_code=204)

    return api


def folder(world: World, identity: str) -> Any:
    """Where a volume's files are on this machine."""
    return world.root / "volumes" / identity
