"""RunPod's JSON: requests for pods, and answers about pods, GPUs, data centres, volumes (openapi-v2.json)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from runner.cloud.provider import Pod, PodRequest

Raw = dict[str, Any]


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
    """A data centre of pods and volumes."""

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
    port = finite_number(direct.get("port"))
    return Pod(
        id=str(raw["id"]),
        name=str(raw.get("name") or ""),
        status=str(raw.get("status") or "UNKNOWN"),
        usd_per_hour=finite_number(raw.get("cost")),
        gpu_id=gpu.get("id"),
        gpu_count=int(finite_number(gpu.get("count"))),
        cloud=str(raw.get("cloud") or "").lower(),
        data_center=raw.get("dataCenterId"),
        image=str(raw.get("image") or ""),
        ssh_host=direct.get("host"),
        ssh_port=int(port) or None,
        created=epoch(raw.get("createdAt")),
        machine_id=proxy.get("username"),
        volume_id=first.get("volumeId"),
        ssh_user=str(direct.get("username") or "root"),
        started=epoch(raw.get("startedAt")),
        disk_gb=finite_number(raw.get("disk")),
        volume_gb=finite_number(_dict(_dict(raw, "mounts"), "persistent").get("size")),
        num_vcpus=int(finite_number(raw["cpu"].get("vcpuCount"))) if isinstance(raw.get("cpu"), dict) else None,
        env={str(k): str(v) for k, v in _dict(raw, "env").items()},
    )


def _dict(raw: Raw, name: str) -> Raw:
    value = raw.get(name)
    return value if isinstance(value, dict) else {}


def finite_number(value: Any) -> float:
    """0 for what is no finite number."""
    try:
        return float(value) if math.isfinite(float(value)) else 0.0
    except (TypeError, ValueError, OverflowError):
        return 0.0


def gpu_type(raw: Raw) -> GpuType:
    """Parse a GPU of the catalogue."""
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
    """Parse a CPU of the catalogue."""
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
    """Parse a data centre of the catalogue."""
    types = tuple(raw.get("networkVolumeTypes") or ())
    return DataCenter(str(raw["id"]), str(raw.get("name") or raw["id"]), str(raw.get("region") or ""), types)


def volume(raw: Raw) -> Volume:
    """Parse an entry of `/v2/network-volumes`."""
    return Volume(
        id=str(raw["id"]),
        name=str(raw["name"]),
        size_gb=int(raw["size"]),
        data_center=str(raw["dataCenter"]),
        type=str(raw.get("type") or ""),
    )


def epoch(text: object) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None for none."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None


WORKSPACE = "/workspace"
LEAST_VOLUME_GB = 10  # RunPod's own floor


def request_body(wanted: PodRequest) -> Raw:
    """Return the body of REST v2's CreatePodRequest."""
    body: Raw = {
        "name": wanted.name,
        "cloud": wanted.cloud.upper(),
        "disk": wanted.container_disk_gb,
        "ports": list(wanted.ports),
        "env": dict(wanted.env),
        "startSsh": True,
    }
    body |= {"templateId": wanted.template} if wanted.template else {"image": wanted.image}
    if wanted.cpu_id:
        body["cpu"] = {"id": wanted.cpu_id, "vcpuCount": wanted.num_vcpus}
    else:
        least = least_cuda(wanted)
        cuda: Raw = {"minCudaVersion": least} if least else {}
        cuda = {"allowedCudaVersions": list(wanted.cuda_versions)} if wanted.cuda_versions else cuda
        body["gpu"] = {"id": wanted.gpu_id, "count": wanted.gpu_count, **cuda}
    if wanted.volume_id:
        body["mounts"] = {"network": [{"volumeId": wanted.volume_id, "path": WORKSPACE}]}
    elif wanted.volume_gb and not wanted.cpu_id:  # a CPU pod has no volume disk
        body["mounts"] = {"persistent": {"size": max(LEAST_VOLUME_GB, wanted.volume_gb), "path": WORKSPACE}}
    if wanted.data_centers:
        body["dataCenterIds"] = list(wanted.data_centers)
    if wanted.args:
        body["args"] = wanted.args
    return body


def least_cuda(wanted: PodRequest) -> str | None:
    """CUDA version that the host's driver has to serve for the image and the packages, where that is known."""
    of_image = cuda_of(wanted.image) if wanted.image and not wanted.template else None
    known = [version for version in (of_image, wanted.min_cuda) if version]
    return max(known, key=lambda version: tuple(map(int, version.split("."))), default=None)


def allowed_cuda(wanted: PodRequest) -> list[str]:
    """All versions that the host's driver may serve, for an API without a floor; empty means any."""
    found = least_cuda(wanted)
    if wanted.cuda_versions or found is None:
        return list(wanted.cuda_versions)
    least = tuple(map(int, found.split(".")))
    return [f"{major}.{minor}" for major in range(11, 15) for minor in range(10) if (major, minor) >= least]


def cuda_of(image: str) -> str | None:
    """`12.8` of `…-cu1281-torch280`, `…-cuda12.8-cudnn9` or `nvidia/cuda:12.8.1-…`: no container of that image starts
    where the driver serves less."""
    found = re.search(r"[:/_-](?:cu|cuda[-:]?)(1\d)\.?(\d)", image)
    return f"{found[1]}.{found[2]}" if found else None
