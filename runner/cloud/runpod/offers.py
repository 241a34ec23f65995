"""Offers in order of preference: GPU types × data centres, in a named cloud; and the search for templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from runner.cloud import budget
from runner.cloud.provider import Offer
from runner.cloud.runpod.api import Api
from runner.cloud.runpod.catalog import gpus_by_model_size, image_of, vcpus
from runner.cloud.runpod.json_types import CpuType, DataCenter, GpuType, Volume
from runner.config.did_you_mean import nearest
from runner.config.pod_packages import runpod_table
from runner.errors import CannotRunError, Problem, RequestError
from runner.spec import RunPodPlace, RunSpec


def candidates(
    spec: RunSpec, plan: dict[str, Any], gpus: Sequence[GpuType], volume: Volume | None,
    within: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Offer]:  # fmt: skip
    """Machines for a run of GPUs, best first; with `within` only in those data centres of each GPU type. RequestError
    and CannotRunError say why there is none."""
    place, count = runpod_place(spec), max(1, spec.hw.num_gpus)
    known = {gpu.id: gpu for gpu in gpus}
    times = float(runpod_table("gpus")["dearest"])
    found: list[Offer] = []
    why: list[str] = []
    for gpu_id in wanted_gpus(spec, known):
        gpu = known[gpu_id]
        usd = gpu.usd(place.cloud)
        if usd is None and not place.spot:
            why.append(f"{gpu_id} is not in the {place.cloud} cloud")
            continue
        rate = (place.bid_usd if place.bid_usd is not None else usd or 0.0) * count
        there = within.get(gpu_id, ()) if within is not None else ()
        if gpu.most(place.cloud) and gpu.most(place.cloud) < count:
            why.append(f"a pod has at most {gpu.most(place.cloud)} × {gpu_id} in the {place.cloud} cloud")
        elif within is not None and not there:
            why.append(f"no data centre in {' or '.join(place.country)} has {count} × {gpu_id}")
        elif reason := budget.over_plan(
            place, plan, rate, named=gpu_id in place.gpu_types or gpu_id == spec.hw.runpod_gpu_id, most_times=times
        ):
            why.append(f"{gpu_id}: {reason}")
        else:
            machine = Offer(place.cloud, rate, gpu_id, count)
            found += _placed(machine, place, volume, there)
    if not found:
        raise CannotRunError(Problem("; ".join(why), "where=runpod", _remedy(why, place)))
    return found


def cpu_candidates(
    spec: RunSpec, cpus: Sequence[CpuType], volume: Volume | None, within: Sequence[str] = ()
) -> list[Offer]:
    """A CPU pod: for `hw=cpu`, to try things at a few cents an hour. It is in the secure cloud, as all of them are."""
    place = runpod_place(spec)
    known = {cpu.id: cpu for cpu in cpus}
    flavour = known.get(place.cpu_type)
    if flavour is None:
        near = nearest(place.cpu_type, {i: i for i in known})
        remedy = f"did you mean {near}?" if near else f"one of {', '.join(sorted(known))}"
        raise RequestError(Problem(f"RunPod has no CPU flavour {place.cpu_type}", "where.cpu_type", remedy))
    cores = vcpus(spec.hw.num_cpus, flavour.fewest, flavour.most)
    rate = flavour.usd_per_vcpu * cores
    if reason := budget.over_first_hour(place, rate):
        raise CannotRunError(Problem(f"{place.cpu_type}: {reason}", "where.max_usd", _remedy([reason], place)))
    machine = Offer("secure", rate, cpu_id=flavour.id, num_vcpus=cores)
    return _placed(machine, place, volume, within)


def wanted_gpus(spec: RunSpec, known: dict[str, GpuType]) -> list[str]:
    """RunPod's ids in order: those that were named, else that of `hw` and its stand-ins with as much memory."""
    place = runpod_place(spec)
    if place.gpu_types:
        unknown = [gpu_id for gpu_id in place.gpu_types if gpu_id not in known]
        if unknown:
            raise RequestError(*(Problem(*_unknown(i, known)) for i in unknown))
        return place.gpu_types
    first = spec.hw.runpod_gpu_id
    if first is None:
        what = f"hw={spec.hw.name}: RunPod has no such GPU that this project knows"
        remedy = 'name some: where.gpu_types=["NVIDIA GeForce RTX 4090"]; python -m runner gpus lists them'
        raise RequestError(Problem(what, "where=runpod", remedy))
    if first not in known:
        what, _, remedy = _unknown(first, known)
        raise RequestError(Problem(what, f"hw={spec.hw.name}", remedy))
    memory = known[first].memory_gb
    others = [i for i in gpus_by_model_size(spec.model.num_parameters) if i != first and i in known]
    return [first, *(i for i in others if known[i].memory_gb >= memory)]


def runpod_place(spec: RunSpec) -> RunPodPlace:
    """The place of a run that is to be rented."""
    assert isinstance(spec.where, RunPodPlace)
    return spec.where


def _placed(machine: Offer, place: RunPodPlace, volume: Volume | None, within: Sequence[str] = ()) -> list[Offer]:
    """One per data centre that was named, in that order; with a network volume, where that is; else one for all data
    centres of the countries that were named."""
    if volume is not None:
        return [replace(machine, data_centers=(volume.data_center,))]
    if place.data_centers:
        return [replace(machine, data_centers=(center,)) for center in place.data_centers]
    if place.spot:  # a bid names one data centre
        return [replace(machine, data_centers=(center,)) for center in within] or [machine]
    return [replace(machine, data_centers=tuple(within))]


def _remedy(why: Sequence[str], place: RunPodPlace) -> str:
    if any("max_usd" in reason for reason in why):
        return "raise where.max_usd, or take cheaper hardware: python -m runner gpus"
    if any("no data centre" in reason for reason in why):
        listed = " ".join(f"--country {code}" for code in place.country)
        return f"take what is there (hw=…, where.gpu_types), or another country: python -m runner gpus {listed}"
    return "take other GPUs or the other cloud (where.gpu_types, where.cloud): python -m runner gpus"


def _unknown(gpu_id: str, known: dict[str, GpuType]) -> tuple[str, str, str]:
    """What, source, remedy."""
    short = gpu_id.removeprefix("NVIDIA ").removeprefix("GeForce ")  # `NVIDIA RTX 4090` is nobody's id, and meant often
    near = nearest(short, {gpu.name: gpu.id for gpu in known.values()}) or nearest(gpu_id, [*known])
    remedy = f"did you mean {near!r}?" if near else "python -m runner gpus lists RunPod's ids"
    return f"RunPod has no GPU {gpu_id!r}", "where.gpu_types", remedy


REGIONS = {"EU", "EUR", "AP", "OC", "SEA"}
"""With which ids of data centres begin that have their country second: `EU-RO-1`, but `US-KS-2`."""


def offers(api: Api, spec: RunSpec, plan: dict[str, object]) -> list[Offer]:
    """Machines to ask for, with template or image and network volume; every error is one line with its remedy."""
    place = runpod_place(spec)
    template = find_template(api, place.template) if place.template is not None else None
    volume = volume_of(api, spec)
    image = None if template else image_of(place)
    machines = _machines(api, spec, plan, volume)
    return [replace(m, image=image, template=template, volume_id=volume.id if volume else None) for m in machines]


def _machines(api: Api, spec: RunSpec, plan: dict[str, object], volume: Volume | None) -> list[Offer]:
    place = runpod_place(spec)
    on_cpu = spec.hw.accelerator == "cpu" and not place.gpu_types
    if not place.country:
        if on_cpu:
            return cpu_candidates(spec, api.cpus(), volume)
        return candidates(spec, plan, api.gpus(), volume)
    centers = _centers(api, spec, volume)
    if on_cpu:
        return cpu_candidates(spec, api.cpus(), volume, centers)
    gpus = api.gpus(count=spec.hw.num_gpus, cloud=place.cloud, countries=place.country)
    within = {gpu.id: tuple(sorted(set(gpu.data_centers) & set(centers))) for gpu in gpus}
    return candidates(spec, plan, api.gpus(), volume, within)


def _centers(api: Api, spec: RunSpec, volume: Volume | None) -> list[str]:
    """Data centres of the countries that were named, of those that were named themselves if any; RequestError where a
    country has none, or a named data centre or the volume is elsewhere."""
    place = runpod_place(spec)
    source = f"where.country=[{','.join(place.country)}]"
    found = [center for code in place.country for center in centers_in(api, code, place.cloud, source)]
    if elsewhere := [center for center in place.data_centers if center not in found]:
        what = f"{', '.join(elsewhere)}: not in {' or '.join(place.country)}, where RunPod has {', '.join(found)}"
        raise RequestError(Problem(what, "where.data_centers", "leave out where.data_centers, or where.country"))
    if volume is not None and volume.data_center not in found:
        what = f"network volume {volume.name} is in {volume.data_center}, which is not in {' or '.join(place.country)}"
        raise RequestError(Problem(what, source, "leave out where.country: the pod is where its volume is"))
    return [center for center in found if not place.data_centers or center in place.data_centers]


def gpus_there(api: Api, spec: RunSpec, counts: Iterable[int]) -> tuple[str, dict[int, set[str]]] | None:
    """The place that a run is bound to by country, data centre or network volume, in words, and the ids of the GPUs
    there, by how many one pod has of them; None for a run that may be anywhere. Errors as `offers` has them."""
    place = runpod_place(spec)
    if not (place.country or place.data_centers or place.volume):
        return None
    volume = volume_of(api, spec)
    if place.country:
        words, centers = " or ".join(place.country), _centers(api, spec, volume)
    else:
        centers = [volume.data_center] if volume else place.data_centers
        words = " or ".join(centers)
    more = {"countries": place.country} if place.country else {}
    listed = {count: api.gpus(count=count, cloud=place.cloud, stock=True, **more) for count in set(counts)}
    return words, {n: {gpu.id for gpu in gpus if set(gpu.data_centers) & set(centers)} for n, gpus in listed.items()}


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
    place = runpod_place(spec)
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


SOURCES = ("official", "verified", "community")


def search_templates(api: Api, text: str = "") -> list[dict[str, str]]:
    """Templates for pods that have every word of `text` in their name, image or id: the account's own first."""
    found = [{**template, "source": "own"} for template in api.templates()]
    for source in SOURCES:
        found += [{**template, "source": source} for template in api.public_templates(source)]
    words = text.lower().split()
    rows: dict[str, dict[str, str]] = {}
    for template in found:
        row = {key: str(template.get(key) or "") for key in ("id", "name", "image", "category", "source")}
        said = f"{row['name']} {row['image']} {row['id']}".lower()
        if not template.get("serverless") and all(word in said for word in words):
            rows.setdefault(row["id"], row)
    return list(rows.values())


def find_template(api: Api, word: str) -> str:
    """The id of the template named by id or exact name; RequestError for none, several, or a serverless one."""
    source = f"where.template={word}"
    template = api.template(word)
    if template is not None and template.get("serverless"):
        what = f"template {word} ({template.get('name')}) is for serverless workers, and no pod can be made of it"
        raise RequestError(Problem(what, source, "python -m runner pods templates lists those for pods"))
    if template is not None:
        return word
    rows = search_templates(api)
    named = [row["id"] for row in rows if row["name"].lower() == word.lower()]
    if len(named) == 1:
        return named[0]
    if named:
        what = f"{len(named)} templates have the name {word}"
        raise RequestError(Problem(what, source, f"name one by its id: {' or '.join(named)}"))
    near = nearest(word, {text: row["id"] for row in rows for text in (row["name"], row["id"])})
    remedy = f"did you mean {near}?" if near else "python -m runner pods templates TEXT searches them"
    raise RequestError(Problem(f"RunPod has no template {word} that this key may use", source, remedy))
