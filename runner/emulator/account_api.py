"""/v2/account, /v2/templates, /v2/network-volumes: what an account keeps beside pods."""

from __future__ import annotations

import shutil
from typing import Any

from fastapi import APIRouter, Response

from runner.emulator import catalog
from runner.emulator.answers import ApiProblem, Json, known, page
from runner.emulator.pod_creation import config_of
from runner.emulator.state import World, new_id

TEMPLATE_DEFAULTS = {
    "serverless": False, "public": False, "category": "NVIDIA", "startSsh": True, "startJupyter": True,
    "allowedCudaVersions": [],
}  # fmt: skip


def router(world: World) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/v2")
    _ssh_keys(api, world)
    _templates(api, world)
    api.include_router(network_volumes(world))
    return api


def _ssh_keys(api: APIRouter, world: World) -> None:
    @api.get("/account/ssh-keys")
    def get_keys() -> Json:
        return {"keys": world.ssh_keys}

    @api.put("/account/ssh-keys")
    def put_keys(body: Json) -> Json:
        world.ssh_keys = body["keys"]
        return {"keys": world.ssh_keys}


def _templates(api: APIRouter, world: World) -> None:
    for identity, (name, image, serverless) in catalog.content()["templates"].items():
        body = {"name": name, "image": image, "serverless": serverless, "public": True}
        body |= {} if serverless else {"ports": ["8888/http", "22/tcp"], "disk": 20}
        world.templates[identity] = {"id": identity, **_template(body)}

    def own(identity: str) -> Json:
        found = known(world.templates, identity, "template")
        if identity in catalog.content()["templates"]:
            raise ApiProblem(403, "access denied")
        return found

    @api.get("/templates")
    def list_templates(cursor: str | None = None) -> Json:
        mine = [t for t in world.templates.values() if t["id"] not in catalog.content()["templates"]]
        return page("templates", mine, cursor, world.settings.page_size)

    @api.post("/templates", status_code=201)
    def create_template(body: Json) -> Json:
        if any(template["name"] == body["name"] for template in world.templates.values()):
            raise ApiProblem(400, "template name must be unique")
        if body.get("serverless") and body.get("mounts", {}).get("persistent"):
            raise ApiProblem(400, "serverless templates cannot have a persistent mount")
        made = {"id": new_id(), **_template(body)}
        world.templates[made["id"]] = made
        return made

    @api.get("/templates/{identity}")
    def get_template(identity: str) -> Json:
        return known(world.templates, identity, "template")

    @api.delete("/templates/{identity}", status_code=204)
    def delete_template(identity: str) -> Response:
        own(identity)
        if any(endpoint["templateId"] == identity for endpoint in world.endpoints.values()):
            raise ApiProblem(400, "template is in use by an endpoint")
        del world.templates[identity]
        return Response(status_code=204)


def _template(body: Json) -> Json:
    kept = {name: body.get(name, default) for name, default in TEMPLATE_DEFAULTS.items()}
    return {"name": body["name"], **config_of(body), **kept}


def network_volumes(world: World) -> APIRouter:
    api = APIRouter(prefix="/network-volumes")

    def volume(identity: str) -> Json:
        return known(world.volumes, identity, "network volume")

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
        volume_folder(world, made["id"]).mkdir(parents=True)
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
        shutil.rmtree(volume_folder(world, identity), ignore_errors=True)
        return Response(status_code=204)

    return api


def volume_folder(world: World, identity: str) -> Any:
    """Where a volume's files are on this machine."""
    return world.root / "volumes" / identity
