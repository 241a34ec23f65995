"""Training steps on fake tensors: the real model, adapter, head and engine, at any size, without weights or a GPU.

Every storage that an operator makes is counted from its birth to its death. What a GPU does differently from the CPU
build of torch is put in its place, and nothing else:

- attention is FlashAttention 2 (`FlashAttention` below allocates what `mha_fwd` and `mha_bwd` of
  Dao-AILab/flash-attention 2.8 allocate), without a mask;
- TRL's head takes the labelled rows out (here: all) and folds its tiles in Triton kernels, which work in place;
- autocast runs `layer_norm` and `torch.pow` in fp32, and dropout keeps a mask of bytes;
- gradients that meet are added in place where nobody else holds the first. torch's engine does so too, but
  never under a dispatch mode (`can_accumulate_inplace` in its input_buffer.cpp), which counts them here;
- experts in fp32 multiply with `grouped_mm`, whose kernel takes them but whose shape function does not.

Mixtures need no routing: `grouped_mm`, transformers' default, computes as many rows wherever they go.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH = "flash_on_fakes"
ADD = torch.ops.aten.add.Tensor


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts the bytes of all storages that are alive; `peaks[phase]` is the most there was in a phase."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.live = 0
        self.phase = "load"
        self.peaks: dict[str, int] = {}
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf)
        return result

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation as a GPU would, without this mode."""
        if func is ADD and not torch.is_grad_enabled() and self.phase == "backward" and _sole(args[0]):
            return torch.ops.aten.add_.Tensor(*args)
        if func is torch.ops.aten.index.Tensor and _is_mask(args[1]):
            self.count(index := torch.empty(args[1][0].numel(), args[1][0].ndim, dtype=torch.int64))
            return args[0].new_empty(index.shape[0], *args[0].shape[args[1][0].ndim :])
        if func is torch.ops.aten._index_put_impl_.default and _is_mask(args[1]):
            return args[0]
        if func is torch.ops.aten.masked_scatter_backward.default:
            return args[0].new_empty(args[2])
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float32:
            shape = args[0].shape[0], args[1].shape[-1]
            return args[0].new_empty(shape if args[1].ndim == 3 else (args[2].shape[0], *shape))
        return func(*args, **kwargs)

    def count(self, tensor: torch.Tensor) -> None:
        """Add the tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._gone, size)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)

    def _gone(self, size: int) -> None:
        self.live -= size

    def enter(self, phase: str) -> None:
        """From here on peaks belong to `phase`."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.live)


def _is_mask(indices: Any) -> bool:
    return len(indices) == 1 and indices[0].dtype == torch.bool


def _sole(tensor: torch.Tensor) -> bool:
    """The engine alone holds this gradient: no other reference to the tensor nor to its storage.

    4 and 2: the engine's own references and those of the call into the mode; more means a holder besides.
    """
    storage = tensor.untyped_storage()
    references: int = tensor._use_count()  # type: ignore[attr-defined]  # not public
    return references <= 4 and torch._C._storage_Use_Count(storage._cdata) <= 2


class FlashAttention(torch.autograd.Function):
    """What FlashAttention 2 allocates: [b, s, heads, d] in and out, log-sum-exp in fp32; no scores.

    `flops` grows by its products: a causal kernel skips the masked half, and the backward pass has twice as many.
    """

    flops = 0

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, s, heads, _ = q.shape
        out = torch.empty_like(q)  # with its strides
        if v.shape[-1] != q.shape[-1]:
            out = torch.empty(b, s, heads, v.shape[-1], dtype=q.dtype)
        lse = torch.empty(b, heads, s, dtype=torch.float32)
        ctx.products = b * heads * s * s * (q.shape[-1] + v.shape[-1])
        FlashAttention.flops += ctx.products
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        FlashAttention.flops += 2 * ctx.products
        q, k, v, _, _ = ctx.saved_tensors
        b, s, heads, d = q.shape
        rounded = -(-s // 128) * 128
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        softmax_d = torch.empty(b, heads, rounded, dtype=torch.float32)
        dq_accum = torch.empty(b, rounded, heads, -(-d // 32) * 32, dtype=torch.float32)
        if k.shape[2] != heads:  # grouped queries: one dk and dv per query head, summed at the end
            wide = torch.empty(b, s, heads, d, dtype=q.dtype), torch.empty(b, s, heads, v.shape[-1], dtype=q.dtype)
            del wide
        del softmax_d, dq_accum
        return dq, dk, dv


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
    if torch.is_autocast_enabled("cpu"):  # attention is on autocast's list
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    heads_last = (x.transpose(1, 2) for x in (query, key, value))
    return FlashAttention.apply(*heads_last), None  # type: ignore[no-untyped-call]  # torch has no types for it


def _layer_norm(original: Any) -> Any:
    """CUDA's autocast casts the arguments of `layer_norm` to fp32."""

    def layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return original(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            cast = [None if t is None else t.float() for t in (x, weight, bias)]
            return original(cast[0], shape, cast[1], cast[2], eps)

    return layer_norm


def _pow(original: Any) -> Any:
    """CUDA's autocast casts the argument of `torch.pow` to fp32 (`gelu_new` calls it)."""

    def power(x: Any, exponent: Any) -> Any:
        return original(x.float() if torch.is_autocast_enabled("cpu") else x, exponent)

    return power


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """A GPU keeps a mask of one byte per value."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _certain(*size: int, **options: Any) -> float:
    """LoHa and LoKr draw on the CPU whether a module is left out, and a fake tensor has no number."""
    return 1.0


def _always(*args: Any) -> bool:  # not a Mock: that would keep every tensor it is called with
    return True


def _nothing(*args: Any, **kwargs: Any) -> None: ...


@contextmanager
def gpu_like() -> Iterator[None]:
    """The differences between a GPU and the CPU build of torch; see the module's docstring."""
    ALL_ATTENTION_FUNCTIONS.register(FLASH, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, lambda *args, **kwargs: None)
    kernels = "trl.kernels.chunked_logprob"
    with ExitStack() as stack:
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
            stack.enter_context(mock.patch(f"{kernels}.{name}", _nothing))
        stack.enter_context(mock.patch("trl.trainer.utils._use_triton", _always))
        norm = torch.nn.functional.layer_norm
        stack.enter_context(mock.patch("torch.nn.functional.layer_norm", _layer_norm(norm)))
        stack.enter_context(mock.patch("torch.pow", _pow(torch.pow)))
        stack.enter_context(mock.patch("torch.nn.functional.dropout", _dropout))
        stack.enter_context(mock.patch("torch.rand", _certain))
        yield


def to_fakes(model: Any) -> None:
    """Exchange meta tensors for fake ones of the CPU, in place; tied ones stay tied. Under FakeTensorMode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    data = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(data, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
