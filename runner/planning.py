"""From a request to a plan: what the arithmetic needs is looked up here, in files, caches and the price list."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from runner import catalogue, hub_config, hub_fetch, recipe
from runner.cloud import prices
from runner.data import lengths
from runner.errors import CannotRunError, Problem, RequestError, RunnerError
from runner.plan.fit import Row, combinations, fit
from runner.plan.nearest import nearest
from runner.plan.options import Options
from runner.plan.plan import Facts, Plan, plan_of
from runner.plan.shape import shape_of
from runner.request import Request
from runner.spec import DeepSpeedSpec, HardwareSpec, Method, ModelSpec, RunSpec

METHOD: TypeAdapter[Method] = TypeAdapter(Method)


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
    return [hw for hw in found if hw.accelerator == "cuda"]


def models() -> list[ModelSpec]:
    """Every model of the catalogue whose shape is known."""
    found = [catalogue.load("model", name) for name in catalogue.options("model")]
    return [ModelSpec.model_validate(values) for values in found if values.get("architecture")]


def methods() -> list[Method]:
    """All methods, as their files have them."""
    return [METHOD.validate_python({"name": name} | _plain("method", name)) for name in catalogue.options("method")]


def _plain(group: str, name: str) -> dict[str, Any]:
    fields = METHOD.validate_python({"name": name})
    return {k: v for k, v in catalogue.load(group, name).items() if k in type(fields).model_fields}


VARIED = ("model", "method", "hw")
NAMED = (*VARIED, "deepspeed")


def given_in(request: Request) -> set[str]:
    """Of model, method, hardware and ZeRO stage, those that the request names: on the command line, in its recipe or its file."""
    if request.spec_file is not None:
        return set(NAMED)
    words = [override.partition("=") for override in request.overrides]
    named = {key for key, _, _ in words if key in NAMED}
    chosen = request.recipe or next((value for key, _, value in words if key == "recipe"), None)
    if chosen:
        for entry in catalogue.read(recipe.find(chosen)).get("defaults", []):
            if isinstance(entry, dict):
                named |= {key.removeprefix("override ").lstrip("/") for key in entry} & set(NAMED)
    return named


def fit_title(spec: RunSpec, given: set[str], rows: list[dict[str, Any]]) -> str:
    """What was asked, and how many answers there are."""
    asked = [f"{group}={getattr(spec, group).name}" for group in VARIED if group in given]
    fitting = sum(row["fits"] for row in rows)
    return f"{' '.join(asked) or 'everything'}: {fitting} of {len(rows)} combinations fit"


def fits(spec: RunSpec, given: Iterable[str], by: str) -> list[Row]:
    """What goes together: of model, method and hardware those that `given` names, and all of the others."""
    given = set(given)
    options = Options(catalogue.deepspeed_templates())
    open_: dict[str, Any] = {
        "train": spec.train.model_copy(update={"micro_batch_size": "auto", "accumulation_steps": "auto"})
    }
    if "deepspeed" not in given:
        open_["deepspeed"] = DeepSpeedSpec()
    steps = facts_of(spec).num_steps
    runs = combinations(
        spec.model_copy(update=open_),
        [spec.model] if "model" in given else models(),
        [spec.method] if "method" in given else methods(),
        [spec.hw] if "hw" in given else hardware(),
    )
    return fit(runs, options, sequences=steps * spec.train.batch_size if steps else None, by=by)


def refuse(spec: RunSpec, plan: Plan) -> None:
    """CannotRunError with the reasons of a refused plan and the nearest run that fits; nothing if it is not."""
    if not plan.reasons:
        return
    raise CannotRunError(*(Problem(reason, None, advice(spec, plan)) for reason in plan.reasons))


def advice(spec: RunSpec, plan: Plan) -> str | None:
    """The changes that make a plan fit, in words."""
    options = options_for(spec)
    if plan.fits or options is None:
        return "raise the limit, or take a smaller run (fewer steps, a cheaper method, other hardware)"
    changes = nearest(spec, options, hardware())
    if not changes:
        return "no hardware of the catalogue holds it; try method=qlora4, or a smaller model"
    texts = [f"{change.words} ({change.option.memory.expected / 2**30:.1f} GiB)" for change in changes]
    return "it fits with " + ", or ".join(texts)


TABLE_MODELS = ("llama2_7b", "llama2_13b", "llama30b", "llama65b", "llama2_70b", "mixtral_8x7b")
TABLE_ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("full, fp32 weights", {"name": "full"}),
    ("full, bf16 weights", {"name": "full", "master_weights": False}),
    ("freeze, last 2 layers", {"name": "freeze"}),
    ("LoRA, rank 16", {"name": "lora"}),
    ("QLoRA, 8 bits", {"name": "qlora8"}),
    ("QLoRA, 4 bits", {"name": "qlora4"}),
)


def memory_table(spec: RunSpec, names: Iterable[str] = TABLE_MODELS) -> dict[str, Any]:
    """Method × model size: GiB on one GPU that is large enough, for one sequence at a time."""
    options = Options(catalogue.deepspeed_templates())
    found = [ModelSpec.model_validate(catalogue.load("model", name)) for name in names]
    length = min(spec.train.max_length, *(m.context_length or spec.train.max_length for m in found))
    train = spec.train.model_copy(
        update={"max_length": length, "micro_batch_size": 1, "accumulation_steps": 1, "batch_size": 1}
        | {"gradient_checkpointing": True, "precision": "bf16", "attention": "auto"}
    )
    hw = HardwareSpec.model_validate(catalogue.load("hw", "h200"))
    rows = []
    for label, method in TABLE_ROWS:
        base = spec.model_copy(update={"hw": hw, "train": train, "method": METHOD.validate_python(method)})
        cells = []
        for model in found:
            one = base.model_copy(update={"model": model})
            option = options.option(one, shape_of(model), "none", 1, 1)
            cells.append(round(option.memory.expected / 2**30, 1))
        rows.append({"method": label, "cells": cells})
    return {
        "title": "Memory of one GPU, in GiB",
        "columns": [model.name for model in found],
        "rows": rows,
        "assumptions": [
            f"one sequence of {length} tokens at a time, gradient checkpointing, bf16 arithmetic, AdamW with two moments",
            "FlashAttention; TRL's fused head; the context of CUDA and 4% of slack are counted in",
            "full: fp32 weights, gradients and moments, 16 bytes per parameter, and 2 more for the copy in bf16",
            "several GPUs: `plan` with deepspeed=zero3 shards all of it but the activations",
        ],
    }
