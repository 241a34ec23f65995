"""/v2/catalog: what there is to rent, with prices and stock."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter, Request

from runner.emulator import hardware_catalog
from runner.emulator.answers import ApiProblem, Json, known, page
from runner.emulator.hardware_catalog import Cpu, DataCenter, Gpu
from runner.emulator.state import World

ONLY_WITH_AVAILABILITY = ("product", "count", "cloud", "countryCodes", "cudaVersions", "minCudaVersion", "vcpuCount")


def router(world: World) -> APIRouter:
    """The routes. Parameters have been checked against the contract; here are the rules between them."""
    api = APIRouter(prefix="/v2/catalog")

    @api.get("/gpus")
    def list_gpus(request: Request) -> Json:
        asked = _asked(request.query_params)
        shown = [_gpu(world, gpu, asked) for gpu in hardware_catalog.gpus().values()]
        return {"gpus": [s for s in shown if not asked or not asked["countries"] or s["dataCenters"]]}

    @api.get("/gpus/{identity}")
    def get_gpu(request: Request, identity: str) -> Json:
        gpu = known(hardware_catalog.gpus(), identity, "GPU type")
        return _gpu(world, gpu, _asked(request.query_params))

    @api.get("/cpus")
    def list_cpus(request: Request) -> Json:
        asked = _asked(request.query_params)
        return {"cpus": [_cpu(cpu, asked is not None) for cpu in hardware_catalog.cpus().values()]}

    @api.get("/cpus/{identity}")
    def get_cpu(request: Request, identity: str) -> Json:
        cpu = known(hardware_catalog.cpus(), identity, "CPU type")
        return _cpu(cpu, _asked(request.query_params) is not None)

    @api.get("/datacenters")
    def list_centers(request: Request) -> Json:
        query = request.query_params
        regions = _list(query, "regions")
        centers = [
            center
            for center in hardware_catalog.data_centers().values()
            if (not regions or center.region in regions)
            and set(_list(query, "networkVolumeTypes")) <= set(center.volume_types)
            and set(_list(query, "compliance")) <= set(center.compliance)
            and query.get("globalNetwork") in (None, str(center.global_network).lower())
        ]
        return {"dataCenters": [_center(world, center, query.get("include", "")) for center in centers]}

    @api.get("/datacenters/{identity}")
    def get_center(identity: str, include: str = "") -> Json:
        center = known(hardware_catalog.data_centers(), identity, "data center")
        return _center(world, center, include)

    @api.get("/templates")
    def list_public(source: str = "official", cursor: str | None = None) -> Json:
        public = [t for t in world.templates.values() if t["id"] in hardware_catalog.content()["templates"]]
        return page("templates", public if source == "official" else [], cursor, 100)

    return api


def _list(query: Mapping[str, str], name: str) -> list[str]:
    return [word for word in query.get(name, "").split(",") if word]


def _asked(query: Mapping[str, str]) -> Json | None:
    """The availability that is asked for; None where it is not. 400 for half a question."""
    if not query.get("include"):
        if stray := [name for name in ONLY_WITH_AVAILABILITY if name in query]:
            raise ApiProblem(400, f"{', '.join(stray)}: valid only with include=AVAILABILITY")
        return None
    if not query.get("product"):
        raise ApiProblem(400, "product is required with include=AVAILABILITY")
    if query.get("cudaVersions") and query.get("minCudaVersion"):
        raise ApiProblem(400, "cudaVersions and minCudaVersion are mutually exclusive")
    return {
        "count": int(query.get("count", 1)), "cloud": query.get("cloud", "SECURE"),
        "countries": _list(query, "countryCodes"), "cuda": _list(query, "cudaVersions"),
    }  # fmt: skip


def _gpu(world: World, gpu: Gpu, asked: Json | None) -> Json:
    community = gpu.community_usd > 0
    serverless = round(1.6 * gpu.secure_usd, 2)  # dearer, by about that much
    shown: Json = {
        "id": gpu.id, "name": gpu.name, "pool": gpu.pool, "manufacturer": "NVIDIA", "memory": gpu.memory_gb,
        "secure": True, "community": community,
        "price": {"secure": gpu.secure_usd, "community": gpu.community_usd, "serverless": serverless},
        "maxCount": {"secure": gpu.max_count, "community": 4 if community else 0},
    }  # fmt: skip
    if asked is None:
        return shown
    centers = [
        {"id": center.id, "name": center.name, "availability": _stock(world, gpu, center.id, asked)}
        for center in map(hardware_catalog.data_centers().__getitem__, hardware_catalog.centers_of(gpu.id))
        if not asked["countries"] or center.country in asked["countries"]
    ]
    levels = [center["availability"] for center in centers]
    best = next((level for level in ("HIGH", "MEDIUM", "LOW") if level in levels), "NONE")
    offered = [v for v in hardware_catalog.content()["cuda_versions"] if not asked["cuda"] or v in asked["cuda"]]
    cuda = [{"version": version, "available": best != "NONE"} for version in offered]
    return {**shown, "availability": best if offered else "NONE", "dataCenters": centers, "cudaVersions": cuda}


def _stock(world: World, gpu: Gpu, center: str, asked: Json) -> str:
    """NONE where a create would be refused for want of capacity: the two agree, until somebody is quicker."""
    cloud = asked["cloud"]
    if not gpu.usd_per_hour(cloud) or asked["count"] > gpu.max_count:
        return "NONE"
    facts = {"on": {"create"}, "gpu": {gpu.id}, "cloud": {cloud}, "data_center": {center}}
    return "NONE" if world.faults.any("no_capacity", **facts) else gpu.stock


def _cpu(cpu: Cpu, with_availability: bool) -> Json:
    shown: Json = {
        "id": cpu.id, "name": cpu.name, "group": cpu.group, "vcpu": {"min": cpu.min_vcpu, "max": cpu.max_vcpu},
        "ramGbPerVcpu": cpu.ram_gb_per_vcpu,
        "price": {"securePerVcpu": cpu.usd_per_vcpu, "serverlessPerVcpu": round(cpu.usd_per_vcpu * 1.6, 3)},
    }  # fmt: skip
    if not with_availability:
        return shown
    centers = [{"id": c.id, "name": c.name, "availability": "HIGH"} for c in hardware_catalog.data_centers().values()]
    return {**shown, "availability": "HIGH", "dataCenters": centers}


def _center(world: World, center: DataCenter, include: str) -> Json:
    shown: Json = {
        "id": center.id, "name": center.name, "region": center.region, "globalNetwork": center.global_network,
        "networkVolumeTypes": center.volume_types, "compliance": center.compliance,
    }  # fmt: skip
    if "GPU_AVAILABILITY" in include:
        asked: Json = {"count": 1, "cloud": "SECURE"}
        shown["gpuAvailability"] = [
            {"id": gpu.id, "name": gpu.name, "availability": _stock(world, gpu, center.id, asked)}
            for gpu in hardware_catalog.gpus().values()
            if center.id in hardware_catalog.centers_of(gpu.id)
        ]
    if "CPU_AVAILABILITY" in include:
        shown["cpuAvailability"] = [
            {"id": cpu.id, "name": cpu.name, "availability": "HIGH"} for cpu in hardware_catalog.cpus().values()
        ]
    return shown
