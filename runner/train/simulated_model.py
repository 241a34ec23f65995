"""The model of a simulation, built from its config.json on the meta device as the worker has it before a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import get_peft_model
from pydantic import TypeAdapter
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import add_fused_lm_head

from runner.spec import Full, Method, RunSpec
from runner.train import adapter_config, trainable_weights
from runner.train.model_loading import DTYPES

METHOD: TypeAdapter[Method] = TypeAdapter(Method)
Asked = Mapping[str, Any]
"""A request of the plan."""


def not_causal(config_json: str) -> str | None:
    """Of a model that predicts no next tokens, by the classes of transformers, what it is."""
    config = _config(config_json)
    if config.is_encoder_decoder:
        return "an encoder-decoder model"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        return "an encoder, in which a token sees those that follow (its config has no is_decoder=true)"
    return None if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else "no causal LM in transformers"


def _config(config_json: str) -> Any:
    values = json.loads(config_json)
    values.pop("quantization_config", None)  # the worker trains what it unpacks
    values.pop("transformers_version", None)
    if values["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers_version} does not know that type")
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def run_like(asked: Asked) -> RunSpec:
    """What building a model reads of a run."""
    return cast(
        RunSpec,
        SimpleNamespace(
            method=METHOD.validate_python(asked["method"]),
            train=SimpleNamespace(precision=asked["precision"]),
            deepspeed=SimpleNamespace(name="zero2" if asked["deepspeed"] else "none"),
            objective=SimpleNamespace(scores=False),
            model=SimpleNamespace(name=asked["name"]),
        ),
    )


@lru_cache(maxsize=2)
def bare(config_json: str, dtype: torch.dtype, device: str = "meta") -> Any:
    """The model as transformers loads it, without its weights."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(_config(config_json), dtype=dtype)


@lru_cache(maxsize=1)
def built(config_json: str, asked_json: str, checkpoints: bool, device: str = "meta") -> Any:
    """The model as the worker has it before the first step: adapter, head, widths."""
    asked = json.loads(asked_json)
    spec = run_like(asked)
    dtype = DTYPES[spec.train.precision]
    wide = isinstance(spec.method, Full) and spec.method.master_weights and not asked["deepspeed"]
    bare.cache_clear()
    model = bare(config_json, torch.float32 if wide else dtype, device)
    bare.cache_clear()
    trainable_weights.mark_trainable(spec, model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer
    with torch.device(device), adapter_config.moe_compatible(model):
        adapter = adapter_config.adapter_config(spec, model)
        if adapter is not None:
            model = get_peft_model(model, adapter)
    trainable_weights.set_training_dtype(spec, model)
    trainable_weights.leave_casts_to_autocast(model)
    if asked["deepspeed"]:
        model.to(dtype)
    if checkpoints:
        model.gradient_checkpointing_enable()
        if adapter is not None:
            model.enable_input_require_grads()
    model.train()
    return model


def describe(asked: Asked) -> dict[str, Any]:
    """The sizes of a model: its layers by kind, with their matrices, and what is around them."""
    model = bare(asked["config"], torch.bfloat16)
    _, layers = adapter_config.decoder_layers(model)
    facts = model.config.get_text_config()
    kinds: dict[str, int] = {}
    made, order = [], []
    types = getattr(facts, "layer_types", None) or [None] * len(layers)
    for layer, kind in zip(layers, types, strict=True):
        sizes = _sizes(layer)
        key = json.dumps([sizes, type(layer).__name__, kind])
        if key not in kinds:
            kinds[key] = len(kinds)
            made.append(sizes)
        order.append(kinds[key])
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    heads = getattr(facts, "num_attention_heads", None) or 1
    narrow = getattr(facts, "head_dim", None) or facts.hidden_size // heads
    return {
        "layers": order,
        "kinds": made,
        "embedding": table.numel(),
        "vocab": table.shape[0],
        "hidden": facts.hidden_size,
        "head": 0 if head.weight is table else sum(p.numel() for p in head.parameters()),
        "tied": head.weight is table,
        "total": sum(p.numel() for p in model.parameters()),
        "heads": heads,
        "kv_heads": getattr(facts, "num_key_value_heads", None) or heads,
        "head_dim": max(narrow, getattr(facts, "qk_head_dim", None) or 0),
        "context": getattr(facts, "max_position_embeddings", None) or 0,
        "inner": getattr(facts, "intermediate_size", None) or facts.hidden_size,
    }


def _sizes(layer: Any) -> dict[str, Any]:
    """Matrices of a layer [name, inputs, outputs, has a bias, how many, is linear], and values of all else."""
    matrices, rest = [], 0
    biased = {id(m.bias) for m in layer.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m.bias is not None}
    for path, parameter in layer.named_parameters():
        owner, _, leaf = path.rpartition(".")
        module = layer.get_submodule(owner)
        if id(parameter) in biased:
            continue
        if isinstance(module, torch.nn.Linear) and leaf == "weight":
            outputs, inputs = parameter.shape
            matrices.append([owner.rpartition(".")[2], inputs, outputs, module.bias is not None, 1, True])
        elif isinstance(module, Conv1D) and leaf == "weight":
            inputs, outputs = parameter.shape
            matrices.append([owner.rpartition(".")[2], inputs, outputs, module.bias is not None, 1, True])
        elif parameter.ndim in (2, 3) and not leaf.endswith("bias") and "conv" not in path:
            outputs, inputs = parameter.shape[-2:]
            matrices.append([leaf, inputs, outputs, False, parameter.numel() // (inputs * outputs), False])
        else:
            rest += parameter.numel()
    return {"matrices": matrices, "other": rest}


def count(asked: Asked) -> dict[str, Any]:
    """Values that train, and bytes of what trains and what does not."""
    model = built(asked["config"], method_part(asked), False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = [p for n, p in trained if run_like(asked).method.adapts and "modules_to_save" not in n]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return {
        "adapter": sum(p.numel() for p in own),
        "base_trained": sum(p.numel() for _, p in trained) - sum(p.numel() for p in own),
        "adapter_width": own[0].element_size() if own else 0,
        "frozen_bytes": sum(p.numel() * p.element_size() for p in frozen),
    }


def method_part(asked: Asked) -> str:
    """Of a request what decides the model, but for its config."""
    names = ("method", "precision", "deepspeed", "name")
    return json.dumps({name: asked.get(name) for name in names}, sort_keys=True)
