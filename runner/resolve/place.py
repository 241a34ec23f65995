"""Choose where a run is executed: `where=auto`, and the hardware of a rented run that names none.

A GPU is never silently a CPU: `where=runpod` without `hw=` takes the cheapest GPUs that hold the run, whatever this
machine has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from runner.cloud.provider import place_of
from runner.cloud.runpod.catalog import gpus_by_model_size
from runner.config import conf_files
from runner.config.validation import validated
from runner.errors import CannotRunError, Problem, RequestError, RunnerError
from runner.machine import detect
from runner.plan import auto_values
from runner.plan.plan import Plan
from runner.plan.search import Offer, offers
from runner.report.text import duration
from runner.resolve import config_facts, plan_inputs
from runner.spec import AutoPlace, HardwareSpec, LocalPlace, RentedPlace, RunPodPlace, RunSpec


def choose(spec: RunSpec, requested: HardwareSpec, here: HardwareSpec | None) -> tuple[RunSpec, list[str]]:
    """The run with its place decided and, where it is rented, its hardware; and one sentence that says why.

    `requested` is the hardware as it was asked for, `here` that of this machine, None if another one was named.
    CannotRunError where no hardware to rent is known to hold the run.
    """
    place = spec.where
    if isinstance(place, AutoPlace):
        return _choose_auto(spec, place, requested, here)
    if isinstance(place, RunPodPlace) and _unnamed(requested):
        return _choose_rented(spec, place, requested)
    return spec, []


def hardware_is_open(requested: RunSpec) -> bool:
    """The hardware is chosen with the place: a run that may be rented names none."""
    return requested.where.name != "local" and _unnamed(requested.hw)


def _unnamed(requested: HardwareSpec) -> bool:
    """`hw.num_gpus=0` names the CPU."""
    return requested.accelerator == "detect" and (
        requested.num_gpus > 0 or "num_gpus" not in requested.model_fields_set
    )


def _choose_auto(
    spec: RunSpec, place: AutoPlace, requested: HardwareSpec, here: HardwareSpec | None
) -> tuple[RunSpec, list[str]]:
    # A run here costs nothing: what was said of money is for the pod.
    local = spec.model_copy(update={"where": LocalPlace(max_hours=place.max_hours)})
    rented = spec.model_copy(update={"where": place.rented})
    if plan_inputs.stage_search(spec) is None:
        return local, ["where=auto: here, since nothing can be planned"]
    if here is None:  # the user has chosen the hardware
        planned = _planned(rented)
        fit = "" if planned is None or planned.fits else ", and it does not fit there either"
        return rented, [f"where=auto: this machine is not {spec.hw.name}{fit}; rented"]
    local = local.model_copy(update={"hw": here})
    planned = _planned(local)
    fits = planned is not None and planned.fits
    hours = planned.hours if planned else None
    limit = min(place.max_hours_here, place.max_hours or place.max_hours_here)
    if fits and (hours is None or hours <= limit):
        return local, ["where=auto: here, where it fits" + (f" and takes {duration(3600 * hours)}" if hours else "")]
    if fits and hours is not None:
        name = "where.max_hours_here" if place.max_hours is None or place.max_hours > limit else "where.max_hours"
        why = f"here it takes {duration(3600 * hours)}, more than {name}={limit:g}"
    else:
        why = _too_large(planned)
    best, said = _best(rented, requested)
    if best is None:
        if fits:
            return local, [f"where=auto: here, though {why}: {said}"]
        return rented, [f"where=auto: {why}, and {said}"]
    if fits and place.max_hours is None and not _worth_it(best, hours):
        return local, [f"where=auto: here, though {why}: {said}, which is not faster, or costs more than where.max_usd"]
    return best, [f"where=auto: {why}; rented, {said}"]


def _choose_rented(spec: RunSpec, place: RunPodPlace, requested: HardwareSpec) -> tuple[RunSpec, list[str]]:
    """A rented run whose hardware nobody has named, on GPUs."""
    best, said = _best(spec, requested)
    if best is not None and place.pod is not None:
        return best, [f"where.pod={place.pod}: {said}"]
    if best is not None:
        return best, [f"where=runpod: {said}; hw=NAME takes another, hw=cpu a CPU"]
    if named := _of_gpu_types(spec, requested):
        return spec.model_copy(update={"hw": named}), [
            f"where=runpod: {said}; hw={named.name} is the first that is named"
        ]
    if place.gpu_types:  # ids without a profile are rented all the same
        return spec, [f"where=runpod: {said}; planned for this machine's memory, as conf/hw has none of the GPUs named"]
    remedy = "name it, such as hw=h100, or hw=cpu for a CPU pod; python -m runner fit shows what fits"
    raise CannotRunError(Problem(f"which hardware to rent is not known: {said}", "where=runpod", remedy))


def _best(spec: RunSpec, requested: HardwareSpec) -> tuple[RunSpec | None, str]:
    """The run on the GPUs that do it for the least money within its limits; else on those that cost least, for the plan
    to refuse. With it what to say: the choice and the runner-up, or why there is none."""
    if isinstance(spec.where, RentedPlace) and spec.where.pod is not None:
        return _of_pod(spec, spec.where.pod, requested)
    options = plan_inputs.stage_search(spec)
    if options is None:
        return None, f"no plan: {config_facts.why_no_plan(spec)}"
    size = plan_inputs.num_sequences(spec)
    hardware, there = _of_place(spec, _rentable(spec, requested))
    found = offers(spec, options, hardware, size, gpus_by_model_size(spec.model.num_parameters))
    if not found:
        return None, f"no hardware that is for rent{there} and has a known price holds it"
    within = [offer for offer in found if _within_limits(offer.change.spec)] if _has_limits(spec) else found
    (first, words), *others = _with_disks(within or found, size)
    second = f"; next {others[0][1]}" if others else ""
    return first.change.spec, f"hw={words} costs least{there}{second}"


def _with_disks(found: Sequence[Offer], sequences: int | None) -> list[tuple[Offer, str]]:
    """The first offers with their words, cheapest first by the sum that a launch names, which has disks in it."""
    planned = [(offer, _planned(offer.change.spec) if sequences else None) for offer in found[:COMPARED]]
    ranked = sorted(planned, key=lambda one: round(one[1].usd, 2) if one[1] and one[1].usd is not None else math.inf)
    return [(offer, _describe(offer, plan)) for offer, plan in ranked]


def _of_place(spec: RunSpec, hardware: list[HardwareSpec]) -> tuple[list[HardwareSpec], str]:
    """What of it the country, data centre or volume has that the run is bound to, and words that say so; all of it
    where RunPod cannot be asked. RequestError for a place that RunPod does not have."""
    place = spec.where
    if not isinstance(place, RunPodPlace) or not (place.country or place.data_centers or place.volume):
        return hardware, ""
    from runner.cloud.provider_errors import CloudError, NoKeyError, WrongKeyError
    from runner.cloud.runpod.api import Api  # 0.1 s, for a run that is bound to a place alone
    from runner.cloud.runpod.offers import gpus_there

    try:
        found = gpus_there(Api(), spec, {hw.num_gpus for hw in hardware})
    except (NoKeyError, WrongKeyError, CloudError) as error:
        return hardware, f" (whether it is where the run is bound to is not known: {error})"
    assert found is not None
    words, ids = found
    return [hw for hw in hardware if hw.runpod_gpu_id in ids[hw.num_gpus]], f" of what {words} has"


def _of_pod(spec: RunSpec, pod: str, requested: HardwareSpec) -> tuple[RunSpec, str]:
    """The run on the hardware of a pod that is there already. RequestError where conf/hw does not know it."""
    from runner.cloud import fleet  # 0.3 s, for a run that names a pod alone

    gpu_id, gpus, cpus = fleet.machine_of(pod, spec.where.name)
    if gpu_id is None:
        cpu = detect.resolve(HardwareSpec.model_validate(conf_files.load_choice("hw", "cpu")))
        return spec.model_copy(
            update={"hw": cpu.model_copy(update={"num_cpus": cpus or cpu.num_cpus})}
        ), "it has no GPU"
    count = requested.num_gpus if "num_gpus" in requested.model_fields_set else gpus
    found = sorted(
        (hw for hw in plan_inputs.hardware() if hw.runpod_gpu_id == gpu_id),
        key=lambda hw: (hw.num_gpus != count, hw.num_gpus),
    )
    if not found:
        what = f"pod {pod} has {gpus} × {gpu_id}, of which conf/hw has no profile"
        remedy = f"name one with no more memory, such as hw=l4, and write where.gpu_types='[\"{gpu_id}\"]'"
        raise RequestError(Problem(what, f"where.pod={pod}", remedy))
    hw = found[0].model_copy(update={"num_gpus": count})
    return spec.model_copy(update={"hw": hw}), f"it has {gpus} × {gpu_id} (hw={hw.name})"


def _has_limits(spec: RunSpec) -> bool:
    return spec.where.max_usd is not None or spec.where.max_hours is not None


def _within_limits(spec: RunSpec) -> bool:
    planned = _planned(spec)
    return planned is not None and not planned.reasons


def _rentable(spec: RunSpec, requested: HardwareSpec) -> list[HardwareSpec]:
    """The catalogue's GPUs that RunPod has, of the types and of the number that were asked for."""
    place = place_of(spec)
    given: dict[str, Any] = {key: getattr(requested, key) for key in requested.model_fields_set & _OF_ANY}
    found = [hw for hw in plan_inputs.hardware(where=place) if hw.runpod_gpu_id]
    if place.gpu_types:
        found = [hw for hw in found if hw.runpod_gpu_id in place.gpu_types]
    if given.get("num_gpus"):
        found = [hw for hw in found if hw.num_gpus == 1]
    return [hw.model_copy(update={key: value for key, value in given.items() if value is not None}) for hw in found]


def _of_gpu_types(spec: RunSpec, requested: HardwareSpec) -> HardwareSpec | None:
    """The profile of the first GPU of `where.gpu_types` that has one, whatever it costs."""
    place = place_of(spec)
    known = {hw.runpod_gpu_id: hw for hw in reversed(_rentable(spec, requested))}  # hw=l40s before hw=l40sx2
    return next((known[gpu_id] for gpu_id in place.gpu_types if gpu_id in known), None)


_OF_ANY = {"num_gpus", "num_nodes", "num_processes"}
"""Keys that hold for whatever hardware is chosen; memory, cores and prices are said of this machine."""
COMPARED = 3
"""Offers that are compared with their disks, which are a cent or two an hour."""


def _describe(offer: Offer, plan: Plan | None) -> str:
    hw = offer.hw
    rate = f"${hw.usd_per_hour:g} per GPU-hour"
    if plan is None or plan.usd is None or plan.hours is None:
        return f"{hw.name} ({rate})"
    return f"{hw.name} ({rate}, about ${plan.usd:.2f} and {duration(3600 * plan.hours)})"


def _worth_it(rented: RunSpec, hours_here: float | None) -> bool:
    """The pod is within its limits and faster than this machine."""
    planned = _planned(rented)
    if planned is None or planned.reasons:
        return False
    return planned.hours is None or hours_here is None or planned.hours < hours_here


def _planned(spec: RunSpec) -> Plan | None:
    """The plan of a run whose `auto`s are open; None where it cannot be made."""
    try:
        checked = validated(spec.model_dump(), lambda key: None)  # the rules for this hardware
        return plan_inputs.plan(auto_values.resolve_autos(checked, plan_inputs.stage_search(checked))[0], [])
    except RunnerError:
        return None


def _too_large(planned: Plan | None) -> str:
    if planned is None:
        return "it cannot be planned for this machine"
    peak, has = planned.peak_gib["expected"], planned.capacity_gib or 0
    return f"it needs {peak:.1f} GiB and this machine has {has:.1f}"
