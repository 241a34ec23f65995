"""A process that simulates training steps for the plan: `python -m runner.train.simulated_step`.

It reads requests, a JSON object a line, and answers each with one. A model is built from its config.json on the meta
device, without weights or network, and a step of it runs on fake tensors. Layers that are alike need not all run: the
plan names those that do (`runner/plan/simulation.py`) and extends what they show to all.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary, finalize

import torch
from peft import get_peft_model
from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import add_fused_lm_head

from runner.spec import Full, Method, RunSpec
from runner.train import adapter_config, trainable_weights, varlen_attention
from runner.train.fake_tensors import FLASH, FlashAttention, LiveBytes, gpu_like, to_fakes
from runner.train.model_loading import DTYPES
from runner.train.varlen_kernels import Documents

METHOD: TypeAdapter[Method] = TypeAdapter(Method)
ACTIVATIONS, CASTS, HEAD, GRADIENTS = range(4)
ANSWER = "answer: "
"""Before each answer: what libraries print while they are imported stands there, too."""
Asked = Mapping[str, Any]


class Segments(LiveBytes):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Live bytes and operations by stretch of a step: the embedding, each layer, the head; forward, then backward."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head, self.phase = head, "forward"
        self.records: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
        self.by_kind = [0, 0, 0, 0]
        self.making = ACTIVATIONS
        self.dropped: dict[int, list[int]] = {}
        self.done: list[dict[str, Any]] = []
        self.at = -1
        self.flops = self.flash = 0
        self.start, self.top, self.at_top = [0, 0, 0, 0], 0, [0, 0, 0, 0]

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, and count its products."""
        is_cast = func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter)
        self.making = CASTS if is_cast else HEAD if self.at == self.head else ACTIVATIONS
        result = super().run(func, args, kwargs)
        self.flops += _flops(func, args, kwargs, result)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Add the tensor's storage, once, until it dies."""
        storage = tensor.untyped_storage()
        if storage in self.records:
            return
        record = [storage.nbytes(), self.making, self.at]
        self.records[storage] = record
        self.by_kind[record[1]] += record[0]
        finalize(storage, self._died, record)
        if sum(self.by_kind) > self.top:
            self.top, self.at_top = sum(self.by_kind), self.by_kind.copy()

    def _died(self, record: list[int]) -> None:
        size, kind, born = record
        self.by_kind[kind] -= size
        self.dropped.setdefault(born, [0, 0, 0, 0])[kind] += size

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """A gradient has come to its weight, and stays."""
        record = self.records.get(tensor.untyped_storage())
        if record is not None and record[1] != GRADIENTS:
            self.by_kind[record[1]] -= record[0]
            self.by_kind[GRADIENTS] += record[0]
            record[1] = GRADIENTS

    def enter(self, at: int) -> None:  # type: ignore[override]  # a stretch in place of a phase
        """Stretch `at` begins."""
        self.close()
        self.at, self.flops, self.flash = at, 0, FlashAttention.flops
        self.start = self.at_top = self.by_kind.copy()
        self.top = sum(self.start)

    def close(self) -> None:
        """The stretch ends."""
        if self.at >= 0:
            at_peak = [a - b for a, b in zip(self.at_top, self.start, strict=True)]
            kept = [a - b for a, b in zip(self.by_kind, self.start, strict=True)]
            self.done.append(
                {
                    "index": self.at,
                    "at_peak": at_peak,
                    "kept": kept,
                    "flops": self.flops + FlashAttention.flops - self.flash,
                }
            )
        self.at = -1

    def taken(self) -> list[dict[str, Any]]:
        """The stretches since the last call."""
        self.close()
        done, self.done = self.done, []
        return done


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Operations of a product, as torch's FlopCounterMode counts them; that of experts it does not know."""
    if func is torch.ops.aten._grouped_mm.default:
        a, b = args[0].shape, args[1].shape
        return int(2 * a[-2] * a[-1] * b[-1])  # rows of `a` in groups, or its columns
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


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
    values = json.loads(config_json)
    values.pop("quantization_config", None)  # the worker trains what it unpacks
    values.pop("transformers_version", None)
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


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


def step(asked: Asked) -> dict[str, Any]:
    """Stretches of the forward pass, of the end of autocast and of the backward pass, over the layers named."""
    again = asked["again"]
    model = built(asked["config"], method_part(asked), any(again))
    path, layers = adapter_config.decoder_layers(model)
    with _shown(model, path, layers, asked["layers"]) as shown, attention_of(model, asked), gpu_like_if(asked):
        for layer, flag in zip(shown, again, strict=True):
            layer.gradient_checkpointing = flag
        found = _quiet(model, shown, asked) if asked["quiet"] else _both_passes(model, shown, asked)
        return found | {"attention": model.config.get_text_config()._attn_implementation}


@contextmanager
def gpu_like_if(asked: Asked) -> Iterator[None]:
    """What a GPU does differently, for a run on one."""
    with nullcontext() if asked["attention"] == "blockwise" else gpu_like():
        yield


@contextmanager
def _shown(model: Any, path: str, layers: Any, indices: list[int]) -> Iterator[Any]:
    """The model with so many of its layers, and its config's lists of one entry per layer."""
    owner = model.get_submodule(path.rpartition(".")[0])
    name, facts = path.rpartition(".")[2], model.config.get_text_config()
    lists = {k: v for k, v in vars(facts).items() if isinstance(v, (list, tuple)) and len(v) == len(layers)}
    some = torch.nn.ModuleList([layers[i] for i in indices])
    setattr(owner, name, some)
    for key, values in lists.items():
        facts.__dict__[key] = [values[i] for i in indices]
    try:
        yield some
    finally:
        setattr(owner, name, layers)
        for key, values in lists.items():
            facts.__dict__[key] = values


@contextmanager
def attention_of(model: Any, asked: Asked) -> Iterator[None]:
    """The model attends as the worker's would on the run's hardware."""
    kernel = asked["attention"]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "to_dict")}
    configs[0] = model.config.get_text_config()
    extras = any(getattr(m, extra, None) is not None for m in model.modules() for extra in varlen_attention.EXTRAS)
    name = {"flash": FLASH, "sdpa": "sdpa", "eager": "eager", "per_document": "sdpa"}.get(kernel, varlen_attention.NAME)
    if name in (FLASH, varlen_attention.NAME):
        if not varlen_attention.can_use(base):
            name = "sdpa" if base._supports_sdpa else "eager"
        elif extras:
            name = varlen_attention.NAME
    varlen_attention.register()
    rows = asked["b"], asked["s"]
    masked = kernel in ("sdpa", "eager") or (name in ("sdpa", "eager") and kernel != "per_document")
    before = {key: config._attn_implementation for key, config in configs.items()}
    masks = dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping)
    ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.update({
        varlen_attention.NAME: lambda *_, **__: Documents((rows[1],) * rows[0], (False,) * rows[0], None, None),
        "sdpa": lambda *_, **__: torch.ones(rows[0], 1, rows[1], rows[1], dtype=torch.bool) if masked else None,
        "eager": lambda *_, dtype=torch.float32, **__: torch.zeros(rows[0], 1, rows[1], rows[1], dtype=dtype),
    })  # fmt: skip
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_MASK_ATTENTION_FUNCTIONS._local_mapping.update(masks)


def _first(value: Any) -> torch.Tensor:
    """The hidden states among a layer's arguments or results."""
    return value if isinstance(value, torch.Tensor) else next(v for v in value if isinstance(v, torch.Tensor))


@contextmanager
def _watched(shown: Any, counter: Segments) -> Iterator[None]:
    """Stretches begin where layers do: in the forward pass by hooks of modules, in the backward pass of their results.

    A layer that is made again calls no hook (`GradientCheckpointingLayer`), or one that the phase silences.
    """
    last = len(shown)

    def begins(at: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if counter.phase == "forward":
                counter.enter(at)
                hidden = _first(args or tuple(kwargs.values()))
                if at == 1 and hidden.requires_grad:
                    hidden.register_hook(lambda grad: counter.enter(0))  # type: ignore[no-untyped-call]  # likewise

        return hook

    def ends(at: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, result: Any) -> None:
            if counter.phase == "forward":
                hidden = _first(result)
                if hidden.requires_grad:
                    hidden.register_hook(lambda grad: counter.enter(at))  # type: ignore[no-untyped-call]  # likewise
                if at == last:
                    counter.enter(last + 1)

        return hook

    handles = []
    for at, layer in enumerate(shown, 1):
        handles.append(layer.register_forward_pre_hook(begins(at), with_kwargs=True))
        handles.append(layer.register_forward_hook(ends(at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _both_passes(model: Any, shown: Any, asked: Asked) -> dict[str, Any]:
    counter = Segments(len(shown) + 1)
    dtype = DTYPES[asked["precision"]]
    mixed = asked["precision"] != "fp32" and not asked["deepspeed"]
    with FakeTensorMode(), counter, _watched(shown, counter):
        to_fakes(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: counter.is_gradient(p.grad))
            if asked["held"]:
                parameter.grad = torch.empty_like(parameter)
                counter.is_gradient(parameter.grad)
        ids = torch.zeros(asked["b"], asked["s"], dtype=torch.int64)
        labels = ids.clone()
        counter.enter(0)
        with torch.autocast("cpu", dtype, enabled=mixed):
            loss = loss_of(model, ids, labels, asked)
            forward = counter.taken()
            counter.dropped.clear()
        forget = {born: [-size for size in sizes] for born, sizes in counter.dropped.items()}
        counter.phase = "backward"
        counter.enter(len(shown) + 1)
        loss.backward()  # type: ignore[no-untyped-call]  # likewise
        del loss
        backward = counter.taken()
        for parameter in trained:
            parameter.grad = None
    return {"forward": forward, "forget": sorted(forget.items()), "backward": backward}


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor, asked: Asked) -> torch.Tensor:
    """TRL's fused head, or the logits of the labelled positions, as `UnguardedSftTrainer.compute_loss` has them."""
    if asked["head"] == "fused":
        found: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True).loss
        return found
    columns = torch.arange(max(1, round((asked["s"] - 1) * asked["labelled"])))
    out = model(input_ids=ids, use_cache=False, logits_to_keep=columns)
    targets = torch.zeros(asked["b"] * columns.numel(), dtype=torch.int64)
    return torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), targets)


def _quiet(model: Any, shown: Any, asked: Asked) -> dict[str, Any]:
    """A pass that keeps nothing."""
    counter = Segments(len(shown) + 1)
    mixed = asked["precision"] != "fp32" and not asked["deepspeed"]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with FakeTensorMode(), counter, _watched(shown, counter), torch.no_grad():
        to_fakes(base)
        ids = torch.zeros(asked["b"], asked["s"], dtype=torch.int64)
        counter.enter(0)
        with torch.autocast("cpu", DTYPES[asked["precision"]], enabled=mixed):
            out = loss_of(base, ids, ids, asked)
            forward = counter.taken()
        del out
    return {"forward": forward, "forget": [], "backward": []}


ANSWERS: dict[str, Callable[[Asked], dict[str, Any]]] = {"model": describe, "method": count, "step": step}


def main() -> None:
    """Answer until the input ends; what libraries print goes to the error output."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    print(ANSWER + "{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = ANSWERS[asked["do"]](asked)
        except Exception as error:  # whatever a model's code makes of tensors without values
            traceback.print_exc()
            words = " ".join(str(error).split())
            found = {"error": f"{type(error).__name__}: {words[:300]}"}
        print(ANSWER + json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
