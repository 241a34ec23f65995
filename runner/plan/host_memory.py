"""Main memory of a node, and disk.

Page cache is not counted: transformers 5.23 opens safetensors memory-mapped (`modeling_utils.py`, backend
"mmap"), so a model that goes to a GPU leaves nothing of its own behind. Reading 256 MiB of tensors that
way raised RssFile by 259 MiB and RssAnon by 0 (safetensors 0.8, torch 2.13), and with ZeRO-3, where rank 0
alone reads, by as little. Sizes of files are compared with real checkpoints in tests/plan/test_host_memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runner.plan.quantization import MethodName

MIB = 2**20

# Resident after importing runner.train.worker (torch 2.13 CPU wheel, transformers 5.23, trl 1.16, peft 0.21,
# datasets): 504 MiB measured on Linux, Python 3.11, of which 221 MiB are there after `import torch`.
CPU_PROCESS = 504 * MIB
DEEPSPEED_IMPORT = 14 * MIB  # deepspeed 0.19.8, measured the same way
# A CUDA build with an initialised context: 2,271 MiB after the first CUDA call of a process that held 1,068 MiB
# (https://github.com/pytorch/pytorch/issues/106511; 2,009 MiB with all of cu118 in pytorch/pytorch#113326),
# plus the 283 MiB that transformers, trl, peft and datasets add. Other people's machines: ±0.5 GiB.
CUDA_PROCESS = (2271 + 283) * MIB

# Measured over 2.1 M tokens (datasets 5.2, Python 3.11), from token lists to a packed data set on disk: 137 bytes
# a token at the peak, 83 still resident when the lists were gone, as the allocator keeps them.
TOKENISING_PEAK, TOKENISING_KEPT = 137, 83
TOKENISED_FILE = 12  # int32 input_ids (datasets.arrow_writer) and int64 labels: 12.02 measured with packing

LOADER_THREADS = 4  # transformers core_model_loading.GLOBAL_WORKERS, on 4 cores or more
SHARD = 50e9  # transformers save_pretrained, max_shard_size="50GB"
MASTER = 4  # DeepSpeed keeps an fp32 copy of what trains


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Trained part of a model, in values and bytes per value."""

    method_name: MethodName
    parameters: int
    """Values of the base model, tied ones counted once."""
    trainable: int
    """Values that train: of the base, or of the adapter."""
    bytes_trained: int = 4
    """Width of the trained weights as held (and saved without DeepSpeed)."""
    bytes_16: int = 2
    """Width of all others."""
    bytes_optimizer: float = 8.0
    """Optimiser states per trained value: 8 for AdamW over fp32, 4 over bf16, about 2 in 8 bits, 0 for SGD."""
    projections: int = 0
    """Frozen values that an adapter's file has beside those that train, in fp32."""

    @property
    def adapter(self) -> bool:
        """Only an adapter trains and is saved."""
        return self.method_name not in ("full", "freeze")

    @property
    def weights_16(self) -> float:
        """Bytes of the whole model in 16 bits."""
        return float(self.bytes_16 * self.parameters)


def checkpoint(trained: WeightBytes, stage: int, *, tied_values: int = 0) -> dict[str, float]:
    """Bytes of one checkpoint by what they hold; their sum is its size on disk.

    `stage` is 0 without DeepSpeed, `tied_values` the size of an embedding matrix that is the head as
    well. Without DeepSpeed transformers writes the weights in the types they are held in (the adapter
    alone, for LoRA) and `optimizer.pt`. With it there is `global_stepN/` alone (deepspeed 0.19.8,
    `engine.save_checkpoint`; the worker leaves out the weights that transformers would write beside it): the module's
    weights in 16 bits (from stage 2 on the frozen ones a second time, in stage 3 those only; on a CPU the second time
    shares the first's storage) and, over all ranks, fp32 master weights with the optimiser's states. For an adapter
    the frozen weights are left out, but for a tied head, whose second name is overlooked.
    """
    frozen = 0 if trained.adapter else trained.parameters - trained.trainable
    states = trained.bytes_optimizer * trained.trainable
    if stage == 0:
        weights = trained.bytes_16 * frozen + trained.bytes_trained * trained.trainable
        return {"weights": float(weights + 4 * trained.projections), "optimizer": states}
    module = trained.trainable + frozen + (tied_values if trained.adapter else 0) if stage < 3 else 0
    again = frozen if stage >= 2 else 0
    return {
        "deepspeed_weights": float(trained.bytes_16 * (module + again) + 4 * trained.projections),
        "optimizer": states + MASTER * trained.trainable,
    }


def final_model(trained: WeightBytes) -> float:
    """Bytes of `model/`: the weights in 16 bits, or the adapter in fp32 (runner/train/trainable_weights.py)."""
    return 4.0 * (trained.trainable + trained.projections) if trained.adapter else trained.weights_16


def pinned(size: float) -> int:
    """Bytes of host memory that one pinned tensor of `size` bytes takes: the next power of two.

    torch's CachingHostAllocator rounds up: 2.25 GiB took 4.008 GiB with torch 2.13
    (https://github.com/wtdcode/vllm-backport/pull/67).
    """
    return 1 << (max(1, math.ceil(size)) - 1).bit_length()


def host_ram(
    trained: WeightBytes, stage: int, *, processes: int, accelerator: Literal["cuda", "cpu"], held: float = 0.0,
    largest_matrix: int = 0, data_tokens: int = 0, text_bytes: float = 0.0, pinned_blocks: Sequence[float] = (),
    pageable: float = 0.0, training: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Bytes of main memory on one node at the peak, by term; their sum is the peak.

    `processes` run on the node. Per process: `held` bytes of weights on its device, `largest_matrix` values in
    the model's largest matrix, the sizes of offloaded tensors that are pinned and of all that are
    not (`pageable`), and on a CPU all that the training takes (`training`: weights, states, activations). Every
    process tokenises `data_tokens` itself and keeps the rows (`text_bytes`); 0 where the cache has
    them. Of tokenising, loading and saving, which follow each other, only the largest is there.
    """
    one = CPU_PROCESS if accelerator == "cpu" else CUDA_PROCESS
    terms = {
        "processes": float(processes * (one + (DEEPSPEED_IMPORT if stage else 0))),
        "data": processes * (text_bytes + TOKENISING_KEPT * data_tokens),
        "offloaded": processes * (sum(map(pinned, pinned_blocks)) + pageable),
        "training": processes * training,
    }
    passing = {
        "tokenising": float(processes * (TOKENISING_PEAK - TOKENISING_KEPT) * data_tokens),
        "loading": processes * _loading(trained, stage, largest_matrix) if accelerator == "cuda" else 0.0,
        "saving": _saving(trained, stage) if accelerator == "cuda" else 0.0,
    }
    largest = max(passing, key=lambda name: passing[name])
    return {name: size for name, size in (terms | {largest: passing[largest]}).items() if size}


def _loading(trained: WeightBytes, stage: int, largest_matrix: int) -> float:
    """Bytes of main memory per process that loading to a GPU needs beyond the mapped file.

    A matrix that changes its type on the way is converted in main memory, by up to four threads at
    once; int8 quantisation, one matrix at a time, copies each back from the GPU
    (transformers 5.23, `integrations/bitsandbytes.py`: `value.to("cpu")`).
    """
    if trained.method_name == "qlora8":
        return float(trained.bytes_16 * largest_matrix)
    if trained.method_name == "full" and trained.bytes_trained > trained.bytes_16 and stage != 3:
        return float(LOADER_THREADS * trained.bytes_trained * largest_matrix)
    return 0.0


def _saving(trained: WeightBytes, stage: int) -> float:
    """Bytes of main memory on one node that weights on GPUs pass through on their way to a file.

    Up to stage 2 one process writes the model, copying a file's tensors (`SHARD` at most) off the GPU first. In stage
    3 rank 0 gathers all of it, or of the adapter (`gather_weights` in runner/train/model_saving.py).
    """
    weights = final_model(trained) if stage else checkpoint(trained, 0)["weights"]
    return weights if stage == 3 else min(weights, SHARD)


def disk(
    trained: WeightBytes, stage: int, *, source: Literal["hub", "package", "folder"], checkpoints: int,
    data_tokens: int = 0, nvme: float = 0.0, tied_values: int = 0, shards: float = 0.0, data: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Bytes on disk at the end of a run, by term, on one disk that all nodes share.

    `weights` are downloaded, or unpacked from a package's GGUF file; 16 bits are assumed, as nearly
    all models of the Hub are stored. `checkpoints` are there at once (plan/cost.py). `nvme` is what is
    offloaded to disk. `shards` are those that pretraining makes, `data` what is downloaded or sent to a pod. Not
    counted: packages, logs.
    """
    terms = {
        "weights": trained.weights_16 if source != "folder" else 0.0,
        "checkpoints": checkpoints * sum(checkpoint(trained, stage, tied_values=tied_values).values()),
        "final_model": final_model(trained),
        "tokenised": float(TOKENISED_FILE * data_tokens),
        "offloaded": nvme,
        "shards": shards,
        "data": data,
    }
    return {name: size for name, size in terms.items() if size}
