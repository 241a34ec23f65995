"""PEFT's configuration of the adapter: its type, its target modules, and what PEFT cannot put on a model."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import transformers_weight_conversion

from runner.errors import Problem, RequestError
from runner.spec import Freeze, Full, Lora, Peft, QLora4, QLora8, RunSpec
from runner.spec.method import parse_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapter_config(spec: RunSpec, model: PreTrainedModel) -> PeftConfig | None:
    """PEFT's configuration of the adapter, or None for a method without one."""
    method = spec.method
    if isinstance(method, (Full, Freeze)):
        return None
    return _peft_config(method, spec, model) if isinstance(method, Peft) else _lora_config(method, spec, model)


def _peft_config(method: Peft, spec: RunSpec, model: PreTrainedModel) -> PeftConfig:
    """Configuration of a type other than LoRA; RequestError for arguments that PEFT refuses."""
    kinds: dict[str, Any] = {t.value: kind for t, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = kinds.get(method.peft_type)
    if kind is None or "target_modules" not in {field.name for field in fields(kind)}:
        known = sorted(name for name, k in kinds.items() if hasattr(k, "target_modules"))
        what = f"the installed PEFT has no adapter {method.peft_type} for linear layers"
        raise RequestError(Problem(what, "method.peft_type", f"it has {', '.join(known)}"))
    targets = method.target_modules
    if targets == "all-linear":
        targets = linear_names(model)
    check_module_names(model, targets, "method.target_modules")
    check_module_names(model, method.modules_to_save, "method.modules_to_save")
    chosen = None if method.layers is None else list(selected_layers(method.layers, decoder_layers(model)[1]))
    taken = {
        "target_modules": targets,
        "exclude_modules": excluded_modules(model, method.target_modules) or None,
        "layers_to_transform": chosen,
        "modules_to_save": method.modules_to_save or None,
        "task_type": "SEQ_CLS" if spec.objective.scores else "CAUSAL_LM",
    }
    try:
        # Every argument of a known type, so that a changed default of PEFT changes no run.
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in method.adapter.arguments.items()}
        made: PeftConfig = kind(**{key: value for key, value in taken.items() if value is not None}, **own)
    except (TypeError, ValueError) as error:
        what = f"PEFT's {kind.__name__} does not take this: {' '.join(str(error).split())}"
        keys = ", ".join(f"method.arguments.{key}" for key in method.adapter.defaults)
        raise RequestError(Problem(what, "method.arguments", f"change one of {keys}")) from None
    return made


@contextmanager
def explained_refusals(spec: RunSpec) -> Iterator[None]:
    """Errors of PEFT while it puts an adapter on the model become a RequestError: arguments that fit no layer of it."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, NotImplementedError, LookupError, ArithmeticError) as error:
        method = spec.method
        places = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        if not isinstance(method, Peft) or not any("tuners" in parts and "peft" in parts for parts in places):
            raise
        what = f"PEFT cannot put {method.peft_type} on {spec.model.name}: {' '.join(str(error).split())}"
        known = ", ".join(f"method.arguments.{key}" for key in method.adapter.defaults)
        raise RequestError(Problem(what, "method.arguments", f"change one of {known}")) from error


def _lora_config(method: Lora | QLora4 | QLora8, spec: RunSpec, model: PreTrainedModel) -> LoraConfig:
    targets: str | list[str] = method.target_modules
    chosen = None
    if method.layers is not None:
        chosen = list(selected_layers(method.layers, decoder_layers(model)[1]))
        if targets == "all-linear":  # PEFT wants names, not the shorthand, when layers are chosen
            targets = [name for name in linear_names(model) if name not in _names_of_experts(model)]
    check_module_names(model, targets, "method.target_modules")
    check_module_names(model, method.modules_to_save, "method.modules_to_save")
    init = method.init if isinstance(method, Lora) else "default"
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=targets,
        exclude_modules=excluded_modules(model, method.target_modules) or None,
        layers_to_transform=chosen,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        init_lora_weights=True if init == "default" else init,
        modules_to_save=method.modules_to_save or None,
        trainable_token_indices=_added_tokens(model),
        task_type="SEQ_CLS" if spec.objective.scores else "CAUSAL_LM",  # the former trains the head whole
    )


def _added_tokens(model: PreTrainedModel) -> dict[str, list[int]] | None:
    """Rows of the embedding (and of a head of its own) that `data.add_tokens` made: they train, whatever else does."""
    ids = getattr(model, "added_token_ids", None)
    if not ids:
        return None
    trained = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        trained.append(model.get_output_embeddings())
    return {name.rpartition(".")[2]: ids for name, module in model.named_modules() if any(module is t for t in trained)}


def decoder_layers(model: PreTrainedModel) -> tuple[str, Any]:
    """Path and ModuleList of the decoder layers: the outermost list with one entry per layer."""
    wanted = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    ]
    if not lists:
        what = f"{type(model).__name__} has no list of {wanted} decoder layers"
        raise RequestError(Problem(what, None, "use method=lora, which finds linear layers by type"))
    return min(lists, key=lambda item: item[0].count("."))


def selected_layers(choice: str | list[int | str], layers: Any) -> tuple[int, ...]:
    """Indices that `method.layers` selects; RequestError for a range that the model does not have."""
    try:
        return parse_layers(choice).select(len(layers))
    except ValueError as error:
        raise RequestError(Problem(f"method.layers={choice}: {error}")) from None


def linear_names(model: PreTrainedModel) -> list[str]:
    """Last names of all linear layers but the output head, as PEFT's `all-linear` takes them."""
    head = getattr(model, "score", None) or model.get_output_embeddings()
    kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return sorted(kinds)


def _names_of_experts(model: PreTrainedModel) -> Collection[str]:
    """Names that PEFT takes for a mixture's experts, which `layers_to_transform` does not choose among.

    In one with shared experts they are those of linear layers too, which therefore cannot be named for LoRA.
    """
    patterns: Any = transformers_weight_conversion
    pattern = patterns._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    found: Collection[str] = patterns._MOE_TARGET_MODULE_MAPPING.get(pattern, {})
    return found


def check_module_names(model: PreTrainedModel, names: str | list[str], key: str) -> None:
    """RequestError for a module that the model does not have; the error names its linear layers."""
    if isinstance(names, str):
        return
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in names:
        if name.rpartition(".")[2] not in known:
            remedy = f"linear layers: {', '.join(linear_names(model))}"
            raise RequestError(Problem(f"{key}: the model has no module {name}", None, remedy))


def excluded_modules(model: PreTrainedModel, asked: str | list[str]) -> list[str]:
    """Linear layers that cannot have an adapter, for PEFT to leave out of `all-linear`; RequestError for one asked for.

    Routers of a mixture that give more than one tensor (Phimoe, Llama 4), and what a Mamba kernel reads itself.
    """
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found = [n for n, module in kinds.items() if "Router" in type(module).__name__ or _read_by_kernel(model, n)]
    named = [] if isinstance(asked, str) else [n for n in asked if any(f".{f}".endswith(f".{n}") for f in found)]
    if named:
        name = f"{named[0]} of {model.config.model_type}"
        what = f"{name} cannot have an adapter: the model computes with its weight itself"
        raise RequestError(Problem(what, "method.target_modules", f"leave {named[0]} out"))
    return found


def _read_by_kernel(model: PreTrainedModel, name: str) -> bool:
    """True for a part of a Mamba layer that PEFT refuses, because a kernel reads its weight."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


EXPERT_COUNT_KEYS = ("num_local_experts", "n_routed_experts")
"""What a configuration may call its experts, where TRL's trainer of SFT knows `num_experts` alone."""
MOE_REFUSALS = {
    "does not work with lora_dropout": "method.dropout=0",
    "does not work with use_dora": "method.use_dora=false",
    "does not work with LoRA variants": "method.use_dora=false",
    "Experts' object has no attribute 'weight'": "method.init=default",
    "Router' object has no attribute 'weight'": "method.init=default",
}
"""Of PEFT's messages about an adapter of a parameter that is no layer's weight → what to write."""


def has_experts(model: PreTrainedModel) -> bool:
    """True for a mixture with experts. Granite 4 and Doge have dense models under a mixture's configuration."""
    facts = model.config.get_text_config()
    return bool(getattr(facts, "num_experts", 0)) and bool(getattr(facts, "is_moe", True))


@contextmanager
def moe_compatible(model: PreTrainedModel) -> Iterator[None]:
    """Context in which PEFT and TRL can wrap a mixture of experts. RequestError for what PEFT cannot do to experts.

    TRL looks for `num_experts`, which the configurations of Granite's, Phi's and Llama's mixtures have under another
    name, and for the layers below the head by a name that Llama 4 gives to something else. It switches
    `output_router_logits` on for good, though it asks for them at every step: the model could neither answer prompts of
    different lengths nor be saved as it was published.
    """
    facts = model.config.get_text_config()
    name = next((one for one in EXPERT_COUNT_KEYS if hasattr(facts, one)), None)
    if name and not hasattr(facts, "num_experts"):
        type(facts).attribute_map = {**type(facts).attribute_map, "num_experts": name}
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    before = getattr(facts, "output_router_logits", None)
    try:
        yield
    except (ValueError, AttributeError) as error:
        write = next((write for words, write in MOE_REFUSALS.items() if words in str(error)), None)
        if write is None:
            raise
        key = write.partition("=")[0]
        what = f"{key} is not possible for a mixture's experts, which transformers keeps in one parameter"
        remedy = f"write {write}, or leave them out: method.target_modules=[q_proj,k_proj,v_proj,o_proj]"
        raise RequestError(Problem(what, key, remedy)) from error
    if before is not None:
        facts.output_router_logits = before
