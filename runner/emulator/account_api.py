"""/v2/account, /v2/templates, /v2/registries: what an account keeps and no machine runs."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from runner.emulator import catalog
from runner.emulator.clocks import stamp
from runner.emulator.errors import ApiProblem, not_found
from runner.emulator.paging import page
from runner.emulator.pod_creation import config_of
from runner.emulator.state import World, new_id

Json = dict[str, Any]
TEMPLATE_DEFAULTS = {
    "serverless": False, "public": False, "category": "NVIDIA", "startSsh": True, "startJupyter": True,
    "allowedCudaVersions": [],
}  # fmt: skip


def router(world: World) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/v2")
    _ssh_keys(api, world)
    _templates(api, world)
    _delegations(api, world)
    _registries(api, world)
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
        if identity not in world.templates:
            raise not_found("template")
        if identity in catalog.content()["templates"]:
            raise ApiProblem(403, "access denied")
        return world.templates[identity]

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
        if identity not in world.templates:
            raise not_found("template")
        return world.templates[identity]

    @api.patch("/templates/{identity}")
    def update_template(identity: str, body: Json) -> Json:
        own(identity).update(body)
        return world.templates[identity]

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


def _registries(api: APIRouter, world: World) -> None:
    @api.get("/registries")
    def list_registries(cursor: str | None = None) -> Json:
        return page("registries", list(world.registries.values()), cursor, world.settings.page_size)

    @api.post("/registries", status_code=201)
    def create_registry(body: Json) -> Json:
        made = {"id": new_id(), "name": body["name"]}  # its name and password are for RunPod's eyes only
        world.registries[made["id"]] = made
        return made

    @api.get("/registries/{identity}")
    def get_registry(identity: str) -> Json:
        if identity not in world.registries:
            raise not_found("registry")
        return world.registries[identity]

    @api.delete("/registries/{identity}", status_code=204)
    def delete_registry(identity: str) -> Response:
        if world.registries.pop(identity, None) is None:
            raise not_found("registry")
        return Response(status_code=204)


def _delegations(api: APIRouter, world: World) -> None:
    """Rights to pull from a private ECR repository. Before /registries/{id} would take their path for an id."""

    @api.get("/registries/delegations")
    def list_delegations(cursor: str | None = None) -> Json:
        return page("delegations", list(world.delegations.values()), cursor, world.settings.page_size)

    @api.post("/registries/delegations", status_code=201)
    def create_delegation(body: Json) -> Json:
        host, _, rest = body["resource"].partition("/")
        repository, _, tag = rest.partition(":")
        made = {
            "id": new_id(), "name": body.get("name"), "delegatorUserId": "user_emulated", "awsUser": "emulated",
            "repository": repository, "tag": tag or "latest", "awsRegion": "us-east-1", "dockerRegistryUri": host,
            "createdAt": stamp(world.clock.now()),
        }  # fmt: skip
        world.delegations[made["id"]] = made
        return made

    @api.delete("/registries/delegations/{identity}", status_code=204)
    def revoke(identity: str) -> Response:
        if world.delegations.pop(identity, None) is None:
            raise not_found("delegation")
        return Response(status_code=204)
