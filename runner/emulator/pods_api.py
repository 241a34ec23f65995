"""/v2/pods: create, list, get, update, delete, actions, logs."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from runner.emulator.answers import ApiProblem, Json, page
from runner.emulator.pod_creation import check_ports, placed
from runner.emulator.pods import ACTIONS, LogLine, Pod
from runner.emulator.settings import stamp
from runner.emulator.state import World

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
            update(world, pod, body)
        return shown(pod)

    @api.delete("/{identity}", status_code=204)
    def delete_pod(identity: str) -> Response:
        engine.terminate(world.pod(identity))
        return Response(status_code=204)

    @api.post("/{identity}/action")
    def act(identity: str, body: Json) -> Any:
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


def update(world: World, pod: Pod, body: Json) -> None:
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
        try:
            epoch = datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
        except ValueError:
            raise ApiProblem(422, "Request validation failed.", [f"since: {moment!r} is not a date-time"]) from None
        return max((line.number for line in lines if line.time < epoch), default=0)
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
