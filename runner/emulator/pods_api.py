"""/v2/pods: create (templates, rules across fields, capacity, price), list, get, update, delete, actions, logs."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json, epoch, known, page
from runner.emulator.pods import ACTIONS, LogLine, Pod, PodLog
from runner.emulator.settings import stamp
from runner.emulator.state import World, new_id

NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. Please refresh and try again."
)
MAX_VARIABLES = 50
FROM_TEMPLATE = ("image", "args", "disk", "ports", "registry", "startSsh", "startJupyter")


def placed(world: World, body: Json) -> Pod:
    """A pod that is asked for and allowed, not yet begun. ApiProblem: 400, 402, 404 or 422."""
    body = with_template(world, body)
    _rules(body)
    cloud = body.get("cloud", "SECURE")
    centers = _centers(world, body)
    compute, usd = _compute(body, cloud)
    centers = _capacity(world, body, cloud, centers)
    return Pod(
        name=body["name"],
        config=config_of(body),
        cloud=cloud,
        compute=compute,
        usd_per_hour=usd,
        data_centers=centers,
        folder=world.root / "pods" / (identity := new_id(14)),
        id=identity,
        clock=world.clock,
        log=PodLog(world.clock),
        public_key=_public_key(world, body),
        start_jupyter=body.get("startJupyter", False),
    )


def with_template(world: World, body: Json) -> Json:
    """The body over its template's settings; variables are merged one by one."""
    if "templateId" not in body:
        return body
    template = known(world.templates, body["templateId"], "template")
    if template["serverless"]:
        raise ApiProblem(422, "Request validation failed.", ["$.templateId: is a serverless template"])
    merged = {name: template[name] for name in FROM_TEMPLATE if template.get(name) is not None} | body
    merged["env"] = {**template["env"], **body.get("env", {})}
    if "cpu" not in body and "mounts" not in body and template["mounts"]:
        merged["mounts"] = template["mounts"]
    cuda: list[str] = template["allowedCudaVersions"]
    if cuda and "gpu" in body and not {"allowedCudaVersions", "minCudaVersion"} & set(body["gpu"]):
        merged["gpu"] = {**body["gpu"], "allowedCudaVersions": cuda}
    return merged


def config_of(body: Json) -> Json:
    """Return the container's configuration as the API shows it, with defaults."""
    return {
        "image": body["image"],
        "args": body.get("args", ""),
        "disk": body.get("disk", 10),
        "ports": body.get("ports", []),
        "env": dict(body.get("env", {})),
        "registry": body.get("registry"),
        "mounts": body.get("mounts", {}),
    }


def _rules(body: Json) -> None:
    """What the schema cannot say."""
    mounts = body.get("mounts", {})
    if ("gpu" in body) == ("cpu" in body):
        raise ApiProblem(400, "exactly one of gpu or cpu is required")
    if mounts.get("persistent") and mounts.get("network"):
        raise ApiProblem(400, "mounts.persistent and mounts.network are mutually exclusive")
    if "cpu" in body and mounts.get("persistent"):
        raise ApiProblem(400, "mounts.persistent is not supported on CPU pods")
    if mounts.get("network") and body.get("cloud") == "COMMUNITY":
        raise ApiProblem(400, "network volumes are only supported in the secure cloud")
    if len(body.get("env", {})) > MAX_VARIABLES:
        raise ApiProblem(400, f"at most {MAX_VARIABLES} environment variables are allowed")
    check_ports(body.get("ports", []))
    gpu = body.get("gpu", {})
    if gpu.get("allowedCudaVersions") and gpu.get("minCudaVersion"):
        raise ApiProblem(400, "allowedCudaVersions and minCudaVersion are mutually exclusive")


def check_ports(ports: list[str]) -> None:
    """`22/tcp`, `8888/http`."""
    for port in ports:
        if not re.fullmatch(r"[1-9]\d{0,4}/(tcp|http|udp)", port):
            raise ApiProblem(400, f"invalid port {port!r}: expected <port>/<protocol>")


def _centers(world: World, body: Json) -> list[str]:
    """Where the pod may be; with a network volume, where that is."""
    wanted: list[str] = body.get("dataCenterIds") or []
    for center in wanted:
        if center not in hardware_catalog.data_centers():
            raise ApiProblem(400, f"data center {center!r} not found")
    network = body.get("mounts", {}).get("network")
    if not network:
        return wanted or list(hardware_catalog.data_centers())
    volume = known(world.volumes, network[0]["volumeId"], "network volume")
    if wanted and volume["dataCenter"] not in wanted:
        raise ApiProblem(400, f"network volume {volume['id']} is in data center {volume['dataCenter']}")
    return [volume["dataCenter"]]


def _compute(body: Json, cloud: str) -> tuple[Json, float]:
    """What the API shows of the compute, and its price in US$ per hour."""
    if "cpu" in body:
        wanted = body["cpu"]
        cpu = hardware_catalog.cpus().get(wanted["id"])
        if cpu is None:
            raise ApiProblem(400, f"CPU flavor {wanted['id']!r} not found")
        count = wanted["vcpuCount"]
        if count & (count - 1) or not cpu.min_vcpu <= count <= cpu.max_vcpu:
            raise ApiProblem(400, f"vcpuCount {count} is not valid for {cpu.id}")
        return {"cpu": {**wanted, "memory": int(count * cpu.ram_gb_per_vcpu)}}, count * cpu.usd_per_vcpu
    wanted = body["gpu"]
    gpu = hardware_catalog.gpus().get(wanted["id"])
    if gpu is None:
        raise ApiProblem(400, f"GPU type {wanted['id']!r} not found")
    count = wanted.get("count", 1)
    if not gpu.usd_per_hour(cloud) or count > gpu.max_count:
        raise ApiProblem(400, NO_CAPACITY)
    return {"gpu": {"id": gpu.id, "count": count}}, count * gpu.usd_per_hour(cloud)


def _capacity(world: World, body: Json, cloud: str, centers: list[str]) -> list[str]:
    """Those of the data centres that have a machine: 402 without money, 400 without a machine."""
    if world.billed() >= world.settings.balance_usd:
        raise ApiProblem(402, "Insufficient balance to create a pod. Please add funds to your account.")
    gpu = body.get("gpu", {})
    facts = {"on": {"create"}, "gpu": {gpu.get("id")}, "cloud": {cloud}, "pod": {body["name"]}}
    has = [c for c in centers if not gpu or c in hardware_catalog.centers_of(gpu["id"])]
    free = [c for c in has if not world.faults.any("no_capacity", **facts, data_center={c})]
    if not free:
        fault = world.faults.take("no_capacity", **facts, data_center=set(centers))
        raise ApiProblem(400, fault.detail if fault and fault.detail else NO_CAPACITY)
    limit = world.settings.max_pods
    if limit is not None and sum(p.status != "EXITED" for p in world.engine.pods.values()) >= limit:
        raise ApiProblem(400, NO_CAPACITY)
    offered = hardware_catalog.content()["cuda_versions"]
    floor = gpu.get("minCudaVersion")
    allowed = gpu.get("allowedCudaVersions") or [v for v in offered if not floor or _version(v) >= _version(floor)]
    if gpu and not set(allowed) & set(offered):
        raise ApiProblem(400, NO_CAPACITY)
    return free


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _public_key(world: World, body: Json) -> str:
    """The account's keys, for a pod with `startSsh` that brings none of its own."""
    if not body.get("startSsh") or "PUBLIC_KEY" in body.get("env", {}):
        return ""
    return "\n".join(world.ssh_keys)


POLL_S = 0.05
DEFAULT_TAIL = 100


def router(world: World) -> APIRouter:
    """The routes."""
    api, engine = APIRouter(prefix="/v2/pods"), world.engine

    def shown(pod: Pod) -> Json:
        return pod.answer(world.settings.runtime_s)

    @api.get("")
    def list_pods(cursor: str | None = None) -> Json:
        pods = listed(world)
        return page("pods", [shown(pod) for pod in pods], cursor, world.settings.page_size)

    @api.post("", status_code=201)
    def create_pod(body: Json) -> Json:
        with engine.lock:  # two requests for the last machine
            made = engine.add(placed(world, body))
            if world.faults.take("double", on={"any", "create"}, pod=made.names):
                engine.add(placed(world, body))
            return shown(made)

    @api.get("/{identity}")
    def get_pod(identity: str) -> Json:
        return shown(world.pod(identity))

    @api.patch("/{identity}")
    def update_pod(identity: str, body: Json) -> Json:
        pod = world.pod(identity)
        with engine.lock:
            update(pod, body)
        return shown(pod)

    @api.delete("/{identity}", status_code=204)
    def delete_pod(identity: str) -> Response:
        engine.terminate(world.pod(identity))
        return Response(status_code=204)

    @api.post("/{identity}/action")
    def act(identity: str, body: Json) -> object:
        pod, action = world.pod(identity), body["action"]
        if action not in ACTIONS[pod.status]:
            raise ApiProblem(409, f"action {action!r} is not valid for a pod that is {pod.status}")
        if pod.locked and action in ("stop", "restart"):
            raise ApiProblem(409, "pod is locked")
        getattr(engine, action)(pod)
        return Response(status_code=204) if action == "terminate" else shown(pod)

    @api.get("/{identity}/logs")
    def logs(request: Request, identity: str, source: str | None = None, tail: int = DEFAULT_TAIL) -> Any:
        pod = world.pod(identity)
        first = _first(pod, tail, request.query_params.get("since"), request.headers.get("last-event-id"))
        headers = {"Cache-Control": "no-cache", "Connection": "keep-alive", "X-Accel-Buffering": "no"}
        stream = _stream(world, pod, source, first, request)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    return api


def listed(world: World) -> list[Pod]:
    """Pods that a list shows now, oldest first."""
    with world.engine.lock:
        return [pod for pod in world.engine.pods.values() if pod.listed_from <= time.monotonic()]


def update(pod: Pod, body: Json) -> None:
    """Change what is named; the container sees it when it starts next."""
    mounts = body.get("mounts") or {}
    if any(kind not in pod.config["mounts"] for kind in mounts):
        raise ApiProblem(400, "the kind of mount is fixed when the pod is created")
    if "network" in mounts and [m["volumeId"] for m in mounts["network"]] != [(pod.network() or {})["volumeId"]]:
        raise ApiProblem(400, "the network volume of a pod cannot be changed")
    check_ports(body.get("ports", []))
    for name in ("image", "args", "disk", "ports", "env", "registry"):
        if name in body:
            pod.config[name] = body[name]
    pod.config["mounts"] = {**pod.config["mounts"], **mounts}
    pod.name, pod.locked = body.get("name", pod.name), body.get("locked", pod.locked)
    pod.global_networking = body.get("globalNetworking", pod.global_networking)


def _first(pod: Pod, tail: int, since: str | None, last_id: str | None) -> int:
    """Number of the last line that is not wanted."""
    lines = pod.log.lines()
    number = re.search(r"/(\d+)$", last_id or "")
    if number:
        return int(number[1])
    if moment := last_id or since:
        began = epoch("since", moment)
        return max((line.number for line in lines if line.time < began), default=0)
    return lines[-tail - 1].number if len(lines) > tail else 0


async def _stream(world: World, pod: Pod, source: str | None, last: int, request: Request) -> AsyncIterator[str]:
    """Server-sent events for as long as somebody listens and the pod exists."""
    while True:
        exists = pod.id in world.engine.pods
        for line in pod.log.lines(last):
            last = line.number
            if source in (None, line.source):
                yield _event(line)
        if not exists or world.engine.closing or await request.is_disconnected():
            return
        await asyncio.sleep(POLL_S)


def _event(line: LogLine) -> str:
    moment = stamp(line.time)
    data = json.dumps({"ts": moment, "source": line.source, "line": line.text}, ensure_ascii=False)
    return f"id: {moment}/{line.number:012d}\ndata: {data}\n\n"
