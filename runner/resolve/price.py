"""The price of hardware: a bid, the live price list, a dated one, or the vCPUs of a CPU pod."""

from __future__ import annotations

from pathlib import Path

from runner.cloud.runpod import prices
from runner.cloud.runpod.catalog import vcpus
from runner.config import catalog
from runner.spec import HardwareSpec, RunPodPlace, Where

CPU_USD_PER_VCPU = 0.03  # cpu3c, secure cloud, as users saw it in 2026


def price_of(hw: HardwareSpec, where: Where | None = None) -> tuple[float | None, str | None]:
    """US$ per GPU and hour (of the machine, on a CPU), and who says so: a bid, RunPod's catalogue of today in the cloud
    that is asked for, else the dated figure in conf/hw.
    """
    place = where if isinstance(where, RunPodPlace) else None
    if place is not None and place.bid_usd is not None:
        return place.bid_usd, "where.bid_usd"
    if hw.accelerator != "cuda" and not (place and place.gpu_types):
        return cpu_price(hw) if place else (None, None)
    gpu_id = place.gpu_types[0] if place and place.gpu_types else hw.runpod_gpu_id
    live = prices.price(gpu_id, place.cloud if place else "secure")
    if live is not None:
        return live.usd_per_hour, live.source
    if hw.usd_per_hour is None:
        return None, None
    dated = hw.price_date and hw.price_date[0].isdecimal()  # else it says why conf/hw has no price
    return hw.usd_per_hour, f"conf/hw, seen {hw.price_date}" if dated else "conf/hw"


def cpu_price(hw: HardwareSpec) -> tuple[float, str]:
    """US$ per hour of a CPU pod with as many cores, rounded up as RunPod rents them."""
    return vcpus(hw.num_cpus) * CPU_USD_PER_VCPU, "RunPod's CPU pods, as seen 2026: $0.03 per vCPU-hour"


def hardware(folders: tuple[Path, ...] = (), cloud: prices.Cloud = "secure") -> list[HardwareSpec]:
    """Every named GPU machine of the catalogue and of a user's own folders, with today's price in a cloud where the
    live catalogue tells it."""
    names = catalog.options("hw", folders)
    found = [HardwareSpec.model_validate(catalog.load("hw", name, folders)) for name in names]
    return [_priced(hw, cloud) for hw in found if hw.accelerator == "cuda"]


def _priced(hw: HardwareSpec, cloud: prices.Cloud) -> HardwareSpec:
    live = prices.price(hw.runpod_gpu_id, cloud)
    return hw if live is None else hw.model_copy(update={"usd_per_hour": live.usd_per_hour})
