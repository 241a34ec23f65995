"""Command and environment of the worker processes, for plan and launch alike. Pure."""

from __future__ import annotations

from runner.spec import RunSpec

MEETING_SECONDS = 600
"""How long the nodes wait for one another."""
LOCALHOST = "127.0.0.1"
# glibc gives every freed block of a few MiB back to the kernel and pays page faults to get it again,
# step after step: 285 tokens/s instead of 428 (SmolLM2, LoRA, 512 tokens, two cores, 8 steps). So: let it keep
# blocks up to 32 MiB: 8 MiB gave 264 tokens/s where 32 MiB gave 391 and 4 GiB 378 (256 tokens, 60 steps).
# DeepSpeed, where installed, is imported by accelerate and would announce that it found no GPU.
# torch built for CUDA asks NVML whether there is a GPU, not CUDA, which does not survive the fork of a sweep's runs
# (`torch.cuda.is_available` of 2.13; with no visible GPU, CUDA_VISIBLE_DEVICES="", it asks neither).
CPU_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
# Segments that grow in place: less memory lost between blocks of changing size (PyTorch, CUDA semantics).
GPU_ENV = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def several(spec: RunSpec) -> bool:
    """Return True if torchrun is needed: several processes, or DeepSpeed, which always needs a process group."""
    return spec.hw.world_size > 1 or spec.deepspeed.name not in ("none", "auto")


def arguments(spec: RunSpec, spec_file: str, meeting_id: str, node: str = "0") -> list[str]:
    """Return Python's arguments on machine number `node`.

    With several machines the rendezvous is static: c10d's would number them by the order of their addresses, and must
    recognise the first one by its host name. So rank 0 is where the run was typed, and only one port has to be open:
    torchrun's store on the first machine serves the workers as well.
    """
    worker = ["-m", "runner.train", spec_file]
    if not several(spec):
        return worker
    hw = spec.hw
    # Port 0: a free one. The address by number: a container's own name often does not resolve.
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{LOCALHOST}:0", "--local-addr", LOCALHOST]
    if hw.num_nodes > 1:
        meeting = [
            "--rdzv-backend",
            "static",
            "--rdzv-endpoint",
            hw.rendezvous or "FIRST_NODE:29500",
            "--node-rank",
            node,
        ]
        meeting += ["--rdzv-conf", f"timeout={MEETING_SECONDS}"]
    return [
        "-m", "torch.distributed.run",
        "--nnodes", str(hw.num_nodes), "--nproc-per-node", str(hw.processes_per_node),
        "--rdzv-id", meeting_id, *meeting, "--max-restarts", "0",
        *worker,
    ]  # fmt: skip


def variables(spec: RunSpec, num_cpus: int | None = None) -> dict[str, str]:
    """Return environment variables: defaults, and those that the hardware profile sets in any case.

    OpenMP threads are shared out among the processes of a machine, whose cores are `hw.num_cpus`, else `num_cpus`; they
    are left out where nobody knows.
    """
    hw = spec.hw
    cores = hw.num_cpus or num_cpus
    own = dict(CPU_ENV if hw.accelerator == "cpu" else GPU_ENV)
    if several(spec) and cores:
        own["OMP_NUM_THREADS"] = str(max(1, cores // hw.processes_per_node))
    return {**own, **hw.env}
