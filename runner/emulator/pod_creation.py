"""Create a pod from a request body: templates, rules across fields, capacity, price."""

from __future__ import annotations

import re

from runner.emulator import catalog
from runner.emulator.answers import ApiProblem, Json, known
from runner.emulator.pods import Pod, PodLog
from runner.emulator.state import World, new_id

NO_CAPACITY = (
    "There are no longer any instances available with the requested specifications. Please refresh and try again."
)
MAX_VARIABLES = 50
FROM_TEMPLATE = ("image", "args", "disk", "ports", "registry", "startSsh", "startJupyter")


def placed(world: World, body: Json) -> Pod:
    """A pod that is asked for and allowed, not yet begun. ApiProblem: 400, 402, 404 or 422."""
    body = with_template(world, body)
    _rules(body)
    cloud = body.get("cloud", "SECURE")
    centers = _centers(world, body, cloud)
    compute, usd = _compute(body, cloud)
    centers = _capacity(world, body, cloud, centers)
    pod = Pod(
        name=body["name"],
        config=config_of(body),
        cloud=cloud,
        compute=compute,
        usd_per_hour=usd,
        data_centers=centers,
        folder=world.root / "pods" / (identity := new_id(14)),
        id=identity,
        clock=world.clock,
        log=PodLog(world.clock),
        public_key=_public_key(world, body),
        start_jupyter=body.get("startJupyter", False),
        global_networking=False,
    )
    return pod


def with_template(world: World, body: Json) -> Json:
    """The body over its template's settings; variables are merged one by one."""
    if "templateId" not in body:
        return body
    template = known(world.templates, body["templateId"], "template")
    if template["serverless"]:
        raise ApiProblem(422, "Request validation failed.", ["$.templateId: is a serverless template"])
    merged = {name: template[name] for name in FROM_TEMPLATE if template.get(name) is not None} | body
    merged["env"] = {**template["env"], **body.get("env", {})}
    if "cpu" not in body and "mounts" not in body and template["mounts"]:
        merged["mounts"] = template["mounts"]
    cuda: list[str] = template["allowedCudaVersions"]
    if cuda and "gpu" in body and not {"allowedCudaVersions", "minCudaVersion"} & set(body["gpu"]):
        merged["gpu"] = {**body["gpu"], "allowedCudaVersions": cuda}
    return merged


def config_of(body: Json) -> Json:
    """What the API shows of the container, defaults filled in."""
    return {
        "image": body["image"],
        "args": body.get("args", ""),
        "disk": body.get("disk", 10),
        "ports": body.get("ports", []),
        "env": dict(body.get("env", {})),
        "registry": body.get("registry"),
        "mounts": body.get("mounts", {}),
    }


def _rules(body: Json) -> None:
    """What the schema cannot say."""
    mounts = body.get("mounts", {})
    if ("gpu" in body) == ("cpu" in body):
        raise ApiProblem(400, "exactly one of gpu or cpu is required")
    if mounts.get("persistent") and mounts.get("network"):
        raise ApiProblem(400, "mounts.persistent and mounts.network are mutually exclusive")
    if "cpu" in body and mounts.get("persistent"):
        raise ApiProblem(400, "mounts.persistent is not supported on CPU pods")
    if mounts.get("network") and body.get("cloud") == "COMMUNITY":
        raise ApiProblem(400, "network volumes are only supported in the secure cloud")
    if len(body.get("env", {})) > MAX_VARIABLES:
        raise ApiProblem(400, f"at most {MAX_VARIABLES} environment variables are allowed")
    check_ports(body.get("ports", []))
    gpu = body.get("gpu", {})
    if gpu.get("allowedCudaVersions") and gpu.get("minCudaVersion"):
        raise ApiProblem(400, "allowedCudaVersions and minCudaVersion are mutually exclusive")


def check_ports(ports: list[str]) -> None:
    """`22/tcp`, `8888/http`."""
    for port in ports:
        if not re.fullmatch(r"[1-9]\d{0,4}/(tcp|http|udp)", port):
            raise ApiProblem(400, f"invalid port {port!r}: expected <port>/<protocol>")


def _centers(world: World, body: Json, cloud: str) -> list[str]:
    """Where the pod may be; with a network volume, where that is."""
    wanted: list[str] = body.get("dataCenterIds") or []
    for center in wanted:
        if center not in catalog.data_centers():
            raise ApiProblem(400, f"data center {center!r} not found")
    network = body.get("mounts", {}).get("network")
    if not network:
        return wanted or list(catalog.data_centers())
    volume = known(world.volumes, network[0]["volumeId"], "network volume")
    if wanted and volume["dataCenter"] not in wanted:
        raise ApiProblem(400, f"network volume {volume['id']} is in data center {volume['dataCenter']}")
    return [volume["dataCenter"]]


def _compute(body: Json, cloud: str) -> tuple[Json, float]:
    """What the API shows of the compute, and its price in US$ per hour."""
    if "cpu" in body:
        wanted = body["cpu"]
        cpu = catalog.cpus().get(wanted["id"])
        if cpu is None:
            raise ApiProblem(400, f"CPU flavor {wanted['id']!r} not found")
        count = wanted["vcpuCount"]
        if count & (count - 1) or not cpu.min_vcpu <= count <= cpu.max_vcpu:
            raise ApiProblem(400, f"vcpuCount {count} is not valid for {cpu.id}")
        return {"cpu": {**wanted, "memory": int(count * cpu.ram_gb_per_vcpu)}}, count * cpu.usd_per_vcpu
    wanted = body["gpu"]
    gpu = catalog.gpus().get(wanted["id"])
    if gpu is None:
        raise ApiProblem(400, f"GPU type {wanted['id']!r} not found")
    count = wanted.get("count", 1)
    if not gpu.usd_per_hour(cloud) or count > gpu.max_count:
        raise ApiProblem(400, NO_CAPACITY)
    return {"gpu": {"id": gpu.id, "count": count}}, count * gpu.usd_per_hour(cloud)


def _capacity(world: World, body: Json, cloud: str, centers: list[str]) -> list[str]:
    """Those of the data centres that have a machine: 402 without money, 400 without a machine."""
    if world.billed() >= world.settings.balance_usd:
        raise ApiProblem(402, "Insufficient balance to create a pod. Please add funds to your account.")
    gpu = body.get("gpu", {})
    facts = {"on": {"create"}, "gpu": {gpu.get("id")}, "cloud": {cloud}, "pod": {body["name"]}}
    has = [c for c in centers if not gpu or c in catalog.centers_of(gpu["id"])]
    free = [c for c in has if not world.faults.any("no_capacity", **facts, data_center={c})]
    if not free:
        fault = world.faults.take("no_capacity", **facts, data_center=set(centers))
        raise ApiProblem(400, fault.detail if fault and fault.detail else NO_CAPACITY)
    limit = world.settings.max_pods
    if limit is not None and sum(p.status != "EXITED" for p in world.engine.pods.values()) >= limit:
        raise ApiProblem(400, NO_CAPACITY)
    offered = catalog.content()["cuda_versions"]
    floor = gpu.get("minCudaVersion")
    allowed = gpu.get("allowedCudaVersions") or [v for v in offered if not floor or _version(v) >= _version(floor)]
    if gpu and not set(allowed) & set(offered):
        raise ApiProblem(400, NO_CAPACITY)
    return free


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _public_key(world: World, body: Json) -> str:
    """The account's keys, for a pod with `startSsh` that brings none of its own."""
    if not body.get("startSsh") or "PUBLIC_KEY" in body.get("env", {}):
        return ""
    return "\n".join(world.ssh_keys)
