"""Report of an out-of-memory: the phase, the largest term, the plan's figure, and the smallest change that fits."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from runner.errors import Problem, RunFailedError
from runner.machine.processes import Killer
from runner.plan.choose_stage import StageChoice, StageSearch
from runner.plan.memory import GIB
from runner.plan.search import Change, nearest_changes
from runner.report.plan_terms import PHASES, term_of
from runner.report.summary import TRAINING
from runner.resolve import plan_inputs
from runner.rundir import checkpoints
from runner.rundir.directory import PHASE_OF_STATE, RunDir, display_path
from runner.rundir.json_files import MetricsLine, OutOfMemory
from runner.spec import HardwareSpec, RunSpec

HEADROOM = 0.9
"""Share of what was there that a suggested change may need by the plan: an assumption, for fragments and rounding."""
SHOWN = 2
"""Changes that are suggested besides other hardware."""
FIXED = ("process", "processes", "collectives", "allocator_slack")
"""Terms that no choice of the user's makes smaller: never called dominant while there is another."""

_ENDS = {
    "kernel": "ended by SIGKILL: the kernel's out-of-memory killer",
    "probably the kernel": "ended by SIGKILL, probably by the kernel's out-of-memory killer",
    "somebody else": "ended by SIGKILL; the kernel counts no out-of-memory kill, so it came from a person, "
    "a batch system or a program that watches memory",
}
_PHASE_WORDS = {**PHASES, "train": "in training"}


@dataclass(frozen=True)
class Suggestion:
    """A change that would have made the run fit."""

    words: str
    """Words to add on the command line."""
    gib: float
    """Peak with it, by the plan."""


@dataclass(frozen=True)
class OomReport:
    """`autopsy.json`. Sizes in GiB; None where not known."""

    memory: Literal["gpu", "main"]
    """Which memory was short."""
    killer: Killer | None
    """Sender of SIGKILL; None where the worker's own allocator failed."""
    phase: str | None
    """`load`, `forward`, `backward`, `step`, `eval`, `save`, or `train` where the step's part is not known."""
    step: int
    """The last step that was done; 0 before the first."""
    dominant_term: str | None
    """The largest of the phase's, but for what no choice makes smaller."""
    dominant_gib: float | None
    phase_gib: float | None
    """Memory predicted for the phase."""
    predicted_gib: float | None
    """Predicted for the peak of the run."""
    capacity_gib: float | None
    """Capacity that the plan assumed."""
    held_gib: float | None
    """Memory held by the run, as far as known, the CUDA context included."""
    others_gib: float | None
    """Taken of the GPU by other processes."""
    message: str | None
    """The allocator's own words."""
    suggestions: list[Suggestion]
    what: str
    remedy: str


def diagnose_oom(run: RunDir, spec: RunSpec, killer: Killer | None = None) -> OomReport:
    """Diagnose an out-of-memory failure of a worker, by its note in `status.json` or by SIGKILL from `killer`. Needs no
    torch."""
    status, plan = run.status, run.read("plan.json")
    oom: OutOfMemory = status.get("oom") or {}
    on_gpu = spec.hw.accelerator == "cuda"
    lines = list(run.metrics())
    memory: Literal["gpu", "main"] = "gpu" if oom.get("kind") == "cuda" else "main"
    phase = oom.get("phase") or PHASE_OF_STATE.get(str(status.get("state")))
    planned = _planned(plan, phase, in_host_ram=on_gpu and memory == "main")
    held, others = _held(oom, memory, plan, on_gpu, lines)
    found: list[Suggestion] = []
    if plan and not (on_gpu and memory == "main"):
        found = suggestions(spec, planned, held, others)
    facts: dict[str, Any] = {
        "memory": memory,
        "killer": killer,
        "phase": phase,
        "step": int(lines[-1]["step"]) if lines else 0,
        **planned,
        "held_gib": held,
        "others_gib": others,
        "message": oom.get("message"),
    }
    what, remedy = _sentence(facts), _remedy(run, spec, facts, found)
    return OomReport(
        **{k: v for k, v in facts.items() if k != "plan_phase"}, suggestions=found, what=what, remedy=remedy
    )


def write_report(run: RunDir, spec: RunSpec, killer: Killer | None = None) -> RunFailedError:
    """Write `autopsy.json` and the run's `error`; what to show on screen."""
    found = diagnose_oom(run, spec, killer)
    run.write("autopsy.json", asdict(found))
    run.set_status("failed", exit_code=1, error=found.what)
    return RunFailedError(Problem(found.what, None, found.remedy))


def _planned(plan: Mapping[str, Any], phase: str | None, in_host_ram: bool) -> dict[str, Any]:
    """Prediction of the plan for the phase; for main memory, where a run on GPUs ran out of that."""
    names = ("plan_phase", "dominant_term", "dominant_gib", "phase_gib", "predicted_gib", "capacity_gib")
    if not plan:
        return dict.fromkeys(names)
    sums = {name: sum(terms.values()) for name, terms in plan["phases"].items()}
    known = phase if phase in sums else max(TRAINING, key=lambda name: sums[name]) if phase == "train" else None
    terms = plan["host_ram"] if in_host_ram else plan["phases"][known or plan["peak_phase"]]
    changeable = [name for name in terms if name not in FIXED] or list(terms)
    largest = max(changeable, key=lambda name: terms[name])
    predicted = plan["host_ram_gib"] if in_host_ram else plan["peak_gib"]["expected"]
    capacity = None if in_host_ram else plan["capacity_gib"]
    return dict(zip(names, (known, largest, terms[largest], sum(terms.values()), predicted, capacity), strict=True))


def _held(
    oom: OutOfMemory, memory: str, plan: Mapping[str, Any], on_gpu: bool, lines: Sequence[MetricsLine]
) -> tuple[float | None, float | None]:
    """Memory held by the run, and by other processes on its GPU."""
    if memory == "gpu" and oom.get("reserved_gib") is not None:
        terms = plan["phases"][plan["peak_phase"]] if plan else {}
        own = terms.get("process", 0.0) + terms.get("collectives", 0.0)
        others = max(0.0, (oom.get("outside_gib") or 0.0) - own)
        return round(oom["reserved_gib"] + own, 3), round(others, 3)
    if memory == "main" and oom.get("resident_gib") is not None:
        return oom["resident_gib"], None
    # Killed: what the last step's line said, where that is main memory.
    return (lines[-1].get("memory_gib") if lines and not on_gpu else None), None


# ── the smallest change ────────────────────────────────────────────────────────────────────────


def suggestions(
    spec: RunSpec, planned: Mapping[str, Any], held: float | None, others: float | None
) -> list[Suggestion]:
    """Changes with which the run fits what was really there, the smallest first; a machine that holds it, last.

    The plan was wrong, or less was there than it counted on. So a change must, by the plan, need less than
    `HEADROOM` of what was there, of the old prediction, and, in the phase that failed, of that phase's; and other
    hardware counts with `HEADROOM` of its memory, less again by the factor by which the plan was too low.
    """
    options, predicted = plan_inputs.stage_search(spec), planned["predicted_gib"]
    if options is None or predicted is None:
        return []
    there = planned["capacity_gib"]
    if others is not None and there is not None:
        there -= others
    elif held is not None:
        there = min(held, there or held)
    room = HEADROOM * min(predicted, there or predicted)
    too_low = min(1.0, predicted / held) if held else 1.0
    machines = [_with(hw, HEADROOM * too_low) for hw in plan_inputs.hardware() if hw.name != spec.hw.name]
    small = spec.model_copy(update={"hw": spec.hw.model_copy(update={"memory_gib": room})})
    changes = [*_smaller_evaluation(small, planned, options), *nearest_changes(small, options, machines, limit=12)]
    here = [c for c in changes if c.spec.hw.name == spec.hw.name]
    fitting = [s for c in here if (s := _suggestion(c, small, options, planned)) is not None]
    elsewhere = [Suggestion(c.words, _peak(c.option)) for c in changes if c.spec.hw.name != spec.hw.name]
    return [*fitting[:SHOWN], *elsewhere[:1]]


def _with(hw: HardwareSpec, factor: float) -> HardwareSpec:
    return hw.model_copy(update={"memory_gib": None if hw.memory_gib is None else factor * hw.memory_gib})


def _peak(option: StageChoice) -> float:
    return round(option.memory.expected / GIB, 3)


def _smaller_evaluation(spec: RunSpec, planned: Mapping[str, object], options: StageSearch) -> list[Change]:
    """Fewer prompts at once, where that is what failed: it costs nothing but time."""
    if planned["plan_phase"] != "eval" or spec.eval.batch_size == 1:
        return []
    one = spec.model_copy(update={"eval": spec.eval.model_copy(update={"batch_size": 1})})
    return [Change("eval.batch_size=1", options.best(one), one)]


def _suggestion(change: Change, spec: RunSpec, options: StageSearch, planned: Mapping[str, Any]) -> Suggestion | None:
    """The change with the run's own micro batch, if it fits with that; None if it does not help the failed phase."""
    train, own = change.spec.train, spec.train
    kept: dict[str, Any] = {}
    if train.micro_batch_size == "auto":
        kept = {"micro_batch_size": own.micro_batch_size, "accumulation_steps": own.accumulation_steps}
    option = options.best(change.spec.model_copy(update={"train": train.model_copy(update=kept)}))
    option = option if option.fits else change.option
    phase = planned["plan_phase"]
    if phase and sum(option.memory.phases[phase].values()) / GIB > HEADROOM * planned["phase_gib"]:
        return None
    if not option.fits:
        return None
    words = [word for word in change.words.split() if not word.startswith("train.micro_batch_size=")]
    if option.micro_batch != own.micro_batch_size:
        words.append(f"train.micro_batch_size={option.micro_batch}")
    if option.accumulation != own.accumulation_steps:
        words.append(f"train.accumulation_steps={option.accumulation}")
    return Suggestion(" ".join(words), _peak(option)) if words else None


# ── in words ───────────────────────────────────────────────────────────────────────────────────


def _sentence(facts: Mapping[str, Any]) -> str:
    """The failure in one line."""
    short = "out of GPU memory" if facts["memory"] == "gpu" else "out of main memory"
    parts = [_ENDS[facts["killer"]] if facts["killer"] else short]
    when = f"it happened {_PHASE_WORDS[facts['phase']]}" if facts["phase"] else "it is not known in which phase"
    parts.append(when + (f", after step {facts['step']}" if facts["step"] else ""))
    if facts["dominant_term"]:
        term, size, whole = term_of(facts["dominant_term"])[0], facts["dominant_gib"], facts["phase_gib"]
        parts.append(f"the largest part there is {term}, {size:.1f} of {whole:.1f} GiB by the plan")
        capacity = f" of {facts['capacity_gib']:.1f}" if facts["capacity_gib"] else ""
        parts.append(f"planned were {facts['predicted_gib']:.1f}{capacity} GiB at the peak")
    if facts["held_gib"]:
        parts.append(f"{facts['held_gib']:.1f} GiB were {'in use after that step' if facts['killer'] else 'in use'}")
    if facts["others_gib"] and facts["others_gib"] >= 1:
        parts.append(f"other processes held {facts['others_gib']:.1f} GiB of the GPU")
    return "; ".join(parts)


def _remedy(run: RunDir, spec: RunSpec, facts: Mapping[str, object], found: list[Suggestion]) -> str:
    """The remedy, as a command where there is one."""
    again = f"python -m runner {shlex.quote(display_path(run.spec_file))}"
    if facts["memory"] == "main" and spec.hw.accelerator == "cuda":
        offload = "no offloading, " if facts["dominant_term"] == "offloaded" else ""
        return f"take {offload}a machine with more main memory, or fewer examples (data.max_examples)"
    if not facts["predicted_gib"]:
        less = "train.gradient_checkpointing=true train.micro_batch_size=1"
        return f"nothing is known of this model's size; try {again} {less}"
    if not found:
        return "no hardware of the catalogue is large enough; try method=qlora4, or a smaller model"
    start = "it fits with"
    if facts["killer"] == "somebody else":
        on = f"python -m runner resume {shlex.quote(display_path(run.path))}" if checkpoints.complete(run) else again
        start = f"{on}; if memory was the reason, it fits with"
    words = [f"{s.words} ({s.gib:.1f} GiB by the plan)" for s in found]
    example = "" if facts["killer"] == "somebody else" else f"; the first: {again} {found[0].words}"
    return f"{start} {', or '.join(words)}{example}"
