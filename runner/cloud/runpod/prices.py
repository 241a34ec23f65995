"""Prices of RunPod's machines: a bid, the catalogue of today where a key is set, the dated figure in conf/hw."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from runner import __version__
from runner.cloud.runpod.account_key import KEY, base_url
from runner.cloud.runpod.catalog import vcpus
from runner.config import json_text
from runner.hub.bounded import bounded
from runner.paths import cache_dir
from runner.rundir.directory import write_atomically
from runner.spec import HardwareSpec, RentedPlace

Cloud = Literal["secure", "community"]

CPU_USD_PER_VCPU = 0.03  # cpu3c, secure cloud, as users saw it in 2026

PATH = "/v2/catalog/gpus"  # REST v2: {"gpus": [{"id": …, "price": {"secure": 0.44, "community": 0.31}}]}

TIMEOUT_S = 2.0  # between two bytes
TOTAL_S = 4.0  # to the last one
FRESH_S = 3600.0  # prices moved by about a fifth in three months of 2026: an hour changes nothing
FAILED_S = 60.0  # without a network, a plan should wait for the timeout once, not each time
LARGEST = 4_000_000  # bytes; the catalogue has about 50 entries of 1 kB


@dataclass(frozen=True, slots=True)
class Price:
    """Price of one GPU."""

    usd_per_hour: float
    source: str
    """Where and when the figure was seen, and for which cloud."""


def price(gpu_id: str | None, cloud: Cloud = "secure") -> Price | None:
    """Price of one GPU with RunPod's exact id, such as `NVIDIA H100 80GB HBM3`; never raises, never waits long.

    None without `RUNPOD_API_KEY`, for an id that is not offered in that cloud, and whenever the catalogue cannot be
    read: the caller then falls back to the dated figure in `conf/hw` and says so. An answer is kept for an hour.
    """
    key = os.environ.get(KEY)
    if not gpu_id or not key:
        return None
    base = base_url()
    found = _read(base) or _fetch(base, key)
    usd = found["gpus"].get(gpu_id, {}).get(cloud)
    if not usd:
        return None
    seen = datetime.fromtimestamp(found["time"], UTC)
    return Price(usd, f"RunPod's catalogue, {cloud} cloud, {seen:%Y-%m-%d %H:%M} UTC")


def price_of(hw: HardwareSpec, place: RentedPlace | None) -> tuple[float | None, str | None]:
    """US$ per GPU and hour (of the machine, on a CPU), and who says so: a bid, the catalogue of today in the cloud that
    is asked for, else the dated figure in conf/hw.
    """
    if place is not None and place.bid_usd is not None:
        return place.bid_usd, "where.bid_usd"
    if hw.accelerator != "cuda" and not (place and place.gpu_types):
        return cpu_price(hw) if place else (None, None)
    gpu_id = place.gpu_types[0] if place and place.gpu_types else hw.runpod_gpu_id
    live = price(gpu_id, place.cloud if place else "secure")
    if live is not None:
        return live.usd_per_hour, live.source
    if hw.usd_per_hour is None:
        return None, None
    dated = hw.price_date and hw.price_date[0].isdecimal()  # else it says why conf/hw has no price
    return hw.usd_per_hour, f"conf/hw, seen {hw.price_date}" if dated else "conf/hw"


def cpu_price(hw: HardwareSpec) -> tuple[float, str]:
    """US$ per hour of a CPU pod with as many cores, rounded up as RunPod rents them."""
    return vcpus(hw.num_cpus) * CPU_USD_PER_VCPU, "RunPod's CPU pods, as seen 2026: $0.03 per vCPU-hour"


def _file() -> Path:
    return cache_dir() / "prices.json"


def _read(base: str) -> dict[str, Any] | None:
    """A stored answer of the same address that is young enough."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        stored: dict[str, Any] = json_text.loads(_file().read_text("utf-8"))
        age = time.time() - stored["time"]
        if stored["base"] == base and 0 <= age < (FRESH_S if stored["gpus"] else FAILED_S):
            return _valid(stored)
    return None


def _valid(stored: dict[str, Any]) -> dict[str, Any]:
    for prices in stored["gpus"].values():
        for usd in prices.values():
            if not isinstance(usd, float):
                raise TypeError
    return stored


def _fetch(base: str, key: str) -> dict[str, Any]:
    """The catalogue as it is now, stored; without an entry where it cannot be had."""
    import urllib.request  # 24 ms, once an hour
    from http.client import HTTPException

    answer: dict[str, Any] = {"base": base, "time": time.time(), "gpus": {}}
    # Whatever an unknown server sends: no connection, an error page, JSON of another shape.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, HTTPException):
        request = urllib.request.Request(
            base + PATH, headers={"Accept": "application/json", "User-Agent": f"llm-finetuning-runner/{__version__}"}
        )
        # Unredirected: urllib would hand the key on to wherever a redirect points.
        request.add_unredirected_header("Authorization", f"Bearer {key}")

        def read() -> bytes:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                content: bytes = response.read(LARGEST)
                return content

        answer["gpus"] = _prices(json_text.loads(bounded(read, TOTAL_S)))
    with suppress(OSError):  # a read-only home costs a request each time, nothing else
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_file(), json.dumps(answer))
    return answer


def _prices(catalogue: Any) -> dict[str, dict[str, float]]:
    """Prices by id and cloud; a price of 0 means that the cloud has none, and is left out."""
    clouds = ("secure", "community")
    return {
        gpu["id"]: {c: float(gpu["price"][c]) for c in clouds if gpu["price"].get(c) and gpu.get(c, True)}
        for gpu in catalogue["gpus"]
    }
