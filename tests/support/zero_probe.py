"""What one rank of a real DeepSpeed engine holds: run by `test_zero.py` under torchrun, one JSON line per rank.

    torchrun --nproc-per-node 2 tests/support/zero_probe.py CASES.json OUT

CASES is a list of {name, sizes, frozen, config}: a chain of linear layers, trained for two optimiser steps.
Bytes are those of storages, each counted once however many tensors view it.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

SMALL = 16  # bytes: below it stand counters (Adam's `step`) and flags, no state of the model


def held(tensors: Iterable[Any]) -> int:
    """Bytes of the storages under these tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(size for size in storages.values() if size > SMALL)


def everything() -> int:
    """Bytes of every tensor alive in this process, found by the garbage collector."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type != "meta"]
    return held([*tensors, *(t.grad for t in tensors if t.is_leaf)])


def before(owner: Any, method: str, look: Callable[[], None]) -> None:
    """Look each time before the method runs."""
    original = getattr(owner, method)

    def looked(*args: Any, **kwargs: Any) -> Any:
        look()
        return original(*args, **kwargs)

    setattr(owner, method, looked)


def model_of(sizes: list[int], frozen: int, dtype: torch.dtype) -> torch.nn.Sequential:
    """Linear layers from size to size; the first `frozen` of them do not train.

    As in a transformer there are modules without parameters, which make ZeRO-3 prefetch too.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    for layer in layers[:frozen]:
        layer.requires_grad_(False)
    blocks = [torch.nn.Sequential(layer, torch.nn.Identity()) for layer in layers]
    return torch.nn.Sequential(*blocks).to(dtype)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes by term on this rank."""
    stage = case["config"]["zero_optimization"]["stage"]
    start = everything()
    dtype = torch.bfloat16 if case["config"]["bf16"]["enabled"] else torch.float32
    model: Any = model_of(case["sizes"], case["frozen"], dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    engine, zero, _, _ = deepspeed.initialize(model=model, optimizer=adam, config=case["config"])
    peaks: dict[str, int] = {}

    def note(name: str, value: int) -> None:
        peaks[name] = max(peaks.get(name, 0), value)

    def gathered() -> None:
        full = [p for p in model.parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        note("gathered", held(p.data for p in full))

    def buffers() -> None:
        found = [b.buffer for b in zero.ipg_buckets.values()]
        note("buckets", held(t for b in found for t in (b if isinstance(b, list) else [b])))
        if stage < 3:
            note("gradients_whole", held(p.grad for p in trained))
            kept = [g for gs in zero.all_grad_tensors.values() for g in gs or []]
            note("gradients_kept", held([*kept, zero.grads_in_partition]))

    def step_gradients() -> None:
        note("step", held(p.grad for g in adam.param_groups for p in g["params"]))

    reduce = "reduce_ipg_grads" if stage < 3 else "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
    before(zero, reduce, buffers)
    before(zero.optimizer, "step", step_gradients)
    if stage == 3:
        coordinator = zero.parameter_offload.get_param_coordinator()
        before(coordinator, "release_sub_module", gathered)
    for _ in range(3 * case["config"]["gradient_accumulation_steps"]):
        out = engine(torch.ones(2, case["sizes"][0], dtype=dtype, requires_grad=True))
        engine.backward(out.float().pow(2).mean())
        del out
        grads = (
            [zero.grad_partitions_flat_buffer]
            if stage == 3
            else [g for gs in zero.averaged_gradients.values() for g in gs or []]
        )
        note("gradients", held(grads))
        del grads
        engine.step()
    params = list(model.parameters())
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    result = {
        "rank": torch.distributed.get_rank(),
        "case": case["name"],
        "total": everything() - start,
        "weights": held([p.ds_tensor for p in params] if stage == 3 else [p.data for p in params]),
        "persistent": held(p.data for p in params) if stage == 3 else 0,
        "master": held(masters),
        "optimizer": held(v for s in adam.state.values() for v in s.values() if torch.is_tensor(v)),
        **peaks,
    }
    engine.destroy()
    return result


def main() -> None:
    """Measure every case and write one file per rank."""
    # Without this DeepSpeed compiles a C++ all-reduce for CPUs, half a minute on two cores; gloo has one.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # the attribute `torch` is torch itself
    deepspeed.init_distributed("gloo")
    cases, out = Path(sys.argv[1]), Path(sys.argv[2])
    results = [measure(case) for case in json.loads(cases.read_text("utf-8"))]
    (out / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(results), "utf-8")


if __name__ == "__main__":
    main()
