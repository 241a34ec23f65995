"""/v2/billing/pods: what pods have cost, by time buckets, from the billing clock."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from fastapi import APIRouter, Request

from runner.emulator.answers import ApiProblem, Json
from runner.emulator.pods import Pod
from runner.emulator.settings import stamp
from runner.emulator.state import World

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


def router(world: World) -> APIRouter:
    """The route."""
    api = APIRouter(prefix="/v2/billing")

    @api.get("/pods")
    def bill_of_pods(request: Request) -> Json:
        asked, chosen = _window(world, request.query_params), request.query_params.get("podId")
        records = [
            record
            for start, end in asked.buckets()
            for pod in _pods(world)
            if chosen in (None, pod.id)
            for record in _record(world, pod, start, end)
        ]
        totals = {name: sum(record[name] for record in records) for name in ("totalAmount", *AMOUNTS)}
        query = {**asked.query(), "podId": chosen}
        pods = len({record["podId"] for record in records})
        metadata = {"query": query, "recordCount": len(records), "totals": totals, "uniquePodCount": pods}
        return {"records": records, "metadata": metadata}

    return api


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


def _epoch(text: str) -> float:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        raise ApiProblem(422, "Request validation failed.", [f"{text!r} is not a date-time"]) from None


def _pods(world: World) -> list[Pod]:
    with world.engine.lock:
        return [*world.engine.past, *world.engine.pods.values()]


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
