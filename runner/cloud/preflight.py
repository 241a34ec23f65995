"""Checks before a pod is requested: key, volume, GPU, cap, ssh. Nothing is rented."""

from __future__ import annotations

import shutil
from typing import Any

from runner.cloud.runpod import templates
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.offers import Candidate, candidates, cpu_candidates, runpod
from runner.cloud.runpod.types import DataCenter, Volume
from runner.config.suggestions import nearest
from runner.errors import CannotRunError, NotYetError, Problem, RequestError
from runner.spec import RunSpec

REGIONS = {"EU", "EUR", "AP", "OC", "SEA"}
"""With which ids of data centres begin that have their country second: `EU-RO-1`, but `US-KS-2`."""


def check(api: Api, spec: RunSpec, plan: dict[str, Any]) -> tuple[list[Candidate], Volume | None]:
    """Machines to ask for, and the network volume; every error is one line with its remedy."""
    if shutil.which("ssh") is None:
        what = "ssh, by which a run is sent to a pod, is not installed"
        raise CannotRunError(Problem(what, "where=runpod", "install it: apt-get install openssh-client rsync"))
    if spec.hw.num_nodes > 1:
        what = f"hw.num_nodes={spec.hw.num_nodes}: this version rents one machine for a run"
        raise NotYetError(Problem(what, "where=runpod", "take one machine with more GPUs, such as hw=h100x8"))
    place = runpod(spec)
    if place.template is not None:
        templates.find(api, place.template)
    volume = volume_of(api, spec)
    on_cpu = spec.hw.accelerator == "cpu" and not place.gpu_types
    if not place.country:
        if on_cpu:
            return cpu_candidates(spec, api.cpus(), volume), volume
        return candidates(spec, plan, api.gpus(), volume), volume
    centers = _centers(api, spec, volume)
    if on_cpu:
        return cpu_candidates(spec, api.cpus(), volume, centers), volume
    gpus = api.gpus(count=spec.hw.num_gpus, cloud=place.cloud, countries=place.country)
    within = {gpu.id: tuple(sorted(set(gpu.data_centers) & set(centers))) for gpu in gpus}
    return candidates(spec, plan, api.gpus(), volume, within), volume


def _centers(api: Api, spec: RunSpec, volume: Volume | None) -> list[str]:
    """Data centres of the countries that were named, of those that were named themselves if any; RequestError where a
    country has none, or a named data centre or the volume is elsewhere."""
    place = runpod(spec)
    source = f"where.country=[{','.join(place.country)}]"
    found = [center for code in place.country for center in centers_in(api, code, place.cloud, source)]
    if elsewhere := [center for center in place.data_centers if center not in found]:
        what = f"{', '.join(elsewhere)}: not in {' or '.join(place.country)}, where RunPod has {', '.join(found)}"
        raise RequestError(Problem(what, "where.data_centers", "leave out where.data_centers, or where.country"))
    if volume is not None and volume.data_center not in found:
        what = f"network volume {volume.name} is in {volume.data_center}, which is not in {' or '.join(place.country)}"
        raise RequestError(Problem(what, source, "leave out where.country: the pod is where its volume is"))
    return [center for center in found if not place.data_centers or center in place.data_centers]


def centers_in(api: Api, country: str, cloud: str | None, source: str) -> list[str]:
    """Data centres of a country; RequestError with the countries that there are where it has none."""
    found = {center for gpu in api.gpus(cloud=cloud, countries=[country]) for center in gpu.data_centers}
    if not found:
        known = ", ".join(sorted({_country(center) for center in api.data_centers()}))
        cloud = f" in its {cloud} cloud" if cloud else ""
        raise RequestError(Problem(f"RunPod has no GPU in {country}{cloud}", source, f"it has data centres in {known}"))
    return sorted(found)


def _country(center: DataCenter) -> str:
    """Its country, as its id has it; RunPod's list of data centres does not say."""
    first, _, rest = center.id.partition("-")
    return rest.partition("-")[0] if first in REGIONS else first


def volume_of(api: Api, spec: RunSpec) -> Volume | None:
    """The network volume that `where.volume` names, by id or name; and every named data centre exists."""
    place = runpod(spec)
    if place.data_centers:
        known = {center.id: center.id for center in api.data_centers()}
        for center in place.data_centers:
            if center not in known:
                near = nearest(center, known)
                remedy = f"did you mean {near}?" if near else f"one of {', '.join(sorted(known))}"
                raise RequestError(Problem(f"RunPod has no data centre {center}", "where.data_centers", remedy))
    if place.volume is None:
        return None
    volumes = api.volumes()
    found = [v for v in volumes if v.id == place.volume] or [v for v in volumes if v.name == place.volume]
    source = f"where.volume={place.volume}"
    if not found:
        names = ", ".join(f"{v.name} ({v.id}, {v.data_center})" for v in volumes) or "there is none yet"
        remedy = f"python -m runner volumes create NAME --size 100 --data-center EU-RO-1; this account has: {names}"
        raise RequestError(Problem(f"there is no network volume {place.volume}", source, remedy))
    if len(found) > 1:
        ids = " or ".join(f"{v.id} ({v.data_center})" for v in found)
        raise RequestError(
            Problem(f"{len(found)} network volumes have that name", source, f"name one by its id: {ids}")
        )
    (volume,) = found
    if place.data_centers and volume.data_center not in place.data_centers:
        what = f"network volume {volume.name} is in {volume.data_center}, and a pod elsewhere cannot have it"
        raise RequestError(Problem(what, "where.data_centers", f"write where.data_centers=[{volume.data_center}]"))
    return volume
