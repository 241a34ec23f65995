"""Types of RunPod's answers: pods, GPUs, data centres, volumes (openapi-v2.json)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Raw = dict[str, Any]
OVER = ("TERMINATED",)
"""Statuses in which a pod is as good as gone: it costs nothing and cannot come back."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as it was when it was asked after."""

    id: str
    name: str
    status: str
    """PROVISIONING, STARTING, RUNNING, EXITED, ERROR or TERMINATED."""
    usd_per_hour: float
    """Of all its GPUs; 0 while it is stopped."""
    gpu_id: str | None
    gpu_count: int
    cloud: str
    """`secure` or `community`."""
    data_center: str | None
    image: str
    ssh_host: str | None
    ssh_port: int | None
    """Both None until port 22 is mapped; they change with every restart."""
    created: float | None
    """Seconds since the epoch, by RunPod's clock."""
    machine_id: str | None
    """Known once a machine was assigned: until then nothing happens on it."""
    volume_id: str | None
    """Network volume."""
    env: dict[str, str] = field(default_factory=dict)
    raw: Raw = field(default_factory=dict)

    @property
    def has_machine(self) -> bool:
        """A pod without one for minutes is on a bad host."""
        return self.machine_id is not None or self.status in ("STARTING", "RUNNING")


@dataclass(frozen=True, slots=True)
class GpuType:
    """One line of the catalogue; prices are per GPU and hour, None where that cloud has none."""

    id: str
    name: str
    memory_gb: int
    secure_usd: float | None
    community_usd: float | None
    max_secure: int
    max_community: int
    stock: str | None
    """NONE, LOW, MEDIUM or HIGH; None where it was not asked for."""
    data_centers: dict[str, str] = field(default_factory=dict)
    """Data centre → stock there."""
    pool: str | None = None

    def usd(self, cloud: str) -> float | None:
        """Price in a cloud."""
        return self.secure_usd if cloud == "secure" else self.community_usd

    def most(self, cloud: str) -> int:
        """GPUs that one pod can have at most."""
        return self.max_secure if cloud == "secure" else self.max_community


@dataclass(frozen=True, slots=True)
class CpuType:
    """A flavour of CPU pods: they exist in the secure cloud."""

    id: str
    name: str
    fewest: int
    most: int
    usd_per_vcpu: float
    gb_per_vcpu: float


@dataclass(frozen=True, slots=True)
class DataCenter:
    """Where pods and volumes are."""

    id: str
    name: str
    region: str
    volume_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """A network volume."""

    id: str
    name: str
    size_gb: int
    data_center: str
    type: str


def pod(raw: Raw) -> Pod:
    """From an answer of the API; KeyError or TypeError where it is none. Only the id is needed: a pod of whatever
    shape, somebody else's perhaps, must not keep this project's pods from being ended."""
    gpu, ssh = _dict(raw, "gpu"), _dict(raw, "ssh")
    direct, proxy = _dict(ssh, "direct"), _dict(ssh, "proxy")
    network = _dict(raw, "mounts").get("network")
    first = network[0] if isinstance(network, list) and network and isinstance(network[0], dict) else {}
    port = number(direct.get("port"))
    return Pod(
        id=str(raw["id"]),
        name=str(raw.get("name") or ""),
        status=str(raw.get("status") or "UNKNOWN"),
        usd_per_hour=number(raw.get("cost")),
        gpu_id=gpu.get("id"),
        gpu_count=int(number(gpu.get("count"))),
        cloud=str(raw.get("cloud") or "").lower(),
        data_center=raw.get("dataCenterId"),
        image=str(raw.get("image") or ""),
        ssh_host=direct.get("host"),
        ssh_port=int(port) or None,
        created=epoch(raw.get("createdAt")),
        machine_id=proxy.get("username"),
        volume_id=first.get("volumeId"),
        env={str(k): str(v) for k, v in _dict(raw, "env").items()},
        raw=raw,
    )


def _dict(raw: Raw, name: str) -> Raw:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def number(value: Any) -> float:
    """0 for what is no finite number."""
    try:
        return float(value) if math.isfinite(float(value)) else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0


def gpu_type(raw: Raw) -> GpuType:
    """From the catalogue."""
    price, most = raw.get("price") or {}, raw.get("maxCount") or {}
    return GpuType(
        id=str(raw["id"]),
        name=str(raw.get("name") or raw["id"]),
        memory_gb=int(raw.get("memory") or 0),
        secure_usd=float(price["secure"]) if raw.get("secure", True) and price.get("secure") else None,
        community_usd=float(price["community"]) if raw.get("community", True) and price.get("community") else None,
        max_secure=int(most.get("secure") or 0),
        max_community=int(most.get("community") or 0),
        stock=raw.get("availability"),
        data_centers={str(c["id"]): str(c["availability"]) for c in raw.get("dataCenters") or []},
        pool=raw.get("pool"),
    )


def cpu_type(raw: Raw) -> CpuType:
    """From the catalogue."""
    vcpu, price = raw["vcpu"], raw.get("price") or {}
    return CpuType(
        id=str(raw["id"]),
        name=str(raw.get("name") or raw["id"]),
        fewest=int(vcpu["min"]),
        most=int(vcpu["max"]),
        usd_per_vcpu=float(price.get("securePerVcpu") or 0.0),
        gb_per_vcpu=float(raw.get("ramGbPerVcpu") or 0.0),
    )


def data_center(raw: Raw) -> DataCenter:
    """From the catalogue."""
    types = tuple(raw.get("networkVolumeTypes") or ())
    return DataCenter(str(raw["id"]), str(raw.get("name") or raw["id"]), str(raw.get("region") or ""), types)


def volume(raw: Raw) -> Volume:
    """From `/v2/network-volumes`."""
    return Volume(
        id=str(raw["id"]),
        name=str(raw["name"]),
        size_gb=int(raw["size"]),
        data_center=str(raw["dataCenter"]),
        type=str(raw.get("type") or ""),
    )


def epoch(text: Any) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None for none."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None
