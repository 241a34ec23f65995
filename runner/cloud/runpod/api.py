"""RunPod's API: typed, all pages, every wait bounded, a create never sent twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote

from runner.cloud import clock
from runner.cloud.provider import Pod, PodRequest
from runner.cloud.provider_errors import ApiDownError, ConflictError, UnclearError
from runner.cloud.runpod import graphql, json_types, transport
from runner.cloud.runpod.account_key import api_key, base_url, fingerprint
from runner.cloud.runpod.json_types import CpuType, DataCenter, GpuType, Volume
from runner.cloud.runpod.transport import NotFound, request
from runner.config import json_text
from runner.errors import Problem
from runner.hub.bounded import bounded

T = TypeVar("T")
MAX_PAGES = 200
LOG_SILENCE_S = 30.0


class Api:
    """One account. Errors are those of `transport.request`; a 401 never means that a pod is gone."""

    def __init__(self) -> None:
        """Reads RUNPOD_API_KEY and RUNPOD_API_BASE_URL, as the SDK does; NoKeyError without a key."""
        self.base = base_url()
        self.account = fingerprint(api_key())

    # ── pods ───────────────────────────────────────────────────────────────────────────────────

    def create_pod(self, wanted: PodRequest) -> Pod:
        """Ask for a pod, once. UnclearError: look for `wanted.name`; it may exist, and may appear later."""
        if wanted.bid_usd is not None:
            return self._rent_spot(wanted)
        return _read(
            json_types.pod,
            request("POST", "/v2/pods", json=json_types.request_body(wanted), repeat=False),
            UnclearError,
        )

    def pods(self) -> list[Pod]:
        """Every pod of the account, of all pages; an entry that is no pod at all is passed over."""
        found: list[Any] = self._all("/v2/pods", "pods")
        return [json_types.pod(raw) for raw in found if isinstance(raw, dict) and raw.get("id")]

    def pod(self, pod_id: str) -> Pod | None:
        """One pod; None only where RunPod itself says that there is none."""
        try:
            raw = request("GET", f"/v2/pods/{_segment(pod_id)}", repeat=True)
        except NotFound:
            return None
        return _read(json_types.pod, raw, ApiDownError)

    def time(self) -> float | None:
        """Return RunPod's time from the header `Date` of a response; None without one."""
        import requests  # 0.1 s

        headers = {"Authorization": f"Bearer {api_key()}", "Accept": "application/json"}
        try:
            url = f"{self.base}/v2/pods"
            answer = bounded(lambda: requests.get(url, headers=headers, timeout=10.0), transport.TOTAL_S)
        except (requests.RequestException, OSError):
            return None
        return clock.parse_date(answer.headers.get("Date"))

    def terminate(self, pod_id: str) -> None:
        """End it; one that is gone already is no error. Accepted is not done: look afterwards."""
        _delete("/v2/pods", pod_id)

    def stop(self, pod_id: str) -> None:
        """Stop it, keeping its volume disk; one that is stopped already is no error."""
        try:
            self._act(pod_id, "stop")
        except ConflictError:
            found = self.pod(pod_id)
            if found is None or found.status != "EXITED":
                raise

    def start(self, pod_id: str) -> None:
        """Start a stopped pod: NoCapacityError where its machine has no GPU left."""
        self._act(pod_id, "start")

    def _act(self, pod_id: str, action: str) -> None:
        request("POST", f"/v2/pods/{_segment(pod_id)}/action", json={"action": action}, repeat=action == "stop")

    def logs(self, pod_id: str, *, source: str | None = None, tail: int = 100, follow: bool = False) -> Iterator[str]:
        """Lines of the container (or the `system`), until they pause; with `follow` until the pod is gone."""
        import requests  # 0.1 s

        params: dict[str, Any] = {"tail": tail} | ({"source": source} if source else {})
        headers = {"Authorization": f"Bearer {api_key()}", "Accept": "text/event-stream"}
        silence = LOG_SILENCE_S if follow else 2.0
        last: str | None = None
        end = math.inf if follow else time.monotonic() + LOG_SILENCE_S
        while True:
            try:
                more = headers | ({"Last-Event-ID": last} if last else {})
                url = f"{self.base}/v2/pods/{_segment(pod_id)}/logs"
                with requests.get(url, params=params, headers=more, stream=True, timeout=(10.0, silence)) as answer:
                    if answer.status_code >= 400:
                        self.pod(pod_id)  # says what is wrong in words
                        raise ApiDownError(Problem(f"RunPod: logs of pod {pod_id}: it answers {answer.status_code}"))
                    for line in _lines(answer, end):
                        if line.startswith("id: "):
                            last = line[4:]
                        elif line.startswith("data: "):
                            yield _said(line[6:])
            except (requests.RequestException, OSError):
                pass
            if not follow or self.pod(pod_id) is None:
                return

    def _rent_spot(self, wanted: PodRequest) -> Pod:
        pod_id = graphql.rent_spot(wanted)
        try:
            found = self.pod(pod_id)
        except ApiDownError as error:
            raise UnclearError(*error.problems) from None
        if found is None:
            raise UnclearError(Problem(f"RunPod: pod {pod_id} was rented, and is not there"))
        return found

    # ── catalogue ──────────────────────────────────────────────────────────────────────────────

    def gpus(
        self, *, count: int = 1, cloud: str | None = None, stock: bool = False, countries: Sequence[str] = ()
    ) -> list[GpuType]:
        """Every GPU type; with `stock` what is free now for pods with so many, and in which data centres; with
        `countries` only what their data centres have."""
        params: dict[str, Any] = {}
        if stock or countries:
            params = {"include": "AVAILABILITY", "product": "POD", "count": count}
            params |= {"cloud": cloud.upper()} if cloud else {}
            params |= {"countryCodes": ",".join(countries)} if countries else {}
        raw = request("GET", "/v2/catalog/gpus", params=params or None, repeat=True)
        return [_read(json_types.gpu_type, gpu, ApiDownError) for gpu in _entries(raw, "gpus")]

    def cpus(self) -> list[CpuType]:
        """Every CPU flavour."""
        raw = request("GET", "/v2/catalog/cpus", repeat=True)
        return [_read(json_types.cpu_type, cpu, ApiDownError) for cpu in _entries(raw, "cpus")]

    def data_centers(self) -> list[DataCenter]:
        """Every data centre."""
        raw = request("GET", "/v2/catalog/datacenters", repeat=True)
        return [_read(json_types.data_center, entry, ApiDownError) for entry in _entries(raw, "dataCenters")]

    # ── network volumes ────────────────────────────────────────────────────────────────────────

    def volumes(self) -> list[Volume]:
        """Every network volume of the account."""
        found = self._all("/v2/network-volumes", "networkVolumes")
        return [_read(json_types.volume, raw, ApiDownError) for raw in found]

    def create_volume(self, name: str, size_gb: int, data_center: str) -> Volume:
        """Make one; UnclearError: look for the name."""
        body = {"name": name, "size": size_gb, "dataCenter": data_center}
        return _read(json_types.volume, request("POST", "/v2/network-volumes", json=body, repeat=False), UnclearError)

    def delete_volume(self, volume_id: str) -> None:
        """Delete it and what is on it; one that is gone already is no error."""
        _delete("/v2/network-volumes", volume_id)

    # ── templates and serverless endpoints ─────────────────────────────────────────────────────

    def create_template(self, body: dict[str, Any]) -> str:
        """Make one; its id."""
        return str(
            _read(lambda raw: raw["id"], request("POST", "/v2/templates", json=body, repeat=False), UnclearError)
        )

    def templates(self) -> list[dict[str, Any]]:
        """Return the account's templates."""
        return self._all("/v2/templates", "templates")

    def public_templates(self, source: str) -> list[dict[str, object]]:
        """The first 100 of the `official`, `verified` or `community` ones: RunPod has no search and no pages."""
        raw = request("GET", "/v2/catalog/templates", params={"source": source}, repeat=True)
        return _entries(raw, "templates")

    def template(self, template_id: str) -> dict[str, Any] | None:
        """Return a template of the account or the catalogue; None if there is none."""
        try:
            found = request("GET", f"/v2/templates/{_segment(template_id)}", repeat=True)
        except NotFound:
            return None
        return found if isinstance(found, dict) else None

    def delete_template(self, template_id: str) -> None:
        """Delete a template; a missing one is not an error."""
        _delete("/v2/templates", template_id)

    def create_endpoint(self, body: dict[str, Any]) -> dict[str, Any]:
        """Make a serverless endpoint."""
        found: dict[str, Any] = _read(dict, request("POST", "/v2/serverless", json=body, repeat=False), UnclearError)
        return found

    def endpoints(self) -> list[dict[str, object]]:
        """Every serverless endpoint of the account."""
        return self._all("/v2/serverless", "endpoints")

    def delete_endpoint(self, endpoint_id: str) -> None:
        """Delete an endpoint; a missing one is not an error."""
        _delete("/v2/serverless", endpoint_id)

    def _all(self, path: str, name: str) -> list[dict[str, Any]]:
        """Entries of every page; the SDK's own lists stop after the first."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            raw = request("GET", path, params={"cursor": cursor} if cursor else None, repeat=True)
            found += _entries(raw, name)
            paging = raw.get("pagination") or {}
            if not isinstance(paging, dict):
                raise ApiDownError(
                    Problem(f"RunPod: GET {path}: its pages are not as described", None, "try again later")
                )
            following = paging.get("nextCursor")
            if not paging.get("hasNextPage"):
                return found
            if not following or following == cursor:
                break
            cursor = following
        # A list that is not whole would make pods look gone that are not.
        raise ApiDownError(Problem(f"RunPod: GET {path}: its pages do not end", None, "try again later"))


def _lines(answer: Any, end: float) -> Iterator[str]:
    """Lines as they come, until `end` (monotonic): a line that drips never comes to its own end."""
    rest = b""
    for block in answer.iter_content(64):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode(errors="replace").rstrip("\r") for line in lines)
        if time.monotonic() > end:
            return


def _said(data: str) -> str:
    """The line of one event; one that is no JSON object as it came."""
    try:
        content = json_text.loads(data)
    except (ValueError, RecursionError):
        return data
    return str(content.get("line", "")) if isinstance(content, dict) else data


def _entries(raw: object, name: str) -> list[dict[str, object]]:
    entries = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(entries, list):
        raise ApiDownError(Problem(f"RunPod: an answer without {name}", None, "try again later"))
    return entries


def _read(reader: Callable[[Any], T], raw: Any, error: type[ApiDownError] | type[UnclearError]) -> T:
    try:
        return reader(raw)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise error(Problem("RunPod: an answer of another shape than it is described", None, None)) from None


def _segment(text: str) -> str:
    return quote(text, safe="")


def _delete(path: str, identity: str) -> None:
    with suppress(NotFound):
        request("DELETE", f"{path}/{_segment(identity)}", repeat=True)
