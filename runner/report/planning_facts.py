"""What happened to users, and what the plan says of the same runs: a table of `docs/planning.md`."""

from __future__ import annotations

from collections.abc import Callable

from runner.plan.memory import GIB
from runner.plan.plan import Plan
from runner.report.planning_examples import Table, planned

NO_TENSOR = ("process", "collectives", "allocator_slack")

ONE = ("train.max_length=2048", "train.micro_batch_size=1")
V100 = ("model=llama2_7b", "method=full", "hw=v100x8", "deepspeed=zero2", "train.batch_size=8", *ONE)
EIGHT = ("model=llama3_8b", "method=full", "hw=rtx3090", "hw.num_gpus=8", "train.max_length=1024",
         "train.batch_size=16", "train.micro_batch_size=1")  # fmt: skip
RTX3090, RTX3090_OFFLOAD = (*EIGHT, "deepspeed=zero3"), (*EIGHT, "deepspeed=zero3_offload")
OFFLOADED = ("model=llama30b", "method=full", "hw=h100", "hw.memory_gib=94", "hw.host_memory_gib=693",
             "deepspeed=zero3_offload", "train.batch_size=1", *ONE)  # fmt: skip
SEVENTY = ("model=llama2_70b", "method=qlora4", "hw=rtx4090", "hw.num_gpus=4", "deepspeed=zero3",
           "train.batch_size=4", *ONE)  # fmt: skip
RUNS = (V100, RTX3090, RTX3090_OFFLOAD, OFFLOADED, SEVENTY)

LLAMA_FACTORY = "https://github.com/hiyouga/LlamaFactory/issues/"


def _v100() -> str:
    plan = planned(*V100)
    tensors = sum(size for name, size in plan.phases["step"].items() if name not in NO_TENSOR)
    update = 4 * plan.trainable_parameters / 8 / GIB
    return (
        f"peak in the optimiser step too, with {tensors:.2f} GiB of tensors. The {update:.2f} GiB more are "
        f"a temporary of an AdamW that is not fused; here it is, and the run {_fits(plan)}"
    )


def _tight() -> str:
    return (
        f"{_fits(planned(*RTX3090))}; with offload {planned(*RTX3090_OFFLOAD).peak_gib['expected']:.1f}. Lower than "
        "reported: transformers 4.46 made all logits of a vocabulary of 128,256 at once, TRL's fused head does not"
    )


def _offload() -> str:
    plan = planned(*OFFLOADED)
    there = 744e9 / GIB
    verdict = "fits" if plan.fits else "refused, since the system needs some too"
    return (
        f"{plan.host_ram_gib:.0f} GiB of main memory for a model of as many parameters, where the machine "
        f"has {there:.0f}: {verdict}"
    )


def _seventy() -> str:
    plan = planned(*SEVENTY)
    load, between = (sum(plan.phases[phase].values()) for phase in ("load", "step"))
    loading = "as reported" if load > 24 else "**not as reported**: the plan has every matrix sharded as it arrives"
    return (
        f"{between:.1f} GiB between the passes, {plan.peak_gib['expected']:.1f} at the peak; {load:.1f} GiB while "
        f"loading, {loading}"
    )


def _fits(plan: Plan) -> str:
    peak = plan.peak_gib
    verdict = "does not fit" if not plan.fits else "fits" if peak["high"] <= (plan.capacity_gib or 0) else "is tight"
    return f"{verdict}: {peak['expected']:.1f} ({peak['low']:.1f}–{peak['high']:.1f}) of {plan.capacity_gib:g} GiB"


FACTS: tuple[tuple[str, Callable[[], str]], ...] = (
    (
        f"Llama-7B, full, ZeRO-2, 8 × V100 32 GB, batch 1: out of memory in AdamW's step, 28.28 GiB allocated, "
        f"3.14 more wanted ([LLaMA-Factory 1221]({LLAMA_FACTORY}1221))",
        _v100,
    ),
    (
        f"Llama-3-8B, full, ZeRO-3, 8 × RTX 3090, 1,024 tokens, batch 1: out of memory; with offload it runs, at 13 GB "
        f"([5977]({LLAMA_FACTORY}5977))",
        _tight,
    ),
    (
        f"Qwen2.5-32B, full, ZeRO-3 with offload, one H100, 744 GB of main memory: killed, −9 "
        f"([6755]({LLAMA_FACTORY}6755))",
        _offload,
    ),
    (
        "A 70B in 4 bits, ZeRO-3: does not load on 4 × 24 GB, settles at about 10 GB each on 4 × 48 GB "
        "([axolotl 1717](https://github.com/axolotl-ai-cloud/axolotl/issues/1717))",
        _seventy,
    ),
)


def facts() -> Table:
    """What happened to users, and what the plan of the same run says."""
    return ("reported", "planned"), [(reported, say()) for reported, say in FACTS]
