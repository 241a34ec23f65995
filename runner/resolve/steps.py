"""Resolve a request: hardware, model, place, every `auto` and the disks, in one order."""

from __future__ import annotations

from dataclasses import replace

from runner.config.compose import Sources, compose, source_finder
from runner.config.request import Request
from runner.config.validation import SourceOf, validated
from runner.data.pretraining import checks
from runner.errors import RequestError
from runner.machine import detect, hostfile, kernels
from runner.plan import deepspeed_json, pod_packages
from runner.plan.auto_values import resolve
from runner.resolve import choose_place, plan_inputs
from runner.spec import RunSpec
from runner.spec.unused import unused


def resolved(request: Request, *, needed: bool = False) -> tuple[RunSpec, list[str]]:
    """The run with nothing left open, and notes for the user."""
    return complete(compose(request), source_finder(request), needed=needed)


def complete(
    spec: RunSpec, source_of: SourceOf = lambda key: None, *, needed: bool = False, fetch: bool = False
) -> tuple[RunSpec, list[str]]:
    """Look at the hardware and the model's facts, then decide every `auto`; the rules across parts are checked again.

    `needed`: the facts of a model outside the catalogue are asked of the Hub, and missing ones are an error.
    `fetch`: they are asked for as well, and done without where the Hub cannot be reached.
    """
    if fetch:
        plan_inputs.fetch(spec)
    checked = asked(spec, source_of, needed=needed)
    said = detect.detect().remarks if spec.hw.accelerator == "detect" else []
    said += [kernels.NO_FLASH] if checked.train.attention != spec.train.attention else []
    if checked.where.name != "local":
        here = None if detect.why_not_here(checked.hw) else checked.hw
        checked, chosen = choose_place.placed(checked, spec.hw, here)
        checked, said = validated(checked.model_dump(), source_of), chosen or said
    checks.check(checked)
    pod_packages.check(checked)
    ready, notes = resolve(checked, plan_inputs.options_for(checked))
    said += _of_pod(checked, ready)
    unread = unused(ready, source_of.typed) if isinstance(source_of, Sources) else unused(ready)
    return sized(ready), [*said, *notes, *unread]


def _of_pod(asked: RunSpec, ready: RunSpec) -> list[str]:
    """What a pod has and has not, where the run could use it."""
    if ready.where.name != "runpod":
        return []
    could = asked.train.attention == "auto" and ready.hw.flash_attention and ready.train.precision != "fp32"
    brings = pod_packages.note(ready)
    return [*([pod_packages.NO_FLASH] if could else []), *([brings] if brings else [])]


def sized(spec: RunSpec) -> RunSpec:
    """A run on a pod with its disks and its deadline decided; any other as it is."""
    if spec.where.name != "runpod":
        return spec
    try:
        planned = plan_inputs.plan(spec, [])
    except RequestError:  # a model that the arithmetic does not know
        planned = None
    return plan_inputs.rented(spec, planned)


def asked(spec: RunSpec, source_of: SourceOf = lambda key: None, *, needed: bool = False) -> RunSpec:
    """A composed run with the facts of hardware and model, its `auto`s still open."""
    found = spec.model_copy(update={"hw": hostfile.settled(spec.hw, detect.resolve(spec.hw))})
    found = deepspeed_json.decided(kernels.known(found), source_of)
    known = plan_inputs.with_facts(found, needed=needed)
    if problem := plan_inputs.no_targets(known):
        raise RequestError(replace(problem, source=source_of("method.target_modules")))
    if spec.where.name != "local" and choose_place.unnamed(spec.hw):  # rules of hardware wait until it is chosen
        values = {**known.model_dump(), "hw": spec.hw.model_dump()}
        return validated(values, source_of).model_copy(update={"hw": known.hw})
    return validated(known.model_dump(), source_of)
