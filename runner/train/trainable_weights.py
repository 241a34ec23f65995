"""Trainable weights: marked, counted, described, cast for training and for the save, and fed without a detour."""

from __future__ import annotations

from collections import Counter
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer

from runner.errors import Problem, RequestError
from runner.plan.model_shape import shape_of
from runner.plan.trainable import training_of
from runner.spec import Freeze, Full, Method, Peft, RunSpec
from runner.train.adapter_config import decoder_layers, selected_layers
from runner.train.model_loading import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def mark_trainable(spec: RunSpec, model: PreTrainedModel) -> None:
    """Set `requires_grad` for methods without an adapter; trained weights become fp32 if so asked."""
    if isinstance(spec.method, Full):
        model.requires_grad_(True)
    elif isinstance(spec.method, Freeze):
        model.requires_grad_(False)
        if getattr(model, "added_token_ids", None) and not spec.method.extra_modules:
            what = "data.add_tokens makes new embeddings, and method=freeze trains none"
            raise RequestError(Problem(what, "data.add_tokens", "write method.extra_modules=[embed_tokens]"))
        head = [model.score] if spec.objective.scores else []  # new, so it has everything to learn
        for module in [*_freeze_modules(spec.method, model), *head]:
            module.requires_grad_(True)
            if spec.method.master_weights and spec.deepspeed.name == "none":
                for parameter in module.parameters():
                    parameter.data = parameter.data.float()
        # transformers 5 gives the embeddings' output a gradient wherever it checkpoints, for adapters' sake. Here that
        # would keep the input of every frozen layer and run the backward pass through them all, for nothing.
        model.enable_input_require_grads = lambda: None


def _freeze_modules(method: Freeze, model: PreTrainedModel) -> list[Any]:
    """The modules that `freeze` trains, found by exact index and exact name.

    Matching by substring would take `layers.12` for `layers.1`, a mixture's `experts.1` for a
    layer, and every layer's `norm` for the last one.
    """
    path, layers = decoder_layers(model)
    found = [layers[i] for i in selected_layers(method.layers, layers)]
    outside = {name: module for name, module in model.named_modules() if name and not f"{name}.".startswith(f"{path}.")}
    for wanted in method.extra_modules:
        matches = [m for name, m in outside.items() if name == wanted or name.rpartition(".")[2] == wanted]
        if not matches:
            leaves = sorted({n.rpartition(".")[2] for n, m in outside.items() if any(True for _ in m.parameters())})
            what = f"method.extra_modules: the model has no {wanted} outside its layers"
            raise RequestError(Problem(what, None, f"it has {', '.join(leaves)}"))
        found += matches
    return found


def describe_trainable(model: PreTrainedModel) -> tuple[int, int, list[str]]:
    """Trainable and total parameters, and one line per kind of trained module, for people.

    Packed 4-bit weights count as the parameters they stand for, and those that ZeRO-3 sharded as a whole.
    """
    trainable = total = 0
    where: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        total += count
        if parameter.requires_grad:
            trainable += count
            where[_kind(name)] += count
    return trainable, total, [f"{name}: {count:,}" for name, count in where.items()]


def wrong_formula(spec: RunSpec, model: PreTrainedModel) -> str | None:
    """A warning where `method.trainable` makes the plan count an adapter of another size; else None."""
    method = spec.method
    if not isinstance(method, Peft) or method.trainable is None or spec.model.architecture is None:
        return None
    planned = training_of(shape_of(spec.model), method, "bf16", deepspeed=False).adapter
    own = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    real = sum(getattr(p, "ds_numel", p.numel()) for p in own)
    if real == planned:
        return None
    return (
        f"method.trainable={method.trainable} is wrong: the plan counted {planned:,} parameters of the adapter, and it "
        f"has {real:,}; correct it, or plan, fit and the price stay wrong"
    )


_PREFIXES = tuple(set(PEFT_TYPE_TO_PREFIX_MAPPING.values()))


def _kind(name: str) -> str:
    """`model.layers.28.mlp.up_proj.weight` → `layers.28`; an adapter → its module's name."""
    parts = [p for p in name.split(".") if p not in ("base_model", "model", "default", "weight", "bias")]
    own = next((i for i, p in enumerate(parts) if p.startswith(_PREFIXES)), None)
    if own:
        return f"{parts[own].partition('_')[0]} {parts[own - 1]}"
    if len(parts) > 1 and parts[1].isdigit():
        return ".".join(parts[:2])
    return ".".join(p for p in parts if p not in ("modules_to_save", "original_module"))


def set_training_dtype(spec: RunSpec, model: PreTrainedModel) -> None:
    """Cast trained weights to the dtype that the run's precision needs, whatever TRL and PEFT made of them.

    TRL makes an adapter over a packed base bf16, PEFT leaves copies of whole modules (`modules_to_save`, a new head) as
    the base is. Under fp16 torch's GradScaler unscales fp32 gradients alone: it has no kernel for bf16 ones, and
    refuses fp16 ones. DeepSpeed scales by itself, and takes the width of the first weight that trains for that of all.
    """
    if spec.train.precision == "bf16":
        return
    sharded = spec.train.precision == "fp16" and spec.deepspeed.name != "none"
    dtype = torch.float16 if sharded else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and (spec.method.adapts or sharded) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def leave_casts_to_autocast(model: PreTrainedModel) -> None:
    """Let LoRA take its input as it is where autocast casts for its products anyway: the same numbers, bit by bit.

    PEFT 0.21 makes an fp32 copy for the adapter (lora/layer.py), of which autocast makes a 16-bit one again, in every
    adapted layer, forward and backward; over quantised layers it does not (`requires_conversion`, lora/bnb.py). Dropout
    would draw other numbers in 16 bits, and DoRA computes with the input itself: those keep the copy.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant and not _drops(module):
            setattr(module, "_cast_input_dtype", MethodType(_cast_unless_autocast, module))  # noqa: B010  # mypy


def _drops(layer: Any) -> bool:
    return any(isinstance(module, torch.nn.Dropout) for module in layer.lora_dropout.values())


def _cast_unless_autocast(layer: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return x
    cast: torch.Tensor = type(layer)._cast_input_dtype(layer, x, dtype)
    return cast


def saved_dtype(spec: RunSpec, name: str) -> torch.dtype:
    """Dtype of a trained weight in `model/`.

    peft makes fp32 of what an adapter adds, and leaves whole modules (`modules_to_save`, a new head) as it finds the
    base: the norm behind an embedding may know 16 bits alone.
    """
    added = spec.method.adapts and any(kind in name for kind in (_prefix(spec.method), "trainable_tokens"))
    return torch.float32 if added else DTYPES[spec.train.precision]


def _prefix(method: Method) -> str:
    """Prefix of an adapter's own weights: `lora_`, `oft_`, `vera_`."""
    own = method.peft_type if isinstance(method, Peft) else "LORA"
    prefix: str = next(prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if kind.value == own)
    return prefix.partition("_")[0] + "_"


def cast_to_saved_dtype(spec: RunSpec, model: PreTrainedModel) -> None:
    """Cast trained weights to `saved_dtype`, so that what is measured is what a user will load.

    Whole weights trained in fp32 become 16 bits; an adapter (TRL trains it in bf16 over a quantised base) becomes fp32.
    Parameters only: a buffer such as the rotary frequencies must stay fp32, as it is after loading.
    """
    for name, parameter in model.named_parameters():
        if not spec.method.adapts or parameter.requires_grad:
            parameter.data = parameter.data.to(saved_dtype(spec, name))
