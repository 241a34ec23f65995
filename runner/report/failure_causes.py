"""Known causes of failures, recognised by what libraries print, each with a remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A failure that others have met before."""

    pattern: re.Pattern[str]
    what: str
    remedy: str
    in_pod: str | None = None
    """The remedy where it happened in a rented pod, if that is another one."""


def _cause(pattern: str, what: str, remedy: str, in_pod: str | None = None) -> Cause:
    return Cause(re.compile(pattern, re.IGNORECASE), what, remedy, in_pod)


GPU_MEMORY = re.compile(
    # torch, the driver, NCCL ("Cuda failure 2 'out of memory'"), FlashAttention (with the path of its source between),
    # Triton ("Triton Error [CUDA]"), HIP, bitsandbytes
    r"(cuda|hip|nccl|gpu|driver|triton|device)[^\n]{0,240}\bout of (\w+ )?memory|cudaErrorMemoryAllocation|"
    r"(cuda|hip)_?error_?out_?of_?memory|torch\.(cuda\.)?OutOfMemoryError|out of memory at line \d+ in file|"
    # NCCL's last words where the failure was in the line before (its alloc.h)
    r"failed to CUDA (host )?[mc]?alloc\w*( async)? \d+ bytes|"
    # torch's allocator, which asks NVML who else holds memory, where NVML does not answer: MIG, WSL2, containers
    r"NVML_SUCCESS ==[^\n]*INTERNAL ASSERT FAILED[^\n]*CUDACachingAllocator|"
    # the libraries' workspaces; a handle of cuBLAS or cuDNN is made at its first use, and mostly fails for that reason
    r"(CUBLAS|CUBLASLT|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_(STATUS_)?"
    r"((\w+_)?ALLOC(ATION)?_FAILED|NOT_INITIALIZED|INSUFFICIENT_RESOURCES)",
    re.IGNORECASE,
)
"""Messages of libraries when a GPU's memory is full: few of them raise torch's own error."""
PINNED_MEMORY = re.compile(
    r"pin(ned)?[_ ]memory|cudaHost(Alloc|Register)|CUDA host alloc|HOST_ALLOCATION_FAILED", re.IGNORECASE
)
"""In the words above, or in the stack: the memory that was full is the machine's, of which CUDA locks pages."""


# First match wins: the specific before the general.
CAUSES = (
    _cause(
        r"cudaHost(Alloc|Register)[^\n]*out of memory|failed to CUDA host alloc|pin memory thread[\s\S]*out of memory",
        "main memory was full where CUDA locks pages of it",
        "ulimit -l unlimited; give the machine or container more memory, or take a stage without offload",
    ),
    Cause(
        GPU_MEMORY,
        "the GPU's memory was full",
        "write train.micro_batch_size=1 or train.gradient_checkpointing=true, or take method=qlora4 or more GPUs; "
        "nvidia-smi shows what other processes use",
    ),
    _cause(
        r"NVIDIA driver on your system is too old|driver version is insufficient|forward compatibility was attempted|"
        r"cudaErrorInsufficientDriver|nvidia-container-cli: requirement error|unsatisfied condition: cuda",
        "the NVIDIA driver is too old for this build of torch (or for the container's CUDA)",
        "install a newer driver (580 or later for CUDA 13), or a torch built for an older CUDA: pip install torch "
        "--index-url https://download.pytorch.org/whl/cu126 serves drivers since 525; a rented pod: "
        'where.cuda_versions=["13.0"]',
        'take a host with a newer driver: where.cuda_versions=["13.0"]',
    ),
    _cause(
        r"failed to find c compiler|python\.h: no such file|error: command '?(gcc|cc|clang)'? failed",
        "Triton has to compile a kernel, and there is no C compiler (or no header files of Python)",
        "install them (apt-get install gcc python3-dev), or set CC",
    ),
    _cause(
        r"shared memory segment /dev/shm|unable to open shared memory|bus error|insufficient shared memory|shm_open",
        "there is too little shared memory",
        "give the container more: --shm-size=8g or --ipc=host",
    ),
    _cause(
        r"no space left on device|file write failed|disk quota exceeded",
        "the disk is full",
        "make room, or keep less: train.keep_checkpoints=1, a larger train.save_every_steps, another run.output_dir; "
        "then resume",
        "a larger disk, and keep less: where.container_disk_gb=…, where.volume_gb=…, train.keep_checkpoints=1",
    ),
    _cause(
        r"429 Client Error|HTTP (Error|status)[^\n]{0,20}\b429|too many requests",
        "a server got too many requests (429), such as the Hugging Face Hub",
        "export HF_TOKEN=...: with a token more is allowed; wait some minutes, then resume",
    ),
    _cause(
        r"address already in use|EADDRINUSE|failed to bind|server socket has failed to listen",
        "the port of the rendezvous is in use",
        "write another port in hw.rendezvous, or end the run that uses it",
    ),
    _cause(
        r"unable to find nvcc|CUDA_HOME (environment variable )?(is not set|does not exist)|"
        r"nvcc.*(not found|no such file)",
        "a DeepSpeed kernel has to be compiled, and there is no CUDA compiler",
        "install the CUDA toolkit of torch's version and set CUDA_HOME, or take a stage without offload to NVMe",
    ),
    _cause(
        r"ninja is required|command '?\['?ninja|which', 'c\+\+'|which', 'g\+\+'",
        "a DeepSpeed kernel has to be compiled, and ninja or a C++ compiler is missing",
        "install ninja and g++ (apt-get install ninja-build g++)",
    ),
    _cause(
        r"watchdog caught collective operation timeout|collective operation timeout|timed out waiting .* all_?reduce",
        "the GPUs waited for one another until a collective timed out (NCCL)",
        "see the other processes' logs for what held one of them up; with consumer cards try "
        "hw.env.NCCL_P2P_DISABLE=1; "
        "hw.env.NCCL_DEBUG=INFO says which connection is used; python -m runner doctor --bandwidth tests it",
    ),
    _cause(
        r"nccl.*(unhandled system error|unhandled cuda error|remote process exited|invalid usage)|"
        r"nccl(System|UnhandledCuda)Error",
        "NCCL failed",
        "hw.env.NCCL_DEBUG=INFO says why; in a container give it shared memory (--shm-size=8g or --ipc=host); "
        "python -m runner doctor --bandwidth tests the connection",
    ),
    _cause(
        r"rendezvous.*(timed? ?out|timeout)|RendezvousTimeoutError|RendezvousConnectionError|"
        r"failed to connect to .*:\d+",
        "the nodes did not find one another",
        "type python -m runner join runs/<id> on every other node, within 10 minutes; hw.rendezvous=HOST:PORT must be "
        "the first node's address, its port open to the others",
    ),
    _cause(
        r"peer access is not supported|p2p.*(disabled|not supported)",
        "the GPUs cannot reach one another's memory",
        "write hw.env.NCCL_P2P_DISABLE=1",
    ),
    _cause(
        r"no kernel image is available|cuda capability .* is not compatible",
        "torch was not built for this GPU",
        "install a build with kernels for it: a V100 or older needs CUDA 12.6's (pip install torch --index-url "
        "https://download.pytorch.org/whl/cu126), a Blackwell CUDA 12.8's or later",
    ),
    _cause(
        r"device-side assert",
        "an index was out of range on the GPU",
        "check that tokenizer and model belong together",
    ),
    _cause(
        r"uncorrectable ecc error|xid|gpu has fallen off the bus",
        "the GPU has a hardware fault",
        "take another machine, then resume",
    ),
    _cause(
        r"system not yet initialized|cudaErrorSystemNotReady",
        "the service of the machine's NVSwitches does not run",
        "systemctl start nvidia-fabricmanager, as root; it has to be of the driver's version",
        "take another host, then resume",
    ),
    _cause(
        r"lib[\w+-]+\.so[.\d]*: cannot open shared object file",
        "a library is missing that a package was built against, often that of another CUDA",
        "install the build of that package for torch's CUDA (the stack trace names it)",
    ),
    _cause(r"FileNotFoundError|no such file or directory", "a file is missing", "check the paths of the run"),
)  # fmt: skip

SECONDARY = re.compile(
    r"connection (closed|reset) by peer|connection reset|broken pipe|socket closed|remote process exited|"
    r"remote end(point)? (closed|hung)|nccl communicator was aborted|SIGTERM|recv.*failed|Connection refused",
    re.IGNORECASE,
)
"""Messages of a process that lost another one: not the cause."""


def cause_of(words: str) -> Cause | None:
    """The first known cause that the words speak of."""
    return next((cause for cause in CAUSES if cause.pattern.search(words)), None)
