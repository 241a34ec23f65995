"""The emulated RunPod's catalogue, from `catalog.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from runner.emulator.answers import Json

HOURS_PER_MONTH = 730.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU type."""

    id: str
    name: str
    pool: str | None
    memory_gb: int
    secure_usd: float
    community_usd: float
    """0: not in the community cloud."""
    max_count: int
    stock: str

    def usd_per_hour(self, cloud: str) -> float:
        """Price of one GPU."""
        return self.secure_usd if cloud == "SECURE" else self.community_usd


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU flavour."""

    id: str
    name: str
    group: str
    min_vcpu: int
    max_vcpu: int
    ram_gb_per_vcpu: float
    usd_per_vcpu: float


@dataclass(frozen=True, slots=True)
class DataCenter:
    """A place."""

    id: str
    name: str
    region: str
    country: str
    volume_types: list[str]
    compliance: list[str]
    global_network: bool


@cache
def content() -> Json:
    """The file as it stands."""
    read: Json = yaml.safe_load(Path(__file__).with_name("catalog.yaml").read_text("utf-8"))
    return read


@cache
def gpus() -> dict[str, Gpu]:
    """GPU types by RunPod's id."""
    return {key: Gpu(key, *values) for key, values in content()["gpus"].items()}


@cache
def cpus() -> dict[str, Cpu]:
    """CPU flavours by id."""
    return {key: Cpu(key, *values) for key, values in content()["cpus"].items()}


@cache
def data_centers() -> dict[str, DataCenter]:
    """Data centres by id."""
    return {key: DataCenter(key, *values) for key, values in content()["data_centers"].items()}


def centers_of(gpu_id: str) -> list[str]:
    """Ids of the data centres that have a GPU type."""
    only: list[str] | None = content()["only_in"].get(gpu_id)
    return list(data_centers()) if only is None else only


def storage_usd_per_hour(kind: str, gigabytes: float) -> float:
    """`running`, `stopped`, `network` or `network_high_performance`."""
    usd: float = content()["storage"][kind]
    return usd * gigabytes / HOURS_PER_MONTH
