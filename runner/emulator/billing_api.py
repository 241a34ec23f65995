"""/v2/billing: what everything has cost, by time buckets, from the billing clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request

from runner.emulator.clocks import stamp
from runner.emulator.errors import ApiProblem
from runner.emulator.pods import Pod
from runner.emulator.state import World

Json = dict[str, Any]
BUCKET_S = {"hour": 3600.0, "day": 86_400.0, "week": 604_800.0, "month": 2_592_000.0, "year": 31_536_000.0}
"""A month of 30 days and a year of 365: the emulator has no calendar."""
DEFAULT_S = 30 * 86_400.0
ALL = (
    "podGpuAmount", "podCpuAmount", "podDiskAmount", "serverlessGpuAmount", "serverlessCpuAmount",
    "serverlessDiskAmount", "serverlessFeeAmount", "storageStandardAmount", "storageHighPerformanceAmount",
    "endpointAmount", "clusterGpuAmount", "clusterDiskAmount", "clusterNetworkingAmount",
)  # fmt: skip
Amounts = dict[str, dict[str, float]]
"""Id → amount → US$."""


@dataclass(frozen=True)
class Family:
    """A kind of resource that is billed."""

    path: str
    id: str
    """What its records, and the filter for one, call it."""
    unique: str
    """What its metadata call the number of different ones."""
    amounts: Callable[[World, float, float], Amounts]
    names: dict[str, str]
    """Its amounts, and what these are called beside those of others."""


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


def router(world: World) -> APIRouter:
    """The routes: everything, and each family of resources."""
    api = APIRouter(prefix="/v2/billing")

    @api.get("")
    def everything(request: Request) -> Json:
        asked = _window(world, request.query_params)
        records = []
        for start, end in asked.buckets():
            amounts = dict.fromkeys(ALL, 0.0)
            for family in FAMILIES:
                for found in family.amounts(world, start, end).values():
                    for name, usd in found.items():
                        amounts[family.names[name]] += usd
            records += _record(start, end, amounts)
        return _answer(asked, records, ALL)

    for family in FAMILIES:
        api.get(f"/{family.path}")(_listing(world, family))
    return api


def _listing(world: World, family: Family) -> Callable[[Request], Json]:
    def listing(request: Request) -> Json:
        asked, chosen = _window(world, request.query_params), request.query_params.get(family.id)
        records = [
            record
            for start, end in asked.buckets()
            for identity, amounts in family.amounts(world, start, end).items()
            if chosen in (None, identity)
            for record in _record(start, end, amounts, **{family.id: identity})
        ]
        answer = _answer(asked, records, tuple(family.names))
        if family.unique:
            answer["metadata"]["query"][family.id] = chosen
            answer["metadata"][family.unique] = len({record[family.id] for record in records})
        return answer

    return listing


def _window(world: World, query: Mapping[str, str]) -> Window:
    bucket, last = query.get("bucketSize", "day"), query.get("lastN")
    start, end = query.get("startTime"), query.get("endTime")
    step, now = BUCKET_S[bucket], world.clock.now()
    if last is not None:
        if start or end:
            raise ApiProblem(400, "lastN and startTime/endTime are mutually exclusive")
        until = math.ceil(now / step) * step
        return Window(until - int(last) * step, until, bucket)
    begin, until = _epoch(start) if start else now - DEFAULT_S, _epoch(end) if end else now
    return Window(math.floor(begin / step) * step, math.ceil(until / step) * step, bucket)


def _of_pods(world: World, start: float, end: float) -> Amounts:
    return {
        pod.id: {f"{kind}Amount": _pod_usd(world, pod, start, end, kind) for kind in ("gpu", "cpu", "disk")}
        for pod in _pods(world)
        if not pod.cluster
    }


def _of_clusters(world: World, start: float, end: float) -> Amounts:
    found: Amounts = {}
    for pod in _pods(world):
        if pod.cluster:
            amounts = found.setdefault(
                pod.cluster["id"], {"networkingAmount": 0.0, "gpuAmount": 0.0, "diskAmount": 0.0}
            )
            for kind in ("gpu", "disk"):
                amounts[f"{kind}Amount"] += _pod_usd(world, pod, start, end, kind)
    return found


def _of_volumes(world: World, start: float, end: float) -> Amounts:
    found: Amounts = {}
    for volume, content in world.volumes.items():
        usd, standard = _volume_usd(world, volume, start, end), content["type"] == "STANDARD"
        found[volume] = {"standardAmount": usd * standard, "highPerformanceAmount": usd * (not standard)}
    return found


def _of_nothing(world: World, start: float, end: float) -> Amounts:
    """No worker ever starts here, and nobody calls a public endpoint."""
    return {}


def _epoch(text: str) -> float:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        raise ApiProblem(422, "Request validation failed.", [f"{text!r} is not a date-time"]) from None


def _pods(world: World) -> list[Pod]:
    with world.engine.lock:
        return [*world.engine.past, *world.engine.pods.values()]


def _billed_at(world: World, epoch: float) -> float:
    """The billing clock at a moment of the bill, which ends now: what speed adds lies in the past."""
    return world.clock.billed() - (world.clock.now() - epoch)


def _pod_usd(world: World, pod: Pod, start: float, end: float, kind: str) -> float:
    since, until = _billed_at(world, start), min(_billed_at(world, end), world.clock.billed())
    return sum(segment.usd(until, since) for segment in pod.segments if segment.kind == kind)


def _volume_usd(world: World, volume: str, start: float, end: float) -> float:
    now, since = world.clock.billed(), world.volume_since[volume]
    until, begin = min(_billed_at(world, end), now), max(_billed_at(world, start), since)
    return world.volume_usd(volume) * max(0.0, until - begin) / max(now - since, 1e-9)


def _range(start: float, end: float) -> Json:
    return {"startTime": stamp(start), "endTime": stamp(end)}


def _record(start: float, end: float, amounts: dict[str, float], **more: str) -> list[Json]:
    """One, if there is anything to pay."""
    total = sum(amounts.values())
    return [{**_range(start, end), **more, "totalAmount": total, **amounts}] if total else []


def _answer(asked: Window, records: list[Json], names: tuple[str, ...]) -> Json:
    totals = {name: sum(record[name] for record in records) for name in ("totalAmount", *names)}
    return {"records": records, "metadata": {"query": asked.query(), "recordCount": len(records), "totals": totals}}


FAMILIES = (
    Family("pods", "podId", "uniquePodCount", _of_pods, {
        "gpuAmount": "podGpuAmount", "cpuAmount": "podCpuAmount", "diskAmount": "podDiskAmount",
    }),
    Family("network-volumes", "networkVolumeId", "uniqueNetworkVolumeCount", _of_volumes, {
        "standardAmount": "storageStandardAmount", "highPerformanceAmount": "storageHighPerformanceAmount",
    }),
    Family("clusters", "clusterId", "uniqueClusterCount", _of_clusters, {
        "gpuAmount": "clusterGpuAmount", "diskAmount": "clusterDiskAmount",
        "networkingAmount": "clusterNetworkingAmount",
    }),
    Family("serverless", "serverlessId", "uniqueServerlessCount", _of_nothing, {
        "gpuAmount": "serverlessGpuAmount", "cpuAmount": "serverlessCpuAmount",
        "diskAmount": "serverlessDiskAmount", "feeAmount": "serverlessFeeAmount",
    }),
    Family("endpoints", "", "", _of_nothing, {}),
)  # fmt: skip
