"""The memory of one training step of the worker's model, on fake tensors: any size, no GPU, no weights.

The real transformers model, PEFT adapter, TRL head and torch optimiser run on tensors that hold no memory;
every storage an operator makes is counted from its birth to its death. What a GPU does differently from the
CPU build of torch is put in its place, and nothing else:

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
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.trainer.utils import add_fused_lm_head

from runner.hub.model_config import config_of
from runner.spec import Full, ModelSpec, RunSpec
from runner.train import adapter_config, trainable_weights
from runner.train.activation_checkpointing import checkpoint_every
from runner.train.model_loading import DTYPES

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
    """What FlashAttention 2 allocates: [b, s, heads, d] in and out, log-sum-exp in fp32; no scores."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, s, heads, _ = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(b, heads, s, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        b, s, heads, d = q.shape
        rounded = -(-s // 128) * 128
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        softmax_d = torch.empty(b, heads, rounded, dtype=torch.float32)
        dq_accum = torch.empty(b, rounded, heads, -(-d // 32) * 32, dtype=torch.float32)
        if k.shape[2] != heads:  # grouped queries: one dk and dv per query head, summed at the end
            wide = torch.empty(b, s, heads, d, dtype=q.dtype), torch.empty(b, s, heads, d, dtype=q.dtype)
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


@dataclass
class Simulated:
    """Most bytes alive in each phase of a step that is not the first."""

    peaks: dict[str, int] = field(default_factory=dict)
    start: int = 0
    """Bytes alive when the step began: weights (if they were made under the counter) and the optimiser's states."""

    @property
    def peak(self) -> int:
        """Over all phases."""
        return max(self.peaks.values())


def transformers_config(model: ModelSpec, num_layers: int | None = None) -> Any:
    """The configuration that transformers would load, from the facts of the catalogue."""
    facts = config_of(model) | {"pad_token_id": None}  # the class's may be none of this vocabulary
    if num_layers:
        facts["num_hidden_layers"] = num_layers
    if model.architecture == "phi":
        facts |= {"resid_pdrop": 0.1, "partial_rotary_factor": 0.4}  # microsoft/phi-2's config.json
    assert model.architecture
    return AutoConfig.for_model(model.architecture, **facts)


def build(spec: RunSpec, num_layers: int | None = None) -> Any:
    """The model as the worker has it before the first step, on the meta device."""
    config = transformers_config(spec.model, num_layers)
    dtype = DTYPES[spec.train.precision]
    if isinstance(spec.method, Full) and spec.method.master_weights:
        dtype = torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        checkpoint_every(model, spec.train.checkpoint_every)
        model.config._attn_implementation = FLASH
        trainable_weights.mark_trainable(spec, model)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer
        adapter = adapter_config.adapter_config(spec, model)
        if adapter is not None:
            model = get_peft_model(model, adapter)
            trainable_weights.leave_casts_to_autocast(model)
    if spec.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        if adapter is not None:
            model.enable_input_require_grads()
    model.train()
    return model


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


def simulate(spec: RunSpec, num_layers: int | None = None, steps: int = 2) -> Simulated:
    """Peaks of the last of `steps` optimiser steps (the optimiser's states are made in the first)."""
    counter = LiveBytes()
    model = build(spec, num_layers)
    with gpu_like(), FakeTensorMode(), counter:
        to_fakes(model)
        return take_steps(spec, model, counter, steps)


def take_steps(spec: RunSpec, model: Any, counter: LiveBytes, steps: int = 2) -> Simulated:
    """Peaks of the last of `steps` steps of any model, fake or real, under `counter`."""
    b, s = int(spec.train.micro_batch_size), spec.train.max_length
    mixed = spec.train.precision != "fp32"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batch = {name: torch.zeros(b, s, dtype=torch.int64) for name in ("input_ids", "labels")}
    start = 0
    for _ in range(steps):
        counter.peaks.clear()
        start = counter.live
        for _ in range(int(spec.train.accumulation_steps)):
            counter.enter("forward")
            with torch.autocast("cpu", DTYPES[spec.train.precision], enabled=mixed):
                loss = model(**batch, use_cache=False, fused_lm_head=True).loss
            counter.enter("backward")
            loss.backward()
            del loss
        counter.enter("step")
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Simulated(dict(counter.peaks), start)
