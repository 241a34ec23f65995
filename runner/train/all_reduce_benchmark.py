"""Benchmark of an all-reduce between the processes of this machine: NCCL over GPUs, gloo over CPU processes.

    torchrun --standalone --nproc-per-node=2 -m runner.train.all_reduce_benchmark RESULT.json gloo

Every rank adds up tensors of some sizes; rank 0 writes `{"backend", "world_size", "sizes": [{"mib", "ms",
"bus_gb_s"}]}`. Bus bandwidth is 2(n−1)/n × bytes / time, which does not depend on the number of processes n and
compares with a link's figure in GB/s, one direction (NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from runner.rundir.directory import write_atomically

SIZES_MIB = {"nccl": (1, 16, 256), "gloo": (1, 16)}
"""The largest: about what DDP and ZeRO send at once (buckets of 25 to 500 MB)."""
WARM_UP, TIMED = 3, 10
LIMIT = timedelta(seconds=60)
"""After which a rank that waits for the others gives up."""


def main(argv: list[str]) -> int:
    """`RESULT.json BACKEND`, under torchrun; 1 where the sums are wrong."""
    result, backend = Path(argv[0]), argv[1]
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=LIMIT)
    try:
        sizes = [measure(mib, device) for mib in SIZES_MIB[backend]]
        if dist.get_rank() == 0:
            content = {"backend": backend, "world_size": dist.get_world_size(), "sizes": sizes}
            write_atomically(result, json.dumps(content))
    finally:
        dist.destroy_process_group()
    return 0


def measure(mib: int, device: torch.device) -> dict[str, float]:
    """Time an all-reduce of `mib` MiB of fp32: `mib`, `ms` of the slowest rank, `bus_gb_s`.

    RuntimeError for a wrong sum.
    """
    world = dist.get_world_size()
    values = torch.ones(mib * 2**18, device=device)  # [mib · 2^18] fp32
    dist.all_reduce(values)
    if not bool((values == world).all()):
        raise RuntimeError(f"an all-reduce of ones over {world} processes gave {values.min()} to {values.max()}")
    values.zero_()
    for _ in range(WARM_UP):
        dist.all_reduce(values)
    _wait(device)
    started = time.perf_counter()
    for _ in range(TIMED):
        dist.all_reduce(values)
    _wait(device)
    slowest = torch.tensor([(time.perf_counter() - started) / TIMED], device=device, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds = float(slowest)
    moved = 2 * (world - 1) / world * mib * 2**20
    return {"mib": mib, "ms": round(1e3 * seconds, 3), "bus_gb_s": round(moved / seconds / 1e9, 3)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
