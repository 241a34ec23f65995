"""Facts for the plan, looked up in files, caches and the price list."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

from runner.cloud.providers import DEFAULT, PRICES, Price
from runner.config import conf_files, credentials, deepspeed_json
from runner.data.inspect import lengths
from runner.data.pretraining import corpus_checks
from runner.errors import CannotRunError, Problem, RequestError, RunnerError
from runner.hub import config_json
from runner.plan.choose_stage import StageSearch
from runner.plan.memory import GIB
from runner.plan.model_shape import shape_of
from runner.plan.plan import Plan, plan_of
from runner.plan.run_time import GB, RunFacts
from runner.plan.search import nearest_changes
from runner.resolve import config_facts
from runner.spec import HardwareSpec, RentedPlace, RunSpec, Where
from runner.spec.where import LONGEST_HOURS

ENVIRONMENT_GB = 20  # torch with its CUDA libraries takes 8, packages on the way another 4: room for both
UNKNOWN_DISK_GB = 100  # where nothing can be planned: a 7B model in 16 bits, two checkpoints, the environment
UNKNOWN_HOURS = 24.0


def stage_search(spec: RunSpec) -> StageSearch | None:
    """ZeRO stages and micro batches to choose from; None for a model whose shape is not known."""
    try:
        shape_of(spec.model)
    except RequestError:
        return None
    return StageSearch(deepspeed_json.deepspeed_templates(spec.deepspeed))


def plan(spec: RunSpec, notes: list[str]) -> Plan:
    """The plan of a resolved run; RequestError where the model's shape is not known."""
    options = stage_search(spec)
    if options is None:
        shape_of(spec.model)  # says what is missing
        raise AssertionError("unreachable")
    return plan_of(spec, options, facts_of(spec), notes)


def plan_if_known(spec: RunSpec, notes: list[str]) -> Plan | None:
    """The plan of a resolved run; None for a model that the arithmetic does not know."""
    try:
        return plan(spec, notes)
    except RequestError:
        return None


def facts_of(spec: RunSpec) -> RunFacts:
    """Data, price and whether the weights are here."""
    notes: list[str] = []
    try:
        found = corpus_checks.lengths_of(spec) or lengths.lengths(
            corpus_checks.documents_of(spec), spec.model, seed=spec.train.seed, kind=spec.objective.learns_from
        )
    except RunnerError as error:
        found = lengths.DataLengths(None, None, False, str(error))
    steps, tokens, said = lengths.optimizer_steps(spec, found)
    notes += said
    usd, source = price_of(spec.hw, spec.where)
    if usd is not None and spec.where.name == "local" and spec.hw.accelerator == "cuda":
        notes.append("the cost is what renting this hardware would be")
    total = None
    if found.num_examples and found.tokens_per_example:
        total = round(found.num_examples * found.tokens_per_example)
    shards, data, unknown_size = corpus_checks.stored_bytes(spec, found)
    notes += unknown_size
    held_out, row = found.held_out_rows, found.held_out_tokens_per_row or spec.train.max_length
    if held_out is None and steps is not None:
        notes.append("time: the held-out loss is left out, as the number of held-out rows is not known")
    if spec.model.gated and credentials.hub_token() is None and not config_facts.at_hand(spec.model):
        notes.append(f"{spec.model.id} is gated: {config_json.gated_remedy(spec.model.id)}")
    if spec.data.source == "commands" and spec.model.package is None:
        notes.append("data is the bundled demo: name data= and train.max_length= for your own run")
    return RunFacts(
        num_steps=steps,
        tokens_total=tokens,
        data_tokens=total,
        shard_bytes=shards,
        data_bytes=data,
        held_out_tokens=(held_out or 0) * min(row, spec.train.max_length),
        prompts=0 if found.answer_tokens == 0 else held_out,
        prompt_tokens=found.held_out_tokens_per_row,
        answer_tokens=found.answer_tokens,
        usd_per_gpu_hour=usd,
        price_source=source,
        download=not config_facts.at_hand(spec.model),
        notes=tuple(notes),
    )


def with_disks_and_deadline(spec: RunSpec) -> RunSpec:
    """A run on a pod with its disks and its deadline decided, from what the plan says."""
    place = spec.where
    if not isinstance(place, RentedPlace):
        return spec
    planned = plan_if_known(spec, [])
    disk = UNKNOWN_DISK_GB if planned is None else math.ceil(planned.disk_gib * 1.5 * GIB / GB) + ENVIRONMENT_GB
    hours = place.max_hours or (2 * planned.hours + 1 if planned and planned.hours else UNKNOWN_HOURS)
    own = ENVIRONMENT_GB + (disk if spec.hw.accelerator == "cpu" and place.volume is None else 0)
    decided = {"volume_gb": disk, "container_disk_gb": own, "deadline_hours": round(min(hours, LONGEST_HOURS), 2)}
    update = {key: value for key, value in decided.items() if getattr(place, key) == "auto"}
    return spec.model_copy(update={"where": place.model_copy(update=update)})


def num_sequences(spec: RunSpec) -> int | None:
    """Sequences that a run computes in all; None where the data's size is not known."""
    one = {"micro_batch_size": 1, "accumulation_steps": spec.train.batch_size}
    alone = spec.hw.model_copy(update={"num_processes": 1, "num_nodes": 1})
    counted = spec.model_copy(update={"train": spec.train.model_copy(update=one), "hw": alone})
    steps = facts_of(counted).num_steps
    return steps * spec.train.batch_size if steps else None


def refuse_plan(requested: RunSpec, plan: Plan) -> NoReturn:
    """CannotRunError with the reasons of a refused plan and the nearest run that fits."""
    raise CannotRunError(*(Problem(reason, None, advice(requested, plan)) for reason in plan.reasons))


def advice(requested: RunSpec, plan: Plan) -> str:
    """The changes that make a refused plan fit, in words; `requested` is the run with its `auto`s open."""
    options = stage_search(requested)
    if plan.fits or options is None:
        if plan.hours is None:
            return "say how long it trains (train.max_steps=…), or leave the limit out"
        if plan.usd is None and requested.where.max_usd is not None:
            return "say what the hardware costs (hw.usd_per_hour=…), or leave where.max_usd out"
        return "raise the limit, or take a smaller run (fewer steps, a cheaper method, other hardware)"
    changes = nearest_changes(requested, options, hardware(), sequences=num_sequences(requested))
    if not changes:
        return "no hardware of the catalogue is large enough; try method=qlora4, or a smaller model"
    texts = [f"{change.described} ({change.option.memory.expected / GIB:.1f} GiB)" for change in changes]
    return "it fits with " + ", or ".join(texts)


def price_of(hw: HardwareSpec, where: Where | RentedPlace | None = None) -> Price:
    """US$ per GPU and hour (of the machine, on a CPU), and who says so: the cloud of `where`, else the default one."""
    place = where if isinstance(where, RentedPlace) else None
    name = place.name if place else DEFAULT
    return PRICES[name](hw, place) if name in PRICES else (None, None)


def hardware(folders: tuple[Path, ...] = (), where: RentedPlace | None = None) -> list[HardwareSpec]:
    """Every named GPU machine of the catalogue and of a user's own folders, with today's price at the cloud of `where`
    (and in the part of it that `where.cloud` names), where that tells it."""
    names = conf_files.options("hw", folders)
    place = RentedPlace(name=where.name, cloud=where.cloud) if where else None  # neither a bid nor other GPUs
    found = [HardwareSpec.model_validate(conf_files.load_choice("hw", name, folders)) for name in names]
    return [_priced(hw, place) for hw in found if hw.accelerator == "cuda"]


def _priced(hw: HardwareSpec, place: RentedPlace | None) -> HardwareSpec:
    usd, _ = price_of(hw, place)
    return hw if usd in (None, hw.usd_per_hour) else hw.model_copy(update={"usd_per_hour": usd})
