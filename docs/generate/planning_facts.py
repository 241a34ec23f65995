"""What happened to users, and what the plan says of the same runs: a table of `docs/planning.md`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from docs.generate.planning_examples import Table, planned, spec_of, trained
from runner.plan.autograd.step_peak import replay_step
from runner.plan.memory import GIB
from runner.plan.plan import Plan

NO_TENSOR = ("process", "collectives", "allocator_slack")

CHECKPOINTED = "train.gradient_checkpointing=true"
"""In all of them, as far as is said."""
ONE = ("train.max_length=2048", "train.micro_batch_size=1", CHECKPOINTED)
V100 = ("model=llama2_7b", "method=full", "hw=v100x8", "deepspeed=zero2", "train.batch_size=8", *ONE)
EIGHT = ("model=llama3_8b", "method=full", "hw=rtx3090", "hw.num_gpus=8", "train.max_length=1024",
         "train.batch_size=16", "train.micro_batch_size=1", CHECKPOINTED)  # fmt: skip
RTX3090, RTX3090_OFFLOAD = (*EIGHT, "deepspeed=zero3"), (*EIGHT, "deepspeed=zero3_offload")
OFFLOADED = ("model=llama30b", "method=full", "hw=h100", "hw.memory_gib=94", "hw.host_memory_gib=693",
             "deepspeed=zero3_offload", "train.batch_size=1", *ONE)  # fmt: skip
SEVENTY = ("model=llama2_70b", "method=qlora4", "hw=rtx4090", "hw.num_gpus=4", "deepspeed=zero3",
           "train.batch_size=4", *ONE)  # fmt: skip
QWEN2 = ("model=hub", "model.name=qwen2_7b", "model.id=Qwen/Qwen2-7B", "model.architecture=qwen2",
         "model.hidden_size=3584", "model.intermediate_size=18944", "model.num_layers=28", "model.num_heads=28",
         "model.num_kv_heads=4", "model.vocab_size=152064", "model.context_length=32768", "model.tie_embeddings=false",
         "method=lora", "method.rank=8", "hw=a100", "train.batch_size=1", "train.micro_batch_size=1",
         CHECKPOINTED)  # fmt: skip
LOADED = ("model=llama3_8b", "method=lora", "hw=a100", "train.batch_size=1", *ONE)
# torchtune's own: rank 8 on two of the attention's projections, checkpoints, and in full all in bf16.
TUNED = ("model=llama3_8b", "hw=rtx4090", "train.max_length=2048", "train.micro_batch_size=2", "train.batch_size=2",
         CHECKPOINTED)  # fmt: skip
TUNED_LORA, TUNED_QLORA = (
    (*TUNED, f"method={method}", "method.rank=8", "method.target_modules=[q_proj,v_proj]")
    for method in ("lora", "qlora4")
)
TUNED_FULL = (*TUNED, "method=full", "method.master_weights=false", "train.optimizer=paged_adamw_8bit")
RUNS = (V100, RTX3090, RTX3090_OFFLOAD, OFFLOADED, SEVENTY, LOADED, TUNED_LORA, TUNED_QLORA, TUNED_FULL)

LLAMA_FACTORY = "https://github.com/hiyouga/LlamaFactory/issues/"
TORCHTUNE = "[torchtune's README](https://github.com/pytorch/torchtune), September 2024"


def _v100() -> str:
    plan = planned(*V100)
    tensors = tensors_in(plan, "step")
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


def _qwen2() -> str:
    peaks = [planned(*QWEN2, f"train.max_length={s}").peak_gib["expected"] for s in (1024, 2048)]
    slopes = [all_logits(b, 2048) - all_logits(b, 1024) for b in (1, 4)]
    return (
        f"{peaks[0]:.1f} and {peaks[1]:.1f} GiB with batch 1. **Lower than reported**, most of all in growth (8.2 GB, "
        f"7.6 GiB). TRL's fused head makes no logits; all of a vocabulary of 152,064 at once, as trainers made them "
        f"then, would add {slopes[0]:.1f} GiB per 1,024 tokens with batch 1 and {slopes[1]:.1f} with batch 4. Which "
        "batch it was, and whether with checkpointing, is not reported"
    )


def all_logits(batch: int, length: int) -> float:
    """GiB of tensors at the peak of Qwen2-7B, LoRA, with a head that makes the logits of every position at once."""
    spec = spec_of(*QWEN2, f"train.max_length={length}")
    shape, training, setting = trained(spec)
    one = replay_step(shape, replace(setting, b=batch, head="labelled"), training.trains)
    return (training.frozen_bytes + one.backward.total) / GIB


def _loaded() -> str:
    plan = planned(*LOADED)
    return (
        f"{plan.host_ram_gib:.1f} GiB per process. **Far lower than reported**: transformers 5.23 opens files "
        "memory-mapped, and weights pass through the page cache (measured, see above). The report names neither "
        "version nor processes; 64 GB would be two copies in fp32, or one in 16 bits in each of four processes"
    )


def _torchtune() -> str:
    full, lora, qlora = (planned(*words) for words in (TUNED_FULL, TUNED_LORA, TUNED_QLORA))
    waiting = full.phases["step"]["gradients"]
    return (
        f"tensors alone, as torch's own figures have no CUDA context: {tensors_in(full):.1f}, "
        f"{tensors_in(lora):.1f} and {tensors_in(qlora):.1f} GiB. Full: here all {waiting:.1f} GiB of gradients wait "
        "for the step, torchtune's optimiser runs in the backward pass and drops each at once; the paged states count "
        f"in main memory ({full.host_ram['offloaded']:.1f} GiB). LoRA: torch.compile fuses what norms, rotary "
        "positions and SiLU leave behind for one layer; nothing is compiled here"
    )


def tensors_in(plan: Plan, phase: str | None = None) -> float:
    """GiB of tensors in a phase, or in the one that has most: without context, collectives and slack."""
    sums = {
        name: sum(size for term, size in terms.items() if term not in NO_TENSOR) for name, terms in plan.phases.items()
    }
    return sums[phase] if phase else max(sums.values())


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
    ("Qwen2-7B, LoRA: 17.9 GB with 1,024 tokens, 26.1 GB with 2,048", _qwen2),
    ("An 8B, LoRA: about 75 GB of main memory while loading", _loaded),
    (
        f"Llama-3.1-8B, 2 × 2,048 tokens packed, compiled, RTX 4090: full with a paged 8-bit optimiser in the backward "
        f"pass 18.9 GiB, LoRA 16.2, QLoRA 7.4 ({TORCHTUNE})",
        _torchtune,
    ),
)


def facts() -> Table:
    """What happened to users, and what the plan of the same run says."""
    return ("reported", "planned"), [(reported, say()) for reported, say in FACTS]
