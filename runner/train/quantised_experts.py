"""Experts of a mixture in 4 or 8 bits, which bitsandbytes' linear layers do not reach: a layer's experts are one
parameter [E, out, in].

It is quantised as it is loaded, one parameter at a time, and unpacked for the time of a product, forward and backward:
nothing unpacked is kept, with or without checkpointing (bitsandbytes' `replace_parameter_4bit` unpacks through
`torch.nn.utils.parametrize`, and autograd keeps the result). An adapter multiplies beside it, and is saved
as PEFT saves its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Params4bit
from peft.tuners.lora import ParamWrapper
from torch.nn.functional import pad
from transformers.core_model_loading import ConversionOps
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from runner.plan.model_shape import MOST_VALUES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "quantised"
NAMES = ("gate_up_proj", "up_proj", "down_proj")
INT8 = 127
ALIGNED = 8  # ranks: grouped_mm wants rows of a multiple of 16 bytes


@contextmanager
def quantising() -> Iterator[None]:
    """Context in which `from_pretrained` with bitsandbytes' configuration quantises experts as well."""
    with patch.dict(AUTO_QUANTIZER_MAPPING, {"bitsandbytes_4bit": _In4Bits, "bitsandbytes_8bit": _In8Bits}):
        yield


def enable_quantised_experts(model: PreTrainedModel) -> None:
    """Make quantised experts compute through `forward` below, and accept PEFT's adapters."""
    found = [module for module in model.modules() if parameters(module)]
    if not found:
        return
    for module in found:
        module.updates, module.exact = {}, False
    model.set_experts_implementation(IMPLEMENTATION)
    _WRAPPER.get_param, _WRAPPER._activate_lora = _placeholder, _activate_factors


def parameters(module: Any) -> dict[str, torch.nn.Parameter]:
    """The quantised parameters of a mixture's experts; empty for any other module."""
    own = getattr(module, "_parameters", {})
    return {name: own[name] for name in NAMES if own.get(name) is not None and _quantised(own[name])}


def unpacked(parameter: Any) -> torch.Tensor:
    """Dequantised values of a parameter, in the compute dtype: [E, out, in], or [E, in, out] (gpt-oss)."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        whole: torch.Tensor = dequantize_4bit(parameter.data, state)
        return whole
    whole = torch.empty(parameter.shape, dtype=parameter.unpacked_dtype, device=parameter.device)
    return torch.mul(parameter.data, parameter.scales, out=whole)


def _quantised(parameter: Any) -> bool:
    return getattr(parameter, "quant_state", None) is not None or hasattr(parameter, "scales")


# --- loading -------------------------------------------------------------------------------------------------------


class _Quantiser:
    """Mixed in before transformers' quantiser, which knows linear layers alone."""

    quantization_config: Any

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Also for experts that compute through transformers' interface: others have a forward pass of their own."""
        path, _, name = param_name.rpartition(".")
        experts, linear = model.get_submodule(path), super().param_needs_quantization(model, param_name)  # type: ignore[misc]  # no types
        return bool(linear) or (name in NAMES and _can_quantise(experts, getattr(experts, name)))

    def get_quantize_ops(self) -> Any:
        """The operation for either."""
        return _Quantise(super().get_quantize_ops(), self.quantization_config)  # type: ignore[misc]  # no types


class _In4Bits(_Quantiser, Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers has no types
    pass


class _In8Bits(_Quantiser, Bnb8BitHfQuantizer):  # type: ignore[misc]  # no types
    pass


def _can_quantise(experts: Any, parameter: torch.Tensor) -> bool:
    plain = hasattr(experts, "has_gate") and not experts.has_post_expert_norm
    return plain and (_quantised(parameter) or (parameter.dim() == 3 and parameter.numel() <= MOST_VALUES))


class _Quantise(ConversionOps):  # type: ignore[misc]  # no types
    """16 bits as they were read and fused → a quantised parameter."""

    def __init__(self, linear: ConversionOps, config: Any) -> None:
        self.linear, self.config = linear, config

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Names and tensors → names and parameters; linear layers as transformers does them."""
        ((name, value),) = input_dict.items()
        experts = model.get_submodule(name.rpartition(".")[0])
        if not hasattr(experts, "has_gate"):
            found: dict[str, Any] = self.linear.convert(input_dict, model=model, **kwargs)
            return found
        whole = value[0] if isinstance(value, list) else value
        return {name: _in_8_bits(whole) if self.config.load_in_8bit else _in_4_bits(whole, self.config)}


def _in_4_bits(whole: torch.Tensor, config: Any) -> torch.nn.Parameter:
    """Quantise to 4 bits as `Linear4bit` does: blocks of 64 values with a scale."""
    made: Any = Params4bit(
        whole, requires_grad=False, compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type, quant_storage=config.bnb_4bit_quant_storage,
    )  # fmt: skip
    return made.to(whole.device)  # type: ignore[no-any-return]  # bitsandbytes and torch add to it


def _in_8_bits(whole: torch.Tensor) -> torch.nn.Parameter:
    """Quantise to 8 bits as `Linear8bitLt` does: a scale for each row, its largest value over 127.

    Activations are not quantised here.
    """
    largest = torch.linalg.vector_norm(whole, float("inf"), dim=-1, keepdim=True)
    scales = largest.float().clamp_(min=1e-12).div_(INT8)
    codes = torch.empty(whole.shape, dtype=torch.int8, device=whole.device)
    for own, matrix, scale in zip(codes, whole, scales, strict=True):  # one expert at a time is that wide
        own.copy_((matrix / scale).round_())
    made: Any = torch.nn.Parameter(codes, requires_grad=False)
    made.scales, made.unpacked_dtype = scales, whole.dtype
    return made  # type: ignore[no-any-return]  # bitsandbytes and torch add to it


# --- computing -----------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """Rows [S, in], sorted by expert, times their expert's matrix → [S, out]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, experts: Any, parameter: Any, offsets: torch.Tensor) -> torch.Tensor:
        """The parameter itself is no input: under ZeRO-3 it is another one, gathered again, in the backward pass."""
        ctx.experts, ctx.parameter, ctx.dtype = experts, parameter, rows.dtype
        ctx.save_for_backward(offsets)
        return _grouped_product(rows, experts, parameter, offsets, turned=not experts.is_transposed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the rows."""
        (offsets,) = ctx.saved_tensors
        back = _grouped_product(grad, ctx.experts, ctx.parameter, offsets, turned=ctx.experts.is_transposed)
        return back.to(ctx.dtype), None, None, None


def _grouped_product(
    rows: torch.Tensor, experts: Any, parameter: Any, offsets: torch.Tensor, *, turned: bool
) -> torch.Tensor:
    weight = unpacked(parameter)
    if experts.exact:
        weight = weight.float()
    out: torch.Tensor = _grouped_mm(rows, weight.mT if turned else weight, offsets)
    return out


def forward(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Tokens [n, h] through their experts, as transformers' `grouped_mm_experts_forward` computes them."""
    count, (ids, order) = top_k_index.shape[-1], torch.sort(top_k_index.reshape(-1))
    every = torch.arange(experts.num_experts, device=ids.device)
    offsets = torch.searchsorted(ids, every, right=True).int()  # where each expert's rows end
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = _project(experts, hidden_states[order // count], first, offsets, ids)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _project(experts, rows, "down_proj", offsets, ids)
    rows = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    rows = rows[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]
    out: torch.Tensor = rows.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)
    return out


def _project(experts: Any, rows: torch.Tensor, name: str, offsets: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One projection with its adapters and its bias."""
    parameter = getattr(experts, name)
    if not _quantised(parameter):  # too large for bitsandbytes' kernels
        out: torch.Tensor = _grouped_mm(rows, parameter if experts.is_transposed else parameter.mT, offsets)
    else:
        out = _Product.apply(rows, experts, parameter, offsets)  # type: ignore[no-untyped-call]  # torch has no types for it
    for left, right, scaling in experts.updates.get(name, ()):
        low, high = (left, right) if experts.is_transposed else (right.mT, left.mT)
        if missing := -low.shape[-1] % ALIGNED:
            low, high = pad(low, (0, missing)), pad(high, (0, 0, 0, missing))
        # PEFT has B's experts side by side in its columns, and grouped_mm wants those of each together
        out.add_(_grouped_mm(_grouped_mm(rows, low, offsets) * scaling, high.contiguous(), offsets))
    if experts.has_bias:
        out.add_(getattr(experts, f"{name}_bias")[ids])
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)


# --- PEFT ----------------------------------------------------------------------------------------------------------
_WRAPPER: Any = ParamWrapper
_get_param, _activate_lora = _WRAPPER.get_param, _WRAPPER._activate_lora


def _placeholder(wrapper: Any) -> torch.Tensor:
    """For `ParamWrapper.get_param`: of a quantised parameter its shape, type and place, in no memory."""
    experts = wrapper.get_base_layer()
    parameter: Any = experts._parameters.get(wrapper.parameter_name)
    if parameter is None or not _quantised(parameter):
        found: torch.Tensor = _get_param(wrapper)
        return found
    state = getattr(parameter, "quant_state", None)
    shape, dtype = (parameter.shape, parameter.unpacked_dtype) if state is None else (state.shape, state.dtype)
    return torch.empty((), dtype=torch.float32 if experts.exact else dtype, device=parameter.device).expand(shape)


@contextmanager
def _activate_factors(wrapper: Any, active_adapters: list[str]) -> Iterator[None]:
    """For `ParamWrapper._activate_lora`: it adds B·A to a copy of all experts; quantised ones multiply by A, then B."""
    experts, name = wrapper.get_base_layer(), wrapper.parameter_name
    if name not in parameters(experts):
        with _activate_lora(wrapper, active_adapters):
            yield
        return
    experts.updates[name] = [wrapper.get_delta_factors(own) for own in active_adapters if own in wrapper.lora_A]
    try:
        yield
    finally:
        del experts.updates[name]


# --- exactly -------------------------------------------------------------------------------------------------------


@contextmanager
def computing_in_fp32(experts: Any) -> Iterator[None]:
    """Context in which these experts multiply in fp32."""
    experts.exact = True
    try:
        yield
    finally:
        experts.exact = False
