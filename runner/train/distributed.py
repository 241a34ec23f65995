"""Ranks of a run, and the few collectives outside training.

torchrun sets each process's rank in the environment; without it there is one process, and every collective is local.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore

from runner.spec import RunSpec

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""Of one collective. A hang is found earlier, by the heartbeat (launcher/supervisor.py): this is for a lost watcher."""
LOOK_SECONDS = 0.2
_TURNS = count()
"""Of `main_first`: all processes come by each of them in the same order."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Number within the machine; also the GPU's."""

    @property
    def main(self) -> bool:
        """The main process: it writes the run's files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            self.all_reduce_sum([0.0])  # an all-reduce over gloo, also where the GPUs speak NCCL: it needs no stream

    @contextmanager
    def main_first(self, beat: Callable[[], None] = lambda: None) -> Iterator[Callable[[], None]]:
        """Context that the main process runs first, to fill a cache that the others then read; on other machines one
        process each runs it next, in case they do not share the cache.

        Yields a function to call on progress: it beats here and, through the store, in the processes that wait. They
        poll the store for as long as it takes: a collective would end after `TIMEOUT`.
        """
        if self.world == 1:
            yield beat
            return
        turn, machine = next(_TURNS), os.environ.get("GROUP_RANK", "0")
        store = PrefixStore(f"turn {turn}", distributed_c10d._get_default_store())
        if not self.main:
            _wait(store, "main", beat)
        if self.local:
            _wait(store, machine, beat)
        last = 0.0

        def working() -> None:
            nonlocal last
            beat()
            if time.monotonic() - last > 1:
                last = time.monotonic()
                store.add("beats", 1)

        yield working
        if not self.local:
            store.set(machine, "over")
        if self.main:
            store.set("main", "over")

    def any(self, flag: bool) -> bool:
        """True if the flag is true in any process."""
        return self.all_reduce_sum([float(flag)])[0] > 0

    def all_reduce_sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in fp64."""
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values)
        return [float(v) for v in values]

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; picklable."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """The main process's value, in every process; picklable."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


def _wait(store: PrefixStore, over: str, beat: Callable[[], None]) -> None:
    """Poll until the key is there; beat whenever the working process has made progress."""
    heard = 0
    while not store.check([over]):
        time.sleep(LOOK_SECONDS)
        if (beats := store.add("beats", 0)) != heard:
            heard = beats
            beat()


def launched() -> bool:
    """True in a process started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def ranks_from_environment() -> Ranks:
    """Rank and world size from torchrun's variables, without a process group."""
    if not launched():
        return Ranks()
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def init_process_group(spec: RunSpec) -> Ranks:
    """Create the process group. With DeepSpeed before the model is loaded, or ZeRO-3 sees a world of one."""
    ranks = ranks_from_environment()
    if not launched():
        return ranks
    on_gpu = spec.hw.accelerator == "cuda"
    if on_gpu:
        torch.cuda.set_device(ranks.local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    if spec.deepspeed.name != "none":
        import deepspeed

        if not on_gpu:
            # DeepSpeed would compile a C++ all-reduce for CPUs, half a minute on two cores, and whoever is killed
            # meanwhile leaves a lock that all later runs wait for; gloo has one. (`deepspeed.comm.torch` is torch.)
            import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]  # a module
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=TIMEOUT, verbose=False)
    return ranks


def destroy_process_group() -> None:
    """Destroy the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
