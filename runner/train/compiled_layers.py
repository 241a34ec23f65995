"""Compilation of each decoder layer by torch.compile, for training steps alone.

One layer is compiled, and its code serves all that are alike: seconds, where a whole model takes minutes. Answers and
the held-out loss, whose shapes change with every token or row, are computed without it, and so are attention kernels,
which take the lengths of documents: compiled code before and after is joined by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from runner.train import varlen_attention
from runner.train.adapter_config import decoder_layers
from runner.train.varlen_kernels import Documents


@dataclass(frozen=True, slots=True)
class Sealed:
    """Documents that compiled code passes on: if it saw them, it would be compiled again for every batch's lengths."""

    documents: Documents


def compile_layers(model: Any, *, fixed_shapes: bool, backend: Any = "inductor") -> int:
    """Let training compute each decoder layer with compiled code; how many there are.

    The modules, and so the names of their weights, stay as they are. With `fixed_shapes` each shape of a batch is
    compiled for itself; else the second one is compiled for any length.
    """
    _, layers = decoder_layers(model)
    if model.config._attn_implementation == varlen_attention.NAME:
        disable: Any = torch.compiler.disable
        AttentionInterface.register(varlen_attention.NAME, disable(_attention))
    for layer in layers:
        _compile(layer, False if fixed_shapes else None, backend)
    return len(layers)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """`varlen_attention.attention`, which sees the documents."""
    mask = attention_mask.documents if isinstance(attention_mask, Sealed) else attention_mask
    return varlen_attention.attention(module, query, key, value, mask, **options)


def _sealed(value: Any) -> Any:
    return Sealed(value) if isinstance(value, Documents) else value


def _compile(layer: nn.Module, dynamic: bool | None, backend: Any) -> None:
    """Replace the layer's `forward`, checkpointed outside of what is compiled: torch compiles nothing around it."""
    kind: Any = type(layer)
    whole = MethodType(kind.forward, layer)
    checkpoints = isinstance(layer, GradientCheckpointingLayer)
    inner = MethodType(kind.forward.__wrapped__, layer) if checkpoints else whole
    compiled = torch.compile(inner, dynamic=dynamic, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return whole(*args, **kwargs)
        args, kwargs = tuple(map(_sealed, args)), {name: _sealed(value) for name, value in kwargs.items()}
        if checkpoints and layer.gradient_checkpointing:
            again: Any = layer._gradient_checkpointing_func
            return again(partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    layer.forward = forward
