"""Types of the JSON files of a run. docs/reference.md is generated from the sentence under each key."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

State = Literal[
    "created", "loading", "evaluating", "training", "saving", "done", "failed", "interrupted", "rewinding", "killed"
]
"""`killed` is never written: a list of runs shows it for a run whose process has disappeared."""

ENDED = ("done", "failed", "interrupted", "killed")
"""States that a run does not leave by itself."""


class OutOfMemory(TypedDict, total=False):
    """`oom` in `status.json`: the state of memory when an allocation failed."""

    kind: Literal["cuda", "cpu"]
    """The memory that was short."""
    message: str
    """The allocator's message."""
    phase: str | None
    """`load`, `forward`, `backward`, `step`, `eval`, `save`; `train` where its part is not known."""
    allocated_gib: float | None
    """Memory of tensors, by torch's allocator."""
    reserved_gib: float | None
    """GPU memory reserved by the allocator."""
    resident_gib: float | None
    """Resident main memory of the worker."""
    outside_gib: float | None
    """GPU memory in use that is not the allocator's."""
    total_gib: float | None
    """Memory of the GPU."""
    free_gib: float | None
    """Free on the GPU."""


class Cost(TypedDict):
    """`cost` of a run in a pod, in `status.json` and `summary.json`."""

    usd: float
    """Cost of all pods of the run, disks included."""
    predicted_usd: float | None
    """Planned cost."""
    hours: float
    """Time on the last pod."""
    predicted_hours: float | None
    """Planned time."""
    usd_per_hour: float
    """Price of the last pod."""
    gpu: str | None
    """The provider's id of the GPU type."""
    cloud: str | None
    """Cloud type: secure or community."""
    pod_id: str
    """Id of the last pod."""


class Subject(TypedDict, total=False):
    """Facts that a list of runs shows without reading `spec.json`."""

    model: str
    """Name of the model."""
    method: str
    """Name of the method."""
    objective: str
    """Name of the objective."""
    data: str
    """Name of the data set, or the path of a file."""
    learning_rate: float
    """Peak learning rate."""


class StatusFacts(Subject, total=False):
    """Facts of a run beside its state."""

    pid: int | None
    """Process id of the worker; null for a run in a pod."""
    host: str
    """Host name of the machine, or the pod's name."""
    sweep: str | None
    """Id of the sweep that the run is a point of."""
    created: float
    """Creation of the directory (Unix, seconds)."""
    started: float | None
    """Latest start of the worker (Unix, seconds)."""
    spent: float
    """Seconds of work before the latest start."""
    step: int
    """Optimiser steps done when the run ended."""
    num_steps: int
    """Optimiser steps in total."""
    when: str
    """Evaluation in progress: before or after training."""
    rewinds: int
    """Number of rewinds to a checkpoint."""
    exit_code: int | None
    """Exit code of a run that has ended."""
    error: str | None
    """Error message of a failed run."""
    oom: OutOfMemory | None
    """Details of an out-of-memory error; see below."""


class Status(StatusFacts, total=False):
    """`status.json`."""

    run_id: str
    """Name of the directory."""
    state: State
    """Current state; see **States**."""
    born: str | None
    """Boot id and clock tick of the process's start, which identify it when process ids are reused."""
    updated: float
    """Time of this record (Unix, seconds)."""
    cost: Cost
    """Cost of a run in a pod; see below."""


class HeartbeatError(TypedDict):
    """`error` in `logs/rank<k>.json`."""

    what: str
    """Error message."""
    problems: list[dict[str, Any]]
    """Problems with `what`, `source` and `remedy`; empty for an unexpected error."""
    exit_code: int
    """Exit code of the process."""


class Heartbeat(TypedDict, total=False):
    """`logs/rank<k>.json`: the heartbeat of a process."""

    rank: int
    """Global rank."""
    pid: int
    """Process id on its machine."""
    host: str
    """Host name of its machine."""
    state: Literal["alive", "done", "failed", "interrupted"]
    """`alive` until the process reports its end."""
    phase: str
    """Current phase."""
    step: int
    """Optimiser steps done."""
    count: int
    """Number of heartbeats."""
    beat: float
    """Time of the latest heartbeat (Unix, seconds)."""
    ended: float
    """Time of the reported end (Unix, seconds)."""
    born: str | None
    """Boot id and clock tick of the process's start."""
    error: HeartbeatError
    """Error of a failed process; see below."""
    agreed: bool
    """True where all processes were interrupted together, after a step."""


class MetricsLine(TypedDict, total=False):
    """A line of `metrics.jsonl`: one optimiser step."""

    step: int
    """Step number, from 1."""
    epoch: float
    """Epochs done."""
    loss: float
    """Training loss of the batch."""
    grad_norm: float
    """Gradient norm before clipping."""
    learning_rate: float
    """Learning rate of the step."""
    tokens_per_second: float
    """Positions computed per second, padding included."""
    effective_tokens_per_second: float
    """Positions that hold a token, per second."""
    step_seconds: float
    """Duration of the step."""
    memory_gib: float
    """Memory allocated on a GPU, resident on a CPU."""
    time: float
    """Time of the line (Unix, seconds)."""
    skipped: bool
    """True where the loss spiked and a micro batch was skipped; `loss` is the measured one."""


class EvalLine(TypedDict, total=False):
    """A line of `evals.jsonl`: the held-out loss after a step."""

    step: int
    """Optimiser steps done."""
    loss: float
    """Held-out loss, mean per token."""
    time: float
    """Time of the line (Unix, seconds)."""


class TrainSummary(TypedDict):
    """`train` in `summary.json`."""

    loss_first: float
    """Loss of the first step."""
    loss_last: float
    """Loss of the last step."""
    steps: int
    """Optimiser steps."""
    examples: int
    """Rows of the training set."""
    tokens: int
    """Tokens trained on."""
    tokens_per_second: float
    """Positions computed per second, padding included."""
    effective_tokens_per_second: float
    """Positions that hold a token, per second."""
    seconds: float
    """Duration of all steps."""
    trainable_parameters: int
    """Parameters that were trained."""
    total_parameters: int
    """Parameters in total, adapters included."""


class EvalSummary(TypedDict):
    """`eval` in `summary.json`."""

    num_prompts: int
    """Number of held-out prompts answered."""
    before: dict[str, Any]
    """`loss` (mean per token, held out), `exact_match` (0 to 1), `num_exact`, `num_prompts`, the objective's own."""
    after: dict[str, Any]
    """The same, after training."""


class Summary(TypedDict, total=False):
    """`summary.json`."""

    run_id: str
    """Name of the directory."""
    state: Literal["done"]
    """Always `done`: other runs have no summary."""
    exit_code: int
    """Always 0."""
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
    """Record below."""
    eval: EvalSummary
    """Record below."""
    seconds: float
    """Duration of the run, over all its starts."""
    peak_memory_gib: float
    """Peak memory: reserved on a GPU, resident on a CPU."""
    model_dir: str
    """Folder of the trained model."""
    plan: dict[str, Any]
    """Predicted against measured, where there is a `plan.json`; see below."""
    cost: Cost
    """Cost of a run in a pod."""


LARGEST = 2**63
"""Above every number of a run: a larger one cannot be computed with."""


def of_type(content: dict[str, Any], record: type) -> dict[str, Any]:
    """The content of a file without the keys of `record` whose value is of another type: a pod, or somebody with an
    editor, wrote it. Keys that `record` does not have stay."""
    hints = _hints(record)
    return {name: value for name, value in content.items() if name not in hints or _is(value, hints[name])}


@cache
def _hints(record: type) -> dict[str, object]:
    return get_type_hints(record)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value parsed from JSON is of a type; a record's own keys are checked where they are there."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # of a later version, perhaps
    if is_typeddict(hint):
        return isinstance(value, dict) and len(of_type(value, hint)) == len(value)
    kind = get_origin(hint) or hint
    if kind in (int, float):
        right = isinstance(value, int | kind) and not isinstance(value, bool)
        return right and not abs(value) >= LARGEST  # NaN is a loss
    return isinstance(value, kind)
