"""Speeds of hardware, each with its source and date, or the word "assumption".

Sources are published runs, converted to the share of the datasheet's 16-bit peak that they reach. "Read" is the day
on which a page that carries no date was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from runner.spec import HardwareSpec

ADAPTERS = ("lora", "qlora4", "qlora8", "peft")

# --- computing -------------------------------------------------------------------------------------------------

# Share of the 16-bit peak that the matrices of a step reach, by (compute capability, TFLOP/s, what trains). Executed
# operations are counted as `time.flops_per_token` does: with recomputation, attention halved.
PUBLISHED: dict[tuple[float, float, str], tuple[float, str]] = {
    # Qwen-7B, LoRA, FlashAttention 2, checkpointing, batch 1 × 8: 2048 tokens 5.2 s, 4096 10.1 s, 8192 21.3 s. 43.5,
    # 45.6 and 50 GFLOP a token × 16,384/5.2, … = 137, 148, 153 TFLOP/s = 0.44, 0.47, 0.49. Same stack as ours.
    (8.0, 312, "adapter"): (0.47, "Qwen-7B LoRA on an A100, github.com/QwenLM/Qwen README, read 2026-11-21"),
    # LLaMA-7B, 8 × A800, 4096 tokens, checkpointing: 4.19 sequences/s (ZeRO-2), 4.45 (ZeRO-3); × 4096 / 8 GPUs × 56.9
    # GFLOP = 122 and 130 TFLOP/s = 0.39 and 0.42. (An A800 is an A100 with less NVLink.)
    (8.0, 312, "weights"): (0.40, "LLaMA-7B with DeepSpeed on A800s, gist chenyaofo/d4cd6a20, DeepSpeed 0.14.2, 2024"),
    # Llama 3.1 8B, FSDP, no compile, 8192 tokens: "33%" of 989. (5,762 tokens/s × 51.5 GFLOP = 0.30 before what
    # selective checkpointing recomputes.) Hand-tuned MosaicML runs reach 0.54 to 0.57 (llm-foundry benchmarks).
    (9.0, 989, "weights"): (0.33, "Llama 3.1 8B on H100s, torchtitan docs/performance.md, read 2026-11-21"),
    # Llama 3.1 8B, 2 × 2048 tokens: 1,650 tokens/s × 60 GFLOP = 99 of 165.2 TFLOP/s = 0.60 with torch.compile; less
    # torchtitan's gain from compile, 6,667/5,762. Its LoRA row converts to 0.86 and its A6000 rows to more than that
    # card's peak: not used.
    (8.9, 165.2, "weights"): (
        0.52,
        "Llama 3.1 8B on an RTX 4090, torchtune README, read 2026-11-21, less compile",
    ),
    # GPT-2 1.2B, fp16, one V100: "39 TeraFLOPs, 30% of the peak" of 130 (DGX-2H); of 125: 0.31. No FlashAttention.
    (7.0, 125, "weights"): (0.31, "GPT-2 on a V100, Megatron-LM, arXiv 1909.08053, 2019"),
    (7.0, 125, "adapter"): (0.31, "GPT-2 on a V100, Megatron-LM, arXiv 1909.08053, 2019"),
}
# Assumption where nothing is published: 1/share = 1/0.75 + 0.0052 × (peak FLOP/s per byte/s of memory). 0.75 is what
# the best kernels reach on an A100 (llm-foundry: 0.73 to 0.79), 0.0052 makes an A100 (153 FLOP per byte) 0.47 and an
# H100 (295) 0.35: a card with more arithmetic than bandwidth waits for memory. Volta and Turing, without
# FlashAttention: × 0.63, V100's published 0.31 over the 0.49 of the formula.
BEST_SHARE, BALANCE, NO_FLASH = 0.75, 0.0052, 0.63
ASSUMED = "assumption: interpolated between A100 and H100 by FLOP/s per byte/s"

# A layer's kernels are launched one by one, whatever their size: Qwen 1.8B, 7B and 14B take 5.2, 4.7 and 5.0 ms per
# layer and micro batch of 256 tokens with LoRA and checkpointing (same table): 4 passes (forward, recomputation,
# backward as two) of 1.25 ms. 4-bit: 1.4 s against 1.0 s. Without adapters half: assumption.
# Other adapters of PEFT: as LoRA, an assumption.
PASS_S = {"lora": 1.25e-3, "qlora4": 1.75e-3, "qlora8": 1.75e-3, "peft": 1.25e-3}
PASS_WITHOUT_ADAPTER_S = 0.6e-3

# 4-bit weights are unpacked in every pass: 0.5 byte read, 2 written, 2 read again, at a quarter of the bandwidth.
# torchtune, RTX 4090, 4096 tokens: QLoRA 1.697 s, LoRA 1.329 s, 3 passes over 6.98e9 weights → 0.25. (torchao's
# kernel; Qwen-7B's GPTQ kernels on an A100 took 0.09 to 0.23 s a micro batch, this gives 0.17.)
UNPACK_BYTES, UNPACK_SHARE = 4.5, 0.25
# LLM.int8() against fp16 LoRA: "x2-x3" (bitsandbytes issue 465, 2023, RTX A5000), "more than twice" (Alpaca-CoT 26).
INT8_SLOWDOWN = 2.0

# fp32 peak over 16-bit peak, from the datasheets: V100 15.7/125, T4 8.1/65, A100 19.5/312, A6000 38.7/155,
# L40S 91.6/362, H100 67/989, B200 75/2250, RTX 5090 105/210 (GeForce Ada and Ampere have twice this).
TF32_SHARE = 1 / 2
"""TF32 peak over 16-bit peak, from the same datasheets: A100 156/312, A6000 77/155, H100 495/989, B200 1,125/2,250."""
FP32_SHARE = {7.0: 1 / 8, 7.5: 1 / 8, 8.0: 1 / 16, 8.6: 1 / 4, 8.9: 1 / 4, 9.0: 1 / 15, 10.0: 1 / 30, 12.0: 1 / 2}

# SmolLM2-135M, LoRA, 256 tokens a step (256 × 0.594 GFLOP by the formula, which scores every position), bf16, 2 threads
# with avx512_bf16: 0.781 s on an EPYC of family 25 (2026-11-21), 97 GFLOP/s a core; 0.457 s on one of family 26
# (docs/benchmarks.md, 2026-11-30), 166. About the mean, wrong by up to a third either way: which core it will be is not
# known before the run. fp32 on the older one: 117 to 143 tokens/s where bf16 reached 410 to 480. That speed grows with
# the cores is an assumption.
CPU_FLOPS = {"bf16": 130e9, "fp32": 97e9 * 130 / 445}
# A generated token passes every layer with next to nothing to compute: on a CPU too the time is that of starting the
# kernels, whatever the number of cores. Main job (30 layers, LoRA, 5 batches of 8 prompts; README: run of 2026-11-21 on
# 2 cores of an AMD EPYC with avx512_bf16): answers of 64 tokens before training took 29.1 s; less 4.1 s for the prompts
# that is 78 ms a token, of which 13 are the weights at CPU_BANDWIDTH. Quantised: taken as LoRA, an assumption. Without
# an adapter three quarters: `generate()` alone, same model and machine, 45.6 and 56.3 ms a token, less the same 13.
CPU_PASS_S = dict.fromkeys(ADAPTERS, 2.15e-3)
CPU_PASS_WITHOUT_ADAPTER_S = 1.6e-3
CPU_BANDWIDTH = 20e9  # bytes/s for the update: assumption, one channel of DDR4-3200 gives 25.6
LOOPBACK = 1e9  # bytes/s between CPU processes over gloo: assumption
STREAM_SHARE = 0.9  # of the datasheet's bandwidth: about 4.3 of 4.8 TB/s in a device copy (conf/hw/h200.yaml)

# --- links -----------------------------------------------------------------------------------------------------

# GB/s in one direction that collectives reach, as NCCL itself reckons (NVIDIA/nccl, src/graph/topo.h, 2026): per
# NVLink 20, 20, 20.6 and 40.1, times the 6, 12, 18 and 18 links of V100, A100, H100 and B200 (datasheets). Measured:
# 208 on A100s (nccl-tests issue 178), 370 on H100s ("effective", issue 212).
NVLINK_GB_S = {7.0: 120.0, 8.0: 240.0, 9.0: 370.0, 10.0: 720.0}
# Same source: PCIe 3.0 × 16 is 12; a generation doubles it (24 in NCCL's topology of an RTX 4090, issue 307). Volta
# and Turing have PCIe 3.0, Hopper, Blackwell 5.0. Without peer-to-peer data go through the host: twice over the bus.
PCIE_GB_S = {7: 12.0, 8: 24.0, 9: 48.0, 10: 48.0, 12: 48.0}
NETWORK_GB_S = 12.0  # a node's 100 Gbit/s (same file), shared by its GPUs: assumption, rented clusters have more
# DeepSpeed and DDP send while the backward pass computes. Assumption: half of the computing time can hide it.
HIDDEN_SHARE = 0.5
# DeepSpeedCPUAdam, all ranks of a host together: LLaMA-7B on 2 × Xeon 8358 (64 cores), 64 sequences a step, optimiser
# offload against none: 64/1.81 − 64/4.19 = 20 s (ZeRO-2), 64/2.05 − 64/4.45 = 17 s (ZeRO-3) for 6.74e9 parameters
# (gist chenyaofo/d4cd6a20, 2024), transfers included. With ranks bound to cores it is faster: Qwen2.5-3B on
# 128 cores, below 2.4 s a whole step (DeepSpeed pull request 7474).
CPU_ADAM_S_PER_PARAMETER = 2.5e-9

# Bytes of memory traffic per trained parameter and update: each fp32 value of weight, gradient and moments read, and
# all but the gradient written (AdamW 4 + 3), 8-bit moments a quarter of it; clipping reads the gradient once more.
# Muon: as AdamW without the second moment; its products are counted apart (`orthogonalisation_flops`).
UPDATE_BYTES = {
    "adamw": 32, "paged_adamw": 32, "adamw_8bit": 20, "paged_adamw_8bit": 20, "adafactor": 20, "sgd": 16, "muon": 24,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware in base units; the same for every plan on it."""

    on_gpu: bool
    flops: float
    """FLOP/s of one process at the precision of the run: the datasheet's peak, or what a CPU reaches."""
    bandwidth: float
    """Bytes/s of memory that a stream reaches."""
    capability: float
    tflops: float
    link: float
    """Bytes/s one process sends to the others."""
    host_link: float
    """Bytes/s between one GPU and main memory."""
    world_size: int
    num_nodes: int
    notes: tuple[str, ...] = ()


def machine_of(hw: HardwareSpec, precision: str) -> Machine | None:
    """The machine as the arithmetic needs it (`precision` resolved, or tf32); None where a GPU's speed is not known."""
    if hw.accelerator != "cuda":
        flops = CPU_FLOPS.get(precision, CPU_FLOPS["fp32"]) * (hw.num_cpus or 1) / (hw.num_processes or 1)
        note = "CPU speed: per core as measured in docs/benchmarks.md, a third more or less"
        return Machine(False, flops, CPU_BANDWIDTH, 0.0, 0.0, LOOPBACK, LOOPBACK, hw.world_size, hw.num_nodes, (note,))
    if not (hw.tflops_bf16 and hw.bandwidth_gb_s and hw.compute_capability):
        return None
    capability = hw.compute_capability
    share = {"fp32": FP32_SHARE.get(capability, 1 / 8), "tf32": TF32_SHARE}.get(precision, 1.0)
    pcie = PCIE_GB_S.get(int(capability), 24.0)
    link, notes = pcie, []
    if hw.interconnect == "nvlink":
        link = NVLINK_GB_S.get(capability, 240.0)
    elif hw.env.get("NCCL_P2P_DISABLE") == "1" and hw.num_gpus > 1:
        link = pcie / 2
        notes.append("no peer-to-peer: GPUs exchange data through main memory, at half of PCIe's speed")
    if hw.num_nodes > 1:
        link = min(link, NETWORK_GB_S / max(1, hw.num_gpus))
        notes.append("several nodes: 100 Gbit/s between them assumed")
    peak = hw.tflops_bf16
    bandwidth = hw.bandwidth_gb_s * 1e9 * STREAM_SHARE
    sizes = hw.world_size, hw.num_nodes, tuple(notes)
    return Machine(True, peak * 1e12 * share, bandwidth, capability, peak, link * 1e9, pcie * 1e9, *sizes)


@lru_cache(maxsize=1024)
def efficiency(method: str, capability: float, tflops: float, bandwidth: float) -> tuple[float, str]:
    """Share of the peak that a step's matrices reach, and where that figure is from."""
    published = PUBLISHED.get((capability, tflops, "adapter" if method in ADAPTERS else "weights"))
    if published:
        return published
    share = 1 / (1 / BEST_SHARE + BALANCE * tflops * 1e12 * STREAM_SHARE / bandwidth)
    return share * (NO_FLASH if capability < 8 else 1), ASSUMED
