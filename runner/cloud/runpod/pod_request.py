"""A request for a pod, and its JSON body."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

WORKSPACE = "/workspace"
LEAST_VOLUME_GB = 10  # RunPod's own floor


@dataclass(frozen=True, slots=True)
class PodRequest:
    """A pod to ask for: either GPUs or a CPU flavour, either an image or a template."""

    name: str
    """Unique: by it a pod is found again whose create was never answered."""
    image: str | None
    cloud: str
    gpu_id: str | None = None
    gpu_count: int = 1
    cpu_id: str | None = None
    num_vcpus: int = 2
    template: str | None = None
    data_centers: tuple[str, ...] = ()
    container_disk_gb: int = 20
    volume_gb: int = 0
    volume_id: str | None = None
    cuda_versions: tuple[str, ...] = ()
    """Exactly these of the host's driver; empty means any since the image's own, where its tag says which that is."""
    min_cuda: str | None = None
    """What the host's driver has to serve for the run's packages, whatever the image needs."""
    ports: tuple[str, ...] = ("22/tcp",)
    env: dict[str, str] = field(default_factory=dict)
    """Seen by whoever may look at the pod: never a secret."""
    args: str | None = None
    """Start command, instead of the image's own."""
    bid_usd: float | None = None
    """Bid per GPU and hour, for an interruptible machine."""

    @property
    def least_cuda(self) -> str | None:
        """What the host's driver has to serve for the image and the packages, where that is known."""
        of_image = cuda_of(self.image) if self.image and not self.template else None
        known = [version for version in (of_image, self.min_cuda) if version]
        return max(known, key=lambda version: tuple(map(int, version.split("."))), default=None)

    @property
    def allowed_cuda(self) -> list[str]:
        """All versions that the host's driver may serve, for an API without a floor; empty means any."""
        if self.cuda_versions or self.least_cuda is None:
            return list(self.cuda_versions)
        least = tuple(map(int, self.least_cuda.split(".")))
        return [f"{major}.{minor}" for major in range(11, 15) for minor in range(10) if (major, minor) >= least]

    def body(self) -> dict[str, Any]:
        """As REST v2 wants it (CreatePodRequest)."""
        body: dict[str, Any] = {
            "name": self.name,
            "cloud": self.cloud.upper(),
            "disk": self.container_disk_gb,
            "ports": list(self.ports),
            "env": dict(self.env),
            "startSsh": True,
        }
        body |= {"templateId": self.template} if self.template else {"image": self.image}
        if self.cpu_id:
            body["cpu"] = {"id": self.cpu_id, "vcpuCount": self.num_vcpus}
        else:
            least = self.least_cuda
            cuda: dict[str, Any] = {"minCudaVersion": least} if least else {}
            cuda = {"allowedCudaVersions": list(self.cuda_versions)} if self.cuda_versions else cuda
            body["gpu"] = {"id": self.gpu_id, "count": self.gpu_count, **cuda}
        if self.volume_id:
            body["mounts"] = {"network": [{"volumeId": self.volume_id, "path": WORKSPACE}]}
        elif self.volume_gb and not self.cpu_id:  # a CPU pod has no volume disk
            body["mounts"] = {"persistent": {"size": max(LEAST_VOLUME_GB, self.volume_gb), "path": WORKSPACE}}
        if self.data_centers:
            body["dataCenterIds"] = list(self.data_centers)
        if self.args:
            body["args"] = self.args
        return body


def cuda_of(image: str) -> str | None:
    """`12.8` of `…-cu1281-torch280`, `…-cuda12.8-cudnn9` or `nvidia/cuda:12.8.1-…`: no container of that image starts
    where the driver serves less."""
    found = re.search(r"[:/_-](?:cu|cuda[-:]?)(1\d)\.?(\d)", image)
    return f"{found[1]}.{found[2]}" if found else None
