"""The JSON files of a run as records; docs/reference.md describes each key by the sentence under it."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

State = Literal[
    "created", "loading", "evaluating", "training", "saving", "done", "failed", "interrupted", "rewinding", "killed"
]
"""`killed` is written nowhere: it is what a run is whose process has gone without a word."""


class OutOfMemory(TypedDict, total=False):
    """`oom` in `status.json`: what was known when memory ran out."""

    kind: Literal["cuda", "cpu"]
    """The memory that was short."""
    message: str
    """Of the allocator."""
    phase: str | None
    """`load`, `forward`, `backward`, `step`, `eval`, `save`; `train` where its part is not known."""
    allocated_gib: float | None
    """Tensors, by torch's allocator."""
    reserved_gib: float | None
    """What the allocator had taken of the GPU."""
    resident_gib: float | None
    """Main memory of the worker."""
    outside_gib: float | None
    """Taken of the GPU, and not the allocator's."""
    total_gib: float | None
    """Memory of the GPU."""
    free_gib: float | None
    """Free on the GPU."""


class Cost(TypedDict):
    """`cost` of a run in a pod, in `status.json` and `summary.json`."""

    usd: float
    """All pods of the run, disks included."""
    predicted_usd: float | None
    """As planned."""
    hours: float
    """Of the last pod."""
    predicted_hours: float | None
    """As planned."""
    usd_per_hour: float
    """Of the last pod."""
    gpu: str | None
    """RunPod's id of it."""
    cloud: str | None
    """Secure or community."""
    pod_id: str
    """Of the last pod."""


class Subject(TypedDict, total=False):
    """What a list of runs shows of a run: it reads no specs."""

    model: str
    """Name of the model."""
    method: str
    """Name of the method."""
    objective: str
    """Name of the objective."""
    data: str
    """Name of the data set, or the path of a file."""
    learning_rate: float
    """At its highest."""


class StatusFacts(Subject, total=False):
    """What is known of a run beside its state."""

    pid: int | None
    """Of the process at work; null for one in a pod."""
    host: str
    """Name of the machine, or of the pod."""
    sweep: str | None
    """Id of the sweep that the run is a point of."""
    created: float
    """When the directory was made (Unix, seconds)."""
    started: float | None
    """When the worker began, this time (Unix, seconds)."""
    spent: float
    """Seconds of work by its earlier starts."""
    step: int
    """Optimiser steps done, at the end."""
    num_steps: int
    """Optimiser steps to do."""
    when: str
    """Of an evaluation: before or after training."""
    rewinds: int
    """How often it went back to a checkpoint."""
    exit_code: int | None
    """Of the run, once it has ended."""
    error: str | None
    """Why it failed, in words."""
    oom: OutOfMemory | None
    """After an out-of-memory; see below."""


class Status(StatusFacts, total=False):
    """`status.json`."""

    run_id: str
    """Name of the directory."""
    state: State
    """Where the run stands; see **States**."""
    born: str | None
    """Boot and clock tick at which the process began: tells it from a later one with its number."""
    updated: float
    """When this was written (Unix, seconds)."""
    cost: Cost
    """Of a run in a pod; see below."""


class HeartbeatError(TypedDict):
    """Why a process of a run failed."""

    what: str
    """In words."""
    problems: list[dict[str, Any]]
    """Each with what, source and remedy; empty for an error that nobody has put into words."""
    exit_code: int
    """Of the process."""


class Heartbeat(TypedDict, total=False):
    """`logs/rank<k>.json`: a process of a run, by itself."""

    rank: int
    """Its number among all of the run."""
    pid: int
    """On its machine."""
    host: str
    """Name of its machine."""
    state: Literal["alive", "done", "failed", "interrupted"]
    """`alive` until its last word."""
    phase: str
    """What it is at."""
    step: int
    """Optimiser steps done."""
    count: int
    """Signs of life so far."""
    beat: float
    """The last of them (Unix, seconds)."""
    ended: float
    """When it said its last word (Unix, seconds)."""
    born: str | None
    """Boot and clock tick at which the process began."""
    error: HeartbeatError
    """Of one that failed."""
    agreed: bool
    """All processes were interrupted together, after a step."""


class MetricsLine(TypedDict, total=False):
    """A line of `metrics.jsonl`: one optimiser step."""

    step: int
    """From 1."""
    epoch: float
    """Passes over the data so far."""
    loss: float
    """Of the step's batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """Of this step."""
    tokens_per_second: float
    """Every position computed, padding included."""
    effective_tokens_per_second: float
    """Positions that hold a token."""
    step_seconds: float
    """From its first forward to the optimiser."""
    memory_gib: float
    """Allocated on a GPU, resident on a CPU."""
    time: float
    """Unix, seconds."""
    skipped: bool
    """True where the loss jumped and a micro batch was not learned from; `loss` is what was measured."""


class EvalLine(TypedDict, total=False):
    """A line of `evals.jsonl`: the held-out loss after a step."""

    step: int
    """Optimiser steps done."""
    loss: float
    """Mean per token, held out."""
    time: float
    """Unix, seconds."""


class TrainSummary(TypedDict):
    """`train` in `summary.json`."""

    loss_first: float
    """Of the first step."""
    loss_last: float
    """Of the last step."""
    steps: int
    """Optimiser steps."""
    examples: int
    """Rows of the training set."""
    tokens: int
    """Tokens trained on."""
    tokens_per_second: float
    """Every position computed, padding included."""
    effective_tokens_per_second: float
    """Positions that hold a token."""
    seconds: float
    """All steps."""
    trainable_parameters: int
    """Of the model as it trained."""
    total_parameters: int
    """Adapters included."""


class EvalSummary(TypedDict):
    """`eval` in `summary.json`."""

    num_prompts: int
    """Held-out prompts that were answered."""
    before: dict[str, Any]
    """`loss` (mean per token, held out), `exact_match` (0 to 1), `num_exact`, `num_prompts`, the objective's own."""
    after: dict[str, Any]
    """The same, after training."""


class Summary(TypedDict, total=False):
    """`summary.json`."""

    run_id: str
    """Name of the directory."""
    state: Literal["done"]
    """A run that ended otherwise has no summary."""
    exit_code: int
    """0."""
    model: str
    """Name of the model."""
    method: str
    """Name of the method."""
    objective: str
    """Name of the objective."""
    hw: str
    """Name of the hardware."""
    data: str
    """Name of the data set."""
    train: TrainSummary
    """See below."""
    eval: EvalSummary
    """See below."""
    seconds: float
    """The whole run, over all its starts."""
    peak_memory_gib: float
    """Reserved on a GPU, resident on a CPU."""
    model_dir: str
    """Where the model is."""
    plan: dict[str, Any]
    """Predicted against measured, where there is a `plan.json`; see below."""
    cost: Cost
    """Of a run in a pod."""
