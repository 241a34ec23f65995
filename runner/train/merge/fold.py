"""Add an adapter to its base in fp32: packed weights unpacked, rounded once without bias."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from runner.train import quantised_experts
from runner.train.merge.proof import dequantised, quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0  # the same merge gives the same weights


def fold(model: PeftModel, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The merged model, plain and on the CPU, and the names of the weights that were rounded to `dtype`.

    PEFT alone would merge into the packed weight and pack the sum again, with a second quantisation error as large as
    the first; or, in 16 bits, round the update and then the sum, to nearest. So every layer gets a plain base in fp32
    first, and only one layer at a time is that large. ValueError for a weight that is not finite.
    """
    rounded = set()
    generator = torch.Generator().manual_seed(SEED)
    for name, layer in list(model.get_base_model().named_modules()):
        if isinstance(
            layer, lora.ParamWrapper
        ):  # a parameter that is no layer's weight: all experts of a mixture in one
            experts, own = layer.get_base_layer(), layer.parameter_name
            _unpack_experts(experts, own)
            setattr(experts, own, _widened(getattr(experts, own)))
            layer.merge(safe_merge=True)
            _round_parameters(experts, dtype, generator)
            rounded.add(f"{name.replace('.base_layer', '')}.{own}")  # one wrapper in another where several are adapted
        elif isinstance(layer, lora.LoraLayer):
            packed = quantised(layer.get_base_layer())
            layer.base_layer = _unpacked_layer(layer.get_base_layer(), torch.float32)
            # On the classes for packed layers PEFT's own `merge` packs again; the update itself is the same.
            kind: Any = lora.Linear if packed else type(layer)
            kind.merge(layer, safe_merge=True)
            _round_parameters(layer.base_layer, dtype, generator)
            rounded.add(f"{name}.weight")
        elif isinstance(layer, TrainableTokensLayer):  # PEFT copies its fp32 rows into a weight of their own width only
            weight = layer.get_base_layer().weight
            weight.data = weight.data.float()  # in place: the output may share it
        elif isinstance(layer, BaseTunerLayer) and hasattr(layer.get_base_layer(), "weight"):
            base: Any = layer.get_base_layer()
            for own, parameter in list(base.named_parameters(recurse=False)):  # (IA)³ scales a bias, too
                setattr(base, own, _widened(parameter))
            layer.merge(safe_merge=True)
            _round_parameters(base, dtype, generator)
            rounded |= {f"{name}.{own}" for own, _ in base.named_parameters(recurse=False)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = model.merge_and_unload()  # nothing is left to merge: takes the wrappers away, keeps saved modules
    for name, module in list(merged.named_modules()):
        if quantised(module):
            plain = _unpacked_layer(module, torch.float32)
            rounded |= {
                f"{name}.{own}" for own, parameter in plain.named_parameters() if _loses_precision(parameter, dtype)
            }
            _round_parameters(plain, dtype, generator)
            merged.set_submodule(name, plain)
        for own in quantised_experts.parameters(module):
            _unpack_experts(module, own)
            rounded |= {f"{name}.{own}"} if _loses_precision(getattr(module, own), dtype) else set()
            _round_parameters(module, dtype, generator)
    rounded |= {name for name, parameter in merged.named_parameters() if _loses_precision(parameter, dtype)}
    _round_parameters(merged, dtype, generator)
    _remove_quantization_config(merged)
    return merged.cpu(), rounded


def _unpacked_layer(module: Any, dtype: torch.dtype) -> Any:
    """The same layer with an unpacked weight of its own in `dtype`; a weight shared with another layer no longer is."""
    if quantised(module):
        bias = module.bias is not None
        plain: Any = nn.Linear(module.in_features, module.out_features, bias=bias, device="meta")
        plain.weight = nn.Parameter(dequantised(module).to(dtype), requires_grad=False)
        plain.bias = module.bias
        return plain
    module.weight = _widened(module.weight, dtype)
    return module


def _unpack_experts(experts: Any, own: str) -> None:
    """Give a mixture's experts a plain parameter in place of a quantised one."""
    packed = quantised_experts.parameters(experts).get(own)
    if packed is not None:
        setattr(experts, own, nn.Parameter(quantised_experts.unpacked(packed), requires_grad=False))


def _widened(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A copy in `dtype`."""
    return nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)


def _loses_precision(parameter: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if rounding to `dtype` changes the weight."""
    return parameter.is_floating_point() and not torch.equal(parameter, parameter.to(dtype).to(parameter.dtype))


def _round_parameters(module: Any, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Round parameters to `dtype`, on the CPU; buffers such as the rotary frequencies keep their precision.

    A quantised parameter beside them (the other one of a mixture's experts) holds bits, not numbers.
    """
    for parameter in module.parameters():
        plain = parameter.is_floating_point() and not hasattr(parameter, "quant_state")
        if plain and (parameter.dtype != dtype or parameter.device.type != "cpu"):
            parameter.data = round_stochastically(parameter.data.cpu().float(), dtype, generator)


def _remove_quantization_config(model: PreTrainedModel) -> None:
    """Remove the quantisation config of a model that is no longer quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def round_stochastically(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to a neighbour in `dtype`, so that the expectation is the weight itself; exact values stay.

    The weights of a base lie on the 16-bit grid already. Rounded to nearest, an update of less than half a step is
    lost, all of it and in every weight alike: the adapter comes out smaller than it was trained. Rounded up or down at
    random, with the nearer neighbour as much the likelier, it is kept on average, and what is left is noise that
    cancels out. SmolLM2-135M after 3 steps of LoRA, bf16, 281 positions: to nearest the logits are typically 0.49 away
    from base + adapter (whose own effect is 3.8), at random 0.12.
    """
    near = weight.to(dtype)
    rest = weight - near.float()
    towards = torch.where(rest < 0, -torch.inf, torch.inf).to(dtype)
    other = torch.nextafter(near, towards)
    chance = rest / (other.float() - near.float())  # at most 1/2, and 0 where nothing is left to round
    return torch.where(torch.rand(weight.shape, generator=generator) < chance, other, near)
