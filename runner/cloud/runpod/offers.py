"""Offers in order of preference: GPU types × data centres, in a named cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runner.cloud.runpod.cpu_flavors import vcpus
from runner.config.suggestions import nearest
from runner.errors import CannotRunError, Problem, RequestError
from runner.plan.pod_packages import data
from runner.spec import RunPodPlace, RunSpec

if TYPE_CHECKING:
    from runner.cloud.runpod.types import CpuType, GpuType, Volume


@dataclass(frozen=True, slots=True)
class Candidate:
    """A machine to ask for."""

    cloud: str
    usd_per_hour: float
    """Of all its GPUs, as the catalogue says it."""
    gpu_id: str | None = None
    gpu_count: int = 0
    cpu_id: str | None = None
    num_vcpus: int = 0
    data_centers: tuple[str, ...] = ()
    """Any of these; empty means anywhere."""

    @property
    def described(self) -> str:
        """`3 × NVIDIA H100 80GB HBM3 in EU-RO-1 (secure cloud, $9.87 an hour)`."""
        what = f"{self.gpu_count} × {self.gpu_id}" if self.gpu_id else f"{self.cpu_id} with {self.num_vcpus} vCPUs"
        place = f" in {' or '.join(self.data_centers)}" if self.data_centers else ""
        return f"{what}{place} ({self.cloud} cloud, ${self.usd_per_hour:.2f} an hour)"


def candidates(
    spec: RunSpec, plan: dict[str, Any], gpus: Sequence[GpuType], volume: Volume | None,
    within: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Machines for a run of GPUs, best first; with `within` only in those data centres of each GPU type. RequestError
    and CannotRunError say why there is none."""
    place, count = runpod(spec), max(1, spec.hw.num_gpus)
    known = {gpu.id: gpu for gpu in gpus}
    wanted = wanted_gpus(spec, known)
    price = {i: known[i].usd(place.cloud) for i in wanted}
    dearer = _affordable(spec, plan)
    found: list[Candidate] = []
    why: list[str] = []
    for gpu_id in wanted:
        gpu, usd = known[gpu_id], price[gpu_id]
        if usd is None and not place.spot:
            why.append(f"{gpu_id} is not in the {place.cloud} cloud")
            continue
        rate = (place.bid_usd if place.bid_usd is not None else usd or 0.0) * count
        there = within.get(gpu_id, ()) if within is not None else ()
        if gpu.most(place.cloud) and gpu.most(place.cloud) < count:
            why.append(f"a pod has at most {gpu.most(place.cloud)} × {gpu_id} in the {place.cloud} cloud")
        elif within is not None and not there:
            why.append(f"no data centre in {' or '.join(place.country)} has {count} × {gpu_id}")
        elif reason := dearer(rate, named=gpu_id in place.gpu_types or gpu_id == spec.hw.runpod_gpu_id):
            why.append(f"{gpu_id}: {reason}")
        else:
            machine = Candidate(place.cloud, rate, gpu_id, count)
            found += _placed(machine, place, volume, there)
    if not found:
        raise CannotRunError(Problem("; ".join(why), "where=runpod", _remedy(why, place)))
    return found


def cpu_candidates(
    spec: RunSpec, cpus: Sequence[CpuType], volume: Volume | None, within: Sequence[str] = ()
) -> list[Candidate]:
    """A CPU pod: for `hw=cpu`, to try things at a few cents an hour. It is in the secure cloud, as all of them are."""
    place = runpod(spec)
    known = {cpu.id: cpu for cpu in cpus}
    flavour = known.get(place.cpu_type)
    if flavour is None:
        near = nearest(place.cpu_type, {i: i for i in known})
        remedy = f"did you mean {near}?" if near else f"one of {', '.join(sorted(known))}"
        raise RequestError(Problem(f"RunPod has no CPU flavour {place.cpu_type}", "where.cpu_type", remedy))
    cores = vcpus(spec.hw.num_cpus, flavour.fewest, flavour.most)
    rate = flavour.usd_per_vcpu * cores
    if reason := _over_the_cap(place, rate):
        raise CannotRunError(Problem(f"{place.cpu_type}: {reason}", "where.max_usd", _remedy([reason], place)))
    machine = Candidate("secure", rate, cpu_id=flavour.id, num_vcpus=cores)
    return _placed(machine, place, volume, within)


def wanted_gpus(spec: RunSpec, known: dict[str, GpuType]) -> list[str]:
    """RunPod's ids in order: those that were named, else that of `hw` and its stand-ins with as much memory."""
    place = runpod(spec)
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
    others = [i for i in stand_ins(spec.model.num_parameters) if i != first and i in known]
    return [first, *(i for i in others if known[i].memory_gb >= memory)]


def stand_ins(num_parameters: int | None) -> list[str]:
    """The list of conf/runpod/gpus.yaml for a model of that size."""
    billions = (num_parameters or 0) / 1e9
    for entry in data("gpus")["by_size"]:
        if entry["up_to"] is None or billions <= entry["up_to"]:
            return list(entry["gpus"])
    return []


def image_of(place: RunPodPlace) -> str:
    """The container image that `where.image` names."""
    named: dict[str, Any] = data("images").get(place.image, {})
    return str(named.get("image", place.image))


def runpod(spec: RunSpec) -> RunPodPlace:
    """The place of a run that is to be rented."""
    assert isinstance(spec.where, RunPodPlace)
    return spec.where


def _placed(
    machine: Candidate, place: RunPodPlace, volume: Volume | None, within: Sequence[str] = ()
) -> list[Candidate]:
    """One per data centre that was named, in that order; with a network volume, where that is; else one for all data
    centres of the countries that were named."""
    if volume is not None:
        return [replace(machine, data_centers=(volume.data_center,))]
    if place.data_centers:
        return [replace(machine, data_centers=(center,)) for center in place.data_centers]
    if place.spot:  # a bid names one data centre
        return [replace(machine, data_centers=(center,)) for center in within] or [machine]
    return [replace(machine, data_centers=tuple(within))]


def _affordable(spec: RunSpec, plan: dict[str, Any]) -> Any:
    """(US$ per hour, whether it was named) → why that is too much, or an empty text."""
    place, hours, planned = runpod(spec), plan.get("hours"), plan.get("usd_per_hour")
    dearest = float(data("gpus")["dearest"])

    def reason(rate: float, *, named: bool) -> str:
        if over := _over_the_cap(place, rate):
            return over
        if place.max_usd is not None and hours and rate * hours > place.max_usd:
            return f"${rate:.2f} an hour for {hours:.2f} hours is more than where.max_usd={place.max_usd:g}"
        if place.max_usd is None and not named and planned and rate > dearest * planned:
            return f"${rate:.2f} an hour, where the plan says ${planned:.2f}: name it in where.gpu_types to allow that"
        return ""

    return reason


def _over_the_cap(place: RunPodPlace, rate: float) -> str:
    """A cap that does not pay for one hour ends a pod before it has done anything, more often than not."""
    if place.max_usd is None or rate <= place.max_usd:
        return ""
    return f"the first hour costs ${rate:.2f}, more than where.max_usd={place.max_usd:g}"


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
    near = nearest(short, {gpu.name: gpu.id for gpu in known.values()}) or nearest(gpu_id, known)
    remedy = f"did you mean {near!r}?" if near else "python -m runner gpus lists RunPod's ids"
    return f"RunPod has no GPU {gpu_id!r}", "where.gpu_types", remedy
