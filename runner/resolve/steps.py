"""Resolve a request: an ordered list of steps, each spec → spec, after which no value is open.

Facts first (this machine, the model), then the place, then what follows from them. The rules of the schema are checked
once, when all facts are in and before any `auto` is decided, so that an error names what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from runner.config import deepspeed_json, pod_packages
from runner.config.command_line import Request
from runner.config.compose import Sources, compose
from runner.config.validation import SourceOf, validated
from runner.data.pretraining import corpus_checks
from runner.errors import RequestError
from runner.machine import detect, hostfile, kernels
from runner.plan import auto_values
from runner.resolve import config_facts, place, plan_inputs
from runner.spec import RunSpec
from runner.spec.unused_keys import unused_keys


@dataclass
class Resolution:
    """State that the steps of one resolution share."""

    requested: RunSpec
    """The run as it was composed."""
    source_of: SourceOf = field(default=lambda key: None)
    needed: bool = False
    """The facts of a model outside the catalogue are asked of the Hub, and missing ones are an error."""
    fetch: bool = False
    """They are asked for as well, and done without where the Hub cannot be reached."""
    place_is_chosen: bool = False
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""


Step = Callable[[RunSpec, Resolution], RunSpec]


def detect_hardware(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Replace `hw=detect` by what this machine has, and fill in what a CPU leaves open."""
    if spec.hw.accelerator == "detect":
        resolution.notes += detect.detect().remarks
    return spec.model_copy(update={"hw": detect.resolve(spec.hw)})


def read_hostfile(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Take machines, processes and rendezvous from `hw.hostfile`."""
    return spec.model_copy(update={"hw": hostfile.apply(resolution.requested.hw, spec.hw)})


def choose_attention(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Decide `train.attention=auto` where a kernel is installed here that is faster than torch's own."""
    found = kernels.installed_attention(spec)
    if spec.train.attention != "auto" or found is None:
        return spec
    return spec.model_copy(update={"train": spec.train.model_copy(update={"attention": found})})


def read_deepspeed_json(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Take stage, precision and micro batch from a DeepSpeed JSON of the user's own; the two must agree."""
    return deepspeed_json.apply(spec, resolution.source_of)


def add_model_facts(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Give a model outside the catalogue the sizes in its config.json, and check the modules that the method names."""
    if resolution.fetch:
        config_facts.fetch_config(spec)
    found = config_facts.with_facts(spec, needed=resolution.needed)
    if problem := config_facts.wrong_module(found):
        raise RequestError(replace(problem, source=resolution.source_of(str(problem.source))))
    return found


def choose_place(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Decide `where=auto`, and the hardware of a rented run that names none."""
    if spec.where.name == "local":
        return spec
    if spec.where.name == "auto" or place.hardware_is_open(resolution.requested):
        spec = check_rules(spec, resolution)  # a run that nothing could hold is not searched for
    here = None if detect.why_not_here(spec.hw) else spec.hw
    found, chosen = place.choose(spec, resolution.requested.hw, here)
    resolution.notes = chosen or resolution.notes  # this machine's shortcomings are none of a pod's
    resolution.place_is_chosen = True
    return found


def check_rules(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Refuse what breaks a rule of the schema; rules of hardware wait while the hardware is open."""
    wait = not resolution.place_is_chosen and place.hardware_is_open(resolution.requested)
    values = spec.model_dump() | ({"hw": resolution.requested.hw.model_dump()} if wait else {})
    checked = validated(values, resolution.source_of)
    return checked.model_copy(update={"hw": spec.hw}) if wait else checked


def check_workspace(spec: RunSpec, _: Resolution) -> RunSpec:
    """Refuse a corpus or a tokenizer that is not there, and packages that a pod cannot have."""
    corpus_checks.check_pretraining(spec)
    pod_packages.check_flash_attention(spec)
    return spec


def choose_stage_and_batch(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Decide precision, ZeRO stage, micro batch and the other `auto`s that follow from the hardware."""
    found, notes = auto_values.resolve_autos(spec, plan_inputs.stage_search(spec))
    resolution.notes += [*_packages_of_pod(found), *notes]
    return found


def choose_metric(spec: RunSpec, _: Resolution) -> RunSpec:
    """Decide `run.metric=auto` and `run.metric_mode=auto` by the objective."""
    run, objective = spec.run, spec.objective
    metric = objective.metric if run.metric == "auto" else run.metric
    mode = objective.metric_mode if metric == objective.metric else "min"
    mode = mode if run.metric_mode == "auto" else run.metric_mode
    return spec.model_copy(update={"run": run.model_copy(update={"metric": metric, "metric_mode": mode})})


def note_unread_keys(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Name keys that have no effect in this combination; before a pod is sized, for what is decided nobody wrote."""
    source = resolution.source_of
    resolution.notes += unused_keys(spec, source.typed) if isinstance(source, Sources) else unused_keys(spec)
    return spec


def size_pod(spec: RunSpec, resolution: Resolution) -> RunSpec:
    """Decide the disks and the deadline of a pod from the plan."""
    return plan_inputs.with_disks_and_deadline(spec)


FACTS: tuple[Step, ...] = (detect_hardware, read_hostfile, choose_attention, read_deepspeed_json, add_model_facts)
"""Steps that look facts up; every `auto` stays open."""
STEPS: tuple[Step, ...] = (
    *FACTS,
    choose_place,
    check_rules,
    check_workspace,
    choose_stage_and_batch,
    choose_metric,
    note_unread_keys,
    size_pod,
)
"""From a composed run to a resolved one, in this order."""


def resolved(request: Request, *, needed: bool = False) -> tuple[RunSpec, list[str]]:
    """The run of a request with nothing left open, and notes for the user."""
    return resolve(compose(request), Sources(request), needed=needed)


def resolve(
    spec: RunSpec, source_of: SourceOf = lambda key: None, *, needed: bool = False, fetch: bool = False
) -> tuple[RunSpec, list[str]]:
    """A composed run with nothing left open, and notes for the user; RequestError and CannotRunError by its steps."""
    resolution = Resolution(spec, source_of, needed=needed, fetch=fetch)
    ready = _apply(STEPS, spec, resolution)
    return ready, resolution.notes


def with_facts(spec: RunSpec, source_of: SourceOf = lambda key: None, *, needed: bool = False) -> RunSpec:
    """A composed run with the facts of hardware and model, its `auto`s and its place still open."""
    return _apply((*FACTS, check_rules), spec, Resolution(spec, source_of, needed=needed))


def _apply(steps: Iterable[Step], spec: RunSpec, resolution: Resolution) -> RunSpec:
    for step in steps:
        spec = step(spec, resolution)
    return spec


def _packages_of_pod(ready: RunSpec) -> list[str]:
    """Notes on packages that the run could use and a pod has, or lacks."""
    if not ready.is_rented:
        return []
    brings = pod_packages.image_note(ready)
    return [brings] if brings else []
