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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from runner.plan.simulation import ANSWER
from runner.train import adapter_config, varlen_attention
from runner.train.fake_tensors import FLASH, gpu_like, to_fakes
from runner.train.model_loading import DTYPES
from runner.train.simulated_model import Asked, built, count, describe, method_part, not_causal
from runner.train.step_segments import Segments, watched
from runner.train.varlen_kernels import Documents


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


def _both_passes(model: Any, shown: Any, asked: Asked) -> dict[str, Any]:
    counter = Segments(len(shown) + 1)
    dtype = DTYPES[asked["precision"]]
    mixed = asked["precision"] != "fp32" and not asked["deepspeed"]
    with FakeTensorMode(), counter, watched(shown, counter):
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
    with FakeTensorMode(), counter, watched(shown, counter), torch.no_grad():
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
            other = not_causal(asked["config"])
            found = {"not_causal": other} if other else ANSWERS[asked["do"]](asked)
        except Exception as error:  # whatever a model's code makes of tensors without values
            traceback.print_exc()
            words = " ".join(str(error).split())
            passing = isinstance(error, (MemoryError, OSError, ImportError))  # of this machine, not of the model
            found = {"error": f"{type(error).__name__}: {words[:300]}", "transient": passing}
        print(ANSWER + json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
