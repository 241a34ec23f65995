"""Facts of a model that the catalogue does not know, from its config.json: on this machine, or on the Hub."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from runner.errors import Problem, RequestError
from runner.hub import config_json, model_config
from runner.plan.model_shape import Shape, shape_of
from runner.plan.trainable import ALIASES, OUTSIDE, modules_around, modules_of
from runner.resolve import simulator
from runner.spec import ModelSpec, Peft, RunSpec
from runner.spec.adapters import Layer


def wrong_module(spec: RunSpec) -> Problem | None:
    """A module that the method names and a model whose layers are known has not; None where all is well.

    The worker would find it out after loading.
    """
    if spec.model.architecture is None:
        return None
    shape = shape_of(spec.model)
    score = {"score"} if spec.objective.scores else set()
    extra, saved = getattr(spec.method, "extra_modules", []), getattr(spec.method, "modules_to_save", [])
    return (
        _wrong_targets(spec, shape)
        or _unknown("extra_modules", extra, {*modules_around(shape), *score}, spec, " outside its layers")
        or _unknown("modules_to_save", saved, modules_of(shape) | score, spec)
        or _wrong_feedforward(spec, shape)
        or _untrained_layer(spec, shape)
    )


def _wrong_targets(spec: RunSpec, shape: Shape) -> Problem | None:
    targets = getattr(spec.method, "target_modules", "all-linear")
    if targets == "all-linear":
        return None
    key = "method.target_modules"
    linear = {m.name for m in shape.matrices if m.linear}
    known = {*(m.name for m in shape.matrices), *OUTSIDE, *ALIASES}
    unknown = [name for name in targets if _last(name) not in known]
    unfit = [name for name in targets if _last(name) in known - linear - {*OUTSIDE, *ALIASES}]
    if targets and not unknown and not unfit:
        return None
    what = f"{key}=[{','.join(targets)}]: none of them is in {spec.model.name}, and nothing would train"
    if unfit:
        what = f"{key}: {', '.join(unfit)} of {spec.model.name} is no linear layer, but part of a mixture"
    elif len(unknown) < len(targets):
        what = f"{key}: {spec.model.name} has no module {', '.join(unknown)}"
    remedy = f"choose among its linear layers: {', '.join(sorted(linear))}"
    if "feedforward_modules" in getattr(spec.method, "arguments", {}):
        more = f"and write method.arguments.feedforward_modules=[{_mlp_output(shape)}], too"
        left = [name for name in targets if name not in (*unknown, *unfit)]
        return Problem(what, key, f"write {key}=[{','.join(left)}], {more}" if unfit and left else f"{remedy}; {more}")
    return Problem(what, key, f"{remedy}; or write all-linear")


def _wrong_feedforward(spec: RunSpec, shape: Shape) -> Problem | None:
    """(IA)³ would scale the outputs of a layer whose name it does not find, and say nothing."""
    key, linear = "method.arguments.feedforward_modules", {m.name for m in shape.matrices if m.linear}
    named = getattr(spec.method, "arguments", {}).get("feedforward_modules", [])
    unknown = [name for name in named if _last(name) not in linear]
    what = f"{key}: {spec.model.name} has no linear layer {', '.join(unknown)}"
    return Problem(what, key, f"write {key}=[{_mlp_output(shape)}]") if unknown else None


def _untrained_layer(spec: RunSpec, shape: Shape) -> Problem | None:
    """Arguments, or a formula, with which a layer of this model gets no parameter."""
    method = spec.method
    if not isinstance(method, Peft):
        return None
    wanted = None if method.target_modules == "all-linear" else {_last(name) for name in method.target_modules}
    key = "method.arguments" if method.trainable is None else "method.trainable"
    given = " or ".join(f"{key}.{name}={value}" for name, value in method.arguments.items())
    remedy = f"write another formula than {method.trainable}" if method.trainable else f"change {given}"
    layers = [
        Layer(m.name, m.inputs, m.outputs) for m in shape.matrices if m.linear and (not wanted or m.name in wanted)
    ]
    if uneven := method.adapter.uneven(layers):
        what, _, instead = uneven.partition("; ")
        return Problem(f"{what} of {spec.model.name}", "method.arguments", instead)
    for m in shape.matrices:
        if m.linear and (wanted is None or m.name in wanted):
            try:
                count = method.adapter.count(Layer(m.name, m.inputs, m.outputs))
            except ValueError as error:
                return Problem(f"{key}: {error} for {m.name} of {spec.model.name}", key, remedy)
            if count < 1:
                return Problem(f"{key}: {m.name} of {spec.model.name} would have {count} parameters", key, remedy)
    return None


def _unknown(leaf: str, names: list[str], known: set[str], spec: RunSpec, where: str = "") -> Problem | None:
    unknown = [name for name in names if _last(name) not in known]
    what = f"method.{leaf}: {spec.model.name} has no module {', '.join(unknown)} with weights{where}"
    return Problem(what, f"method.{leaf}", f"it has {', '.join(sorted(known))}") if unknown else None


def _mlp_output(shape: Shape) -> str:
    """The last layer of the MLP, by name; empty for a mixture, whose experts are no linear layers."""
    last = shape.matrices[-1]
    return last.name if last.linear else ""


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def with_facts(spec: RunSpec, *, needed: bool = False) -> RunSpec:
    """A model that is not in the catalogue gets its facts from its config.json: here, or (if `needed`) on the Hub.

    Where they are not needed, a config that the plan does not understand is left to the trainer; where they are, it is
    simulated.
    """
    model = spec.model
    if model.architecture is not None:
        _check_facts(model)
        return spec
    try:
        facts = _facts(model, needed, scores=spec.objective.scores)
    except model_config.NotCausalError:
        raise
    except model_config.UnknownShapeError as unknown:
        if needed and (config := _config(model, needed)):
            simulator.add(model, *config, unknown)
        return spec
    except RequestError:
        if needed:
            raise
        return spec
    if facts is None:
        return spec
    given = spec.model.model_dump(exclude_unset=True, exclude_none=True)
    found = ModelSpec.model_validate(facts | given)
    _check_facts(found)
    return spec.model_copy(update={"model": found})


def _facts(model: ModelSpec, needed: bool, *, scores: bool = False) -> dict[str, object] | None:
    """Facts in the config; NotCausalError for an encoder, but where the model only gives `scores`."""
    config = _config(model, needed)
    if config is not None and not scores:
        model_config.check_causal(*config)
    return None if config is None else model_config.facts_from_config(*config)


def _config(model: ModelSpec, needed: bool) -> tuple[dict[str, object], str] | None:
    """The config.json, here or on the Hub, and where it is."""
    if (found := config_json.local_config(model.id, model.revision)) is not None:
        return found
    config = (config_json.fetch if needed else config_json.fetched_before)(_hub_id(model), model.revision)
    return None if config is None else (config, f"{model.id}/config.json")


def _check_facts(model: ModelSpec) -> None:
    """RequestError where a model that is at hand has another architecture than the plan would count with."""
    if model.from_scratch or model.package is not None or model.gguf_file is not None:
        return
    try:
        facts = model_config.local_facts(model.id, model.revision)
    except RequestError:
        return  # a kind that the arithmetic does not know: what was given is all there is
    wrong = [key for key in _SIZES if facts and key in facts and getattr(model, key) not in (None, facts[key])]
    if facts and wrong:
        told = ", ".join(f"{key} {facts[key]} and not {getattr(model, key)}" for key in wrong)
        remedy = "leave the facts out: model=hub reads them from there"
        raise RequestError(Problem(f"model.id={model.id}: its config.json has {told}", None, remedy))


_SIZES = (
    "architecture", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size",
    "num_experts", "dense_layers", "dense_intermediate_size", "shared_intermediate_size",
)  # fmt: skip


def _hub_id(model: ModelSpec) -> str:
    """The id, if it is one; RequestError for what can only be a folder, which is not there."""
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", model.id) is None:
        missing = f"there is no folder {model.id} with a config.json"
        remedy = config_json.instead_of(Path(model.id)) or "name one, or a Hub id: org/name"
        raise RequestError(Problem(missing, f"model.id={model.id}", remedy))
    return model.id


def fetch_config(spec: RunSpec) -> None:
    """The config.json of a Hub model outside the catalogue is put into the cache, so that a run of it can be planned.

    RequestError for a model that is not there, or closed; nothing where the Hub cannot be reached.
    """
    model = spec.model
    if model.architecture is not None or model.gguf_file is not None or model.package is not None:
        return
    with suppress(config_json.UnreachableError):
        try:
            known = model_config.local_facts(model.id, model.revision)
        except RequestError:  # a kind that the arithmetic does not know: the trainer may
            return
        if known is None:
            config_json.fetch(_hub_id(model), model.revision)


def why_no_plan(spec: RunSpec) -> str:
    """Return why a run cannot be planned, in one line."""
    try:
        if spec.model.architecture is None:
            _facts(spec.model, needed=True)
        shape_of(spec.model)
    except model_config.UnknownShapeError as error:
        return f"{error} (python -m runner plan simulates it)"
    except RequestError as error:
        return str(error)
    return "the model's size is not known"


def at_hand(model: ModelSpec) -> bool:
    """Return True if the model is on this machine, or needs no download."""
    return model.package is not None or model.from_scratch or Path(model.id).is_dir() or config_json.is_cached(model.id)
