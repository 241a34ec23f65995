"""/v2/account, /v2/templates, /v2/network-volumes and /v2/billing/pods: what an account keeps, and what it has paid."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json, epoch, known, page
from runner.emulator.pods import Pod
from runner.emulator.pods_api import config_of
from runner.emulator.settings import stamp
from runner.emulator.state import World, new_id, volume_folder

TEMPLATE_DEFAULTS = {
    "serverless": False, "public": False, "category": "NVIDIA", "startSsh": True, "startJupyter": True,
    "allowedCudaVersions": [],
}  # fmt: skip


def router(world: World) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/v2")
    _ssh_keys(api, world)
    _templates(api, world)
    _bill_of_pods(api, world)
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
    for identity, (name, image, serverless) in hardware_catalog.content()["templates"].items():
        body = {"name": name, "image": image, "serverless": serverless, "public": True}
        body |= {} if serverless else {"ports": ["8888/http", "22/tcp"], "disk": 20}
        world.templates[identity] = {"id": identity, **_template(body)}

    def own(identity: str) -> Json:
        found = known(world.templates, identity, "template")
        if identity in hardware_catalog.content()["templates"]:
            raise ApiProblem(403, "access denied")
        return found

    @api.get("/templates")
    def list_templates(cursor: str | None = None) -> Json:
        mine = [t for t in world.templates.values() if t["id"] not in hardware_catalog.content()["templates"]]
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
        center = hardware_catalog.data_centers().get(body["dataCenter"])
        if center is None:
            raise ApiProblem(400, f"data center {body['dataCenter']!r} not found")
        kind = body.get("type") or center.volume_types[0]
        if kind not in center.volume_types:
            raise ApiProblem(400, f"data center {center.id} has no {kind} network volumes")
        made = {"id": new_id(), "name": body["name"], "size": body["size"], "dataCenter": center.id, "type": kind}
        volume_folder(world.root, made["id"]).mkdir(parents=True)
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
        shutil.rmtree(volume_folder(world.root, identity), ignore_errors=True)
        return Response(status_code=204)

    return api


BUCKET_S = {"hour": 3600.0, "day": 86_400.0, "week": 604_800.0, "month": 2_592_000.0, "year": 31_536_000.0}
"""A month of 30 days and a year of 365: the emulator has no calendar."""
DEFAULT_S = 30 * 86_400.0
KINDS = ("gpu", "cpu", "disk")
AMOUNTS = tuple(f"{kind}Amount" for kind in KINDS)


@dataclass(frozen=True)
class Window:
    """The time that is asked about, in buckets."""

    start: float
    end: float
    bucket: str

    def buckets(self) -> Iterator[tuple[float, float]]:
        """Start and end of each, in seconds since the epoch."""
        step, start = BUCKET_S[self.bucket], self.start
        while start < self.end:
            yield start, start + step
            start += step

    def query(self) -> Json:
        """How an answer repeats it."""
        return {**_range(self.start, self.end), "bucketSize": self.bucket}


def _bill_of_pods(api: APIRouter, world: World) -> None:
    @api.get("/billing/pods")
    def bill_of_pods(request: Request) -> Json:
        asked, chosen = _window(world, request.query_params), request.query_params.get("podId")
        records = [
            record
            for start, end in asked.buckets()
            for pod in world.engine.all_pods()
            if chosen in (None, pod.id)
            for record in _record(world, pod, start, end)
        ]
        totals = {name: sum(record[name] for record in records) for name in ("totalAmount", *AMOUNTS)}
        query = {**asked.query(), "podId": chosen}
        pods = len({record["podId"] for record in records})
        metadata = {"query": query, "recordCount": len(records), "totals": totals, "uniquePodCount": pods}
        return {"records": records, "metadata": metadata}


def _window(world: World, query: Mapping[str, str]) -> Window:
    bucket, last = query.get("bucketSize", "day"), query.get("lastN")
    start, end = query.get("startTime"), query.get("endTime")
    step, now = BUCKET_S[bucket], world.clock.now()
    if last is not None:
        if start or end:
            raise ApiProblem(400, "lastN and startTime/endTime are mutually exclusive")
        until = math.ceil(now / step) * step
        return Window(until - int(last) * step, until, bucket)
    begin, until = epoch("startTime", start) if start else now - DEFAULT_S, epoch("endTime", end) if end else now
    return Window(math.floor(begin / step) * step, math.ceil(until / step) * step, bucket)


def _record(world: World, pod: Pod, start: float, end: float) -> list[Json]:
    """One, if there is anything to pay."""
    amounts = {f"{kind}Amount": _usd(world, pod, start, end, kind) for kind in KINDS}
    total = sum(amounts.values())
    return [{**_range(start, end), "podId": pod.id, "totalAmount": total, **amounts}] if total else []


def _usd(world: World, pod: Pod, start: float, end: float, kind: str) -> float:
    since, until = _billed_at(world, start), min(_billed_at(world, end), world.clock.billed())
    return sum(segment.usd(until, since) for segment in pod.segments if segment.kind == kind)


def _billed_at(world: World, epoch: float) -> float:
    """The billing clock at a moment of the bill, which ends now: what speed adds lies in the past."""
    return world.clock.billed() - (world.clock.now() - epoch)


def _range(start: float, end: float) -> Json:
    return {"startTime": stamp(start), "endTime": stamp(end)}
