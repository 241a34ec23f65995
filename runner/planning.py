"""From a request to a plan: what the arithmetic needs is looked up here, in files, caches and the price list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from runner import catalogue, hub_config, hub_fetch
from runner.cloud import prices
from runner.data import lengths
from runner.errors import CannotRunError, Problem, RequestError, RunnerError
from runner.plan.memory import GIB
from runner.plan.nearest import cheapest, nearest
from runner.plan.options import Options
from runner.plan.plan import Facts, Plan, plan_of
from runner.plan.settle import settled
from runner.plan.shape import shape_of
from runner.spec import HardwareSpec, LaterPlace, LocalPlace, ModelSpec, RunSpec


def with_facts(spec: RunSpec, *, needed: bool = False) -> RunSpec:
    """A model that is not in the catalogue gets its facts from its config.json: here, or (if `needed`) on the Hub.

    Where they are not needed, a config that the plan does not understand is left to the trainer.
    """
    if spec.model.architecture is not None:
        return spec
    model = spec.model
    try:
        facts = hub_config.local_facts(model.id, model.revision)
        if facts is None and needed:
            if not _looks_like_a_hub_id(model.id):
                missing = f"there is no folder {model.id} with a config.json"
                raise RequestError(Problem(missing, f"model.id={model.id}", "name one, or a Hub id: org/name"))
            facts = hub_config.facts_from_config(hub_fetch.config(model.id, model.revision), f"{model.id}/config.json")
    except RequestError:
        if needed:
            raise
        return spec
    if facts is None:
        return spec
    given = spec.model.model_dump(exclude_unset=True, exclude_none=True)
    return spec.model_copy(update={"model": ModelSpec.model_validate(facts | given)})


def _looks_like_a_hub_id(text: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", text) is not None


def options_for(spec: RunSpec) -> Options | None:
    """What `resolve` chooses from; None for a model whose shape is not known."""
    try:
        shape_of(spec.model)
    except RequestError:
        return None
    own = (spec.deepspeed.name, spec.deepspeed.config) if spec.deepspeed.config else None
    return Options(catalogue.deepspeed_templates(own))


def plan(spec: RunSpec, notes: list[str]) -> Plan:
    """The plan of a resolved run; RequestError where the model's shape is not known."""
    options = options_for(spec)
    if options is None:
        shape_of(spec.model)  # says what is missing
        raise AssertionError("unreachable")
    return plan_of(spec, options, facts_of(spec), notes)


def facts_of(spec: RunSpec) -> Facts:
    """Data, price and whether the weights are here."""
    notes: list[str] = []
    try:
        found = lengths.lengths(spec.data, spec.model, seed=spec.train.seed)
    except RunnerError as error:
        found = lengths.DataLengths(None, None, False, str(error))
    steps, tokens, said = lengths.steps(spec, found)
    notes += said
    usd, source = price_of(spec.hw)
    if usd is not None and spec.where.name == "local" and spec.hw.accelerator == "cuda":
        notes.append("the cost is what renting this hardware would be")
    total = None
    if found.num_examples and found.tokens_per_example:
        total = round(found.num_examples * found.tokens_per_example)
    return Facts(steps, tokens, total, usd, source, not _at_hand(spec.model), tuple(notes))


def price_of(hw: HardwareSpec) -> tuple[float | None, str | None]:
    """US$ per GPU and hour, and who says so: RunPod's catalogue of today, else the dated figure in conf/hw."""
    if hw.accelerator != "cuda":
        return None, None
    live = prices.price(hw.runpod_gpu_id)
    if live is not None:
        return live.usd_per_hour, live.source
    if hw.usd_per_hour is None:
        return None, None
    return hw.usd_per_hour, f"conf/hw, seen {hw.price_date}" if hw.price_date else "conf/hw"


def _at_hand(model: ModelSpec) -> bool:
    return model.package is not None or Path(model.id).is_dir() or hub_config.cached(model.id)


def hardware() -> list[HardwareSpec]:
    """Every named GPU machine of the catalogue."""
    found = [HardwareSpec.model_validate(catalogue.load("hw", name)) for name in catalogue.options("hw")]
    return [_priced(hw) for hw in found if hw.accelerator == "cuda"]


def _priced(hw: HardwareSpec) -> HardwareSpec:
    """With today's price where the live catalogue tells it."""
    usd, _ = price_of(hw)
    return hw if usd == hw.usd_per_hour else hw.model_copy(update={"usd_per_hour": usd})


def place(spec: RunSpec, here: HardwareSpec | None) -> tuple[RunSpec, list[str]]:
    """`where=auto` decided: this machine if the run fits it (`here`: its hardware, None if another was named), else
    the hardware of the catalogue that does it for the least money, rented.
    """
    options = options_for(spec)
    usd, hours = spec.where.max_usd, spec.where.max_hours
    local, rented = LocalPlace(max_usd=usd, max_hours=hours), LaterPlace(name="runpod", max_usd=usd, max_hours=hours)
    if options is None:
        return spec.model_copy(update={"where": local}), ["where=auto: here, since nothing can be planned"]
    best = options.best(settled(spec))
    if here is None:  # the user has chosen the hardware
        fit = "" if best.fits else ", and it does not fit there either"
        return spec.model_copy(update={"where": rented}), [
            f"where=auto: this machine is not {spec.hw.name}{fit}; rented"
        ]
    if best.fits:
        return spec.model_copy(update={"where": local, "hw": here}), ["where=auto: here, where it fits"]
    why = f"it needs {best.memory.expected / GIB:.1f} GiB and this machine has {(best.capacity or 0) / GIB:.1f}"
    larger = cheapest(spec, options, hardware(), sequences(spec))
    if larger is None:
        note = f"where=auto: {why}, and no hardware of the catalogue holds it"
        return spec.model_copy(update={"where": rented}), [note]
    hw = larger.spec.hw
    note = f"where=auto: {why}; rented, {hw.name} costs least (${hw.usd_per_hour} per GPU-hour)"
    return larger.spec.model_copy(update={"where": rented}), [note]


def sequences(spec: RunSpec) -> int | None:
    """Sequences that a run computes in all; None where the data's size is not known."""
    one = {"micro_batch_size": 1, "accumulation_steps": spec.train.batch_size}
    alone = spec.hw.model_copy(update={"num_processes": 1, "num_nodes": 1})
    counted = spec.model_copy(update={"train": spec.train.model_copy(update=one), "hw": alone})
    steps = facts_of(counted).num_steps
    return steps * spec.train.batch_size if steps else None


def refuse(asked: RunSpec, plan: Plan) -> NoReturn:
    """CannotRunError with the reasons of a refused plan and the nearest run that fits."""
    raise CannotRunError(*(Problem(reason, None, advice(asked, plan)) for reason in plan.reasons))


def advice(asked: RunSpec, plan: Plan) -> str:
    """The changes that make a refused plan fit, in words; `asked` is the run with its `auto`s open."""
    options = options_for(asked)
    if plan.fits or options is None:
        if plan.hours is None:
            return "say how long it trains (train.max_steps=…), or leave the limit out"
        if plan.usd is None and asked.where.max_usd is not None:
            return "say what the hardware costs (hw.usd_per_hour=…), or leave where.max_usd out"
        return "raise the limit, or take a smaller run (fewer steps, a cheaper method, other hardware)"
    changes = nearest(asked, options, hardware(), sequences=sequences(asked))
    if not changes:
        return "no hardware of the catalogue holds it; try method=qlora4, or a smaller model"
    texts = [f"{change.described} ({change.option.memory.expected / GIB:.1f} GiB)" for change in changes]
    return "it fits with " + ", or ".join(texts)
