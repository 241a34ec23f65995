"""Everything that can be known of a run before it starts, put together. Pure; the contract is `Plan.as_dict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runner.plan import cost, host_memory, main_memory
from runner.plan.attention_kernels import KERNELS, attention_kernel
from runner.plan.choose_stage import StageChoice, StageSearch, is_counted
from runner.plan.cost import Checkpoints, checkpoints_of
from runner.plan.main_memory import stage_number, weight_bytes
from runner.plan.memory import GIB
from runner.plan.model_shape import shape_for
from runner.plan.run_time import GB, RunFacts, hours_of
from runner.plan.simulation import Facts
from runner.plan.trainable import Training
from runner.plan.worker_environment import arguments, variables
from runner.spec import Peft, RunSpec

SPOT_WARNING_S = 5
"""Between SIGTERM and SIGKILL on RunPod's interruptible machines (docs.runpod.io, spot pods)."""

USUAL_HOST_GIB = 60
"""Main memory that machines with one GPU are rented with at least, mostly: an assumption."""


@dataclass(frozen=True)
class Plan:
    """Memory, time and cost of a run. Sizes in GiB; `docs/planning.md` explains every figure."""

    model: str
    """The choice: `model.name`."""
    method: str
    """The choice: `full`, `lora`, `oft`, …"""
    hw: str
    """The choice: `hw.name`."""
    where: str
    """`local` or `runpod`; `auto` is decided by now."""
    fits: bool
    """Memory of the GPU and of the machine suffice."""
    reasons: list[str]
    """Why the run is refused: what does not fit, or costs or lasts more than allowed."""
    peak_gib: dict[str, float]
    """`low`, `expected`, `high`: GiB on one GPU (of the process, on a CPU) in the phase that needs most."""
    capacity_gib: float | None
    """GiB of one GPU (of the machine, on a CPU); null where the hardware does not say."""
    peak_phase: str
    """The phase that needs most, one of the keys of `phases`."""
    phases: dict[str, dict[str, float]]
    """`load`, `forward`, `backward`, `step`, `eval`, `save`: each with its terms in GiB at its highest moment."""
    host_ram_gib: float
    """Main memory of one node at its peak, GiB."""
    host_ram: dict[str, float]
    """The same by term."""
    disk_gib: float
    """Disk at the end of the run, GiB."""
    disk: dict[str, float]
    """The same by term."""
    zero_stage: str
    """`none`, `zero1`, `zero2`, `zero2_offload`, `zero3` or `zero3_offload`: named, or what `auto` took."""
    deepspeed: dict[str, Any] | None
    """The DeepSpeed JSON without any "auto"; null without DeepSpeed."""
    micro_batch: int
    """Sequences that one process computes at once."""
    accumulation: int
    """Micro batches per optimiser step."""
    batch: int
    """Sequences per optimiser step over all processes, as rounded."""
    max_length: int
    """Tokens of a sequence."""
    data: str
    """Choice of data that the steps are counted for."""
    precision: str
    """Arithmetic: bf16, fp16 or fp32."""
    compiled: bool
    """Decoder layers are compiled (`train.compile`); the time is that without."""
    attention: str
    """`train.attention`, and the kernel that it means on this hardware."""
    checkpointing: int
    """n where every n-th layer is computed again in the backward pass: 1 for all, 0 for none."""
    num_gpus: int
    """GPUs of all nodes; 0 on a CPU."""
    trainable_parameters: int
    """Values that train."""
    num_steps: int | None
    """Optimiser steps; null where the size of the data is not known."""
    tokens_total: int | None
    """Tokens learnt from over all epochs, padding left out; null like `num_steps`."""
    step_seconds: float | None
    """Seconds of one optimiser step; null where the hardware's speed is not known."""
    tokens_per_second: float | None
    """Positions per second over all processes, padding included."""
    hours: float | None
    """From the first second that is paid for to the last; null where steps or speed are not known."""
    hours_parts: dict[str, float] | None
    """`setup`, `download`, `load`, `training`, `evaluation`, `save`, in hours."""
    usd: float | None
    """US$ of the whole run; null without a price or a time, which is not 0."""
    usd_per_hour: float | None
    """US$ per hour of all GPUs together."""
    price_source: str | None
    """Who says so, and when."""
    command: list[str]
    """What starts the worker on the first machine, the run's id for `ID`; on the others `--node-rank` is 1, 2, …"""
    env: dict[str, str]
    """Environment variables that the worker gets; what is set already stays, but for those of `hw.env`."""
    simulated: dict[str, Any] | None = None
    """Of a simulated model: `model_type`, `versions`, `steps`, `seconds`, `attention`, whether all was `cached`."""
    notes: list[str] = field(default_factory=list)
    """What was assumed, rounded or chosen, in sentences."""
    host_capacity_gib: float | None = None
    """Main memory that one node has, GiB (a rented one at least); null where nobody says."""
    host_cpus: int | None = None
    """CPU cores that it has, likewise."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: stable, documented in docs/planning.md."""
        return asdict(self)


def plan_of(spec: RunSpec, options: StageSearch, facts: RunFacts, notes: list[str]) -> Plan:
    """The plan of a resolved run: its stage, micro batch and accumulation are decided."""
    train, hw = spec.train, spec.hw
    assert isinstance(train.micro_batch_size, int) and isinstance(train.accumulation_steps, int)
    assert train.precision != "auto"
    shape = shape_for(spec)
    stage = spec.deepspeed.name
    sizes = train.micro_batch_size, train.accumulation_steps, train.checkpoint_every
    option = options.choice(spec, shape, stage, *sizes)
    training = options.training(shape, spec.method, train.precision, deepspeed=stage != "none")
    ram = main_memory.terms(spec, training, option, facts.data_tokens or 0)
    one = sum(host_memory.checkpoint(weight_bytes(spec, training), stage_number(stage)).values())
    step_s = option.step.total_s if option.step else None
    kept = checkpoints_of(train, seconds=one / GB / cost.SAVE_GB_S, step_seconds=step_s, num_steps=facts.num_steps)
    disk = _disk(spec, training, stage, facts, kept.at_once)
    hours, price = hours_of(spec, options, training, option, facts, disk, (kept.written or 1) * one)
    seen = shape.simulation.facts() if shape.simulation else None
    said = [*_simulated(seen), *notes, *facts.notes, *(option.step.notes if option.step else ())]
    if spec.is_rented:
        unknown = _unknown(spec, hours.total if hours else None, price)
        said += [f"{what} is not known; the pod saves a checkpoint and ends at that limit" for what in unknown]
    reasons = [*_short_of_memory(option, ram, spec), *_too_much(spec, hours.total if hours else None, price)]
    if _unsure(ram, spec):
        said.append(f"what main memory {hw.name} has is not known here (hw.host_memory_gib=…)")
    if option.memory.host and stage == "none":
        said.append(
            f"paged: the optimiser's {option.memory.host / GIB:.1f} GiB move to main memory while the GPU is full, and "
            "every step waits for them"
        )
    if option.fits and not option.comfortable and option.capacity:
        high, there = option.memory.high / GIB, option.capacity / GIB
        said.append(f"tight: with a fragmented allocator it may need {high:.1f} of {there:.1f} GiB")
    said += _uncounted(spec)
    said += _of_checkpoints(spec, kept, one / GB / cost.SAVE_GB_S, step_s or 0.0)
    positions = option.batch * train.max_length * spec.objective.passes(spec.method.adapts).sequences
    return Plan(
        model=spec.model.name,
        method=spec.method.label,
        hw=hw.name,
        where=spec.where.name,
        fits=not _short_of_memory(option, ram, spec),
        reasons=reasons,
        peak_gib={k: round(getattr(option.memory, k) / GIB, 3) for k in ("low", "expected", "high")},
        capacity_gib=hw.memory_gib,
        peak_phase=option.memory.peak_phase,
        phases={name: _gib(terms) for name, terms in option.memory.phases.items()},
        host_ram_gib=round(sum(ram.values()) / GIB, 3),
        host_ram=_gib(ram),
        host_capacity_gib=main_memory.there(spec),
        host_cpus=hw.cpus(rented=spec.is_rented),
        disk_gib=round(sum(disk.values()) / GIB, 3),
        disk=_gib(disk),
        zero_stage=stage,
        deepspeed=dict(option.config) if option.config else None,
        micro_batch=option.micro_batch,
        accumulation=option.accumulation,
        batch=option.batch,
        max_length=train.max_length,
        data=spec.data.name,
        precision=train.arithmetic,
        compiled=train.compile is True,
        attention=f"{train.attention}: {KERNELS[attention_kernel(spec)]}",
        checkpointing=option.checkpointing,
        num_gpus=hw.num_gpus * hw.num_nodes,
        trainable_parameters=training.trainable,
        num_steps=facts.num_steps,
        tokens_total=facts.tokens_total,
        step_seconds=round(option.step.total_s, 4) if option.step else None,
        tokens_per_second=round(positions / option.step.total_s, 1) if option.step else None,
        hours=round(hours.total, 4) if hours else None,
        hours_parts={k: round(v, 4) for k, v in asdict(hours).items()} if hours else None,
        usd=round(price.total_usd, 2) if price else None,
        usd_per_hour=price.usd_per_hour if price else None,
        price_source=facts.price_source if price else None,
        command=["python", *arguments(spec, "runs/ID/spec.json", "ID-0")],
        env=variables(spec),
        simulated=asdict(seen) if seen else None,
        notes=list(dict.fromkeys(said)),
    )


def _simulated(seen: Facts | None) -> Iterator[str]:
    """That memory and operations are no arithmetic, and how long they took."""
    if seen:
        when = "kept from before" if seen.cached else f"in {seen.seconds:.0f} s"
        versions = ", ".join(f"{name} {version}" for name, version in seen.versions.items())
        yield (
            f"memory and operations of {seen.model_type} are simulated, not calculated: {seen.steps} steps on tensors "
            f"without values, {when} ({versions})"
        )
        if seen.attention:
            yield f"the code of {seen.model_type} takes no kernel without a mask: counted is {seen.attention} attention"


def _of_checkpoints(spec: RunSpec, kept: Checkpoints, seconds: float, step_s: float) -> Iterator[str]:
    """How often one is written, where that is not what was asked for, and whether a spot machine waits for one."""
    asked = spec.train.save_every_minutes
    if kept.minutes and asked and kept.minutes > asked and kept.written != 1:
        yield (
            f"writing a checkpoint takes about {seconds:.0f} s: one comes every {kept.minutes:.0f} minutes, not every "
            f"{asked:g}"
        )
    if step_s + seconds > SPOT_WARNING_S and spec.hw.usd_per_hour is not None:
        rest = "keep some with train.save_every_minutes" if kept.written == 1 else "the one before counts then"
        yield (
            f"finishing a step and writing a checkpoint take up to {step_s + seconds:.0f} s, and a spot machine gives "
            f"{SPOT_WARNING_S}: {rest}"
        )


def _unsure(ram: Mapping[str, float], spec: RunSpec) -> bool:
    """More main memory is needed than every rented machine has, and what this one has is not known."""
    return (
        spec.hw.accelerator == "cuda" and main_memory.there(spec) is None and sum(ram.values()) > USUAL_HOST_GIB * GIB
    )


def _uncounted(spec: RunSpec) -> Iterator[str]:
    """What the memory leaves out."""
    method = spec.method
    if isinstance(method, Peft) and not is_counted(method):
        yield (
            f"memory is a lower bound: what {method.peft_type} keeps and builds beside its parameters in a step is not "
            "known; train.max_steps=2 measures it (peak_memory_gib in summary.json)"
        )


def _gib(terms: Mapping[str, float]) -> dict[str, float]:
    return {name: round(size / GIB, 3) for name, size in terms.items() if size}


def _disk(spec: RunSpec, training: Training, stage: str, facts: RunFacts, checkpoints: int) -> dict[str, float]:
    source = "package" if spec.model.package else "hub" if facts.download else "folder"
    return host_memory.disk(
        weight_bytes(spec, training),
        stage_number(stage),
        source=source,  # type: ignore[arg-type]  # one of those words
        checkpoints=checkpoints,
        data_tokens=(facts.data_tokens or 0) + round(facts.held_out_tokens),
        shards=facts.shard_bytes,
        data=facts.data_bytes,
    )


def _short_of_memory(option: StageChoice, ram: Mapping[str, float], spec: RunSpec) -> list[str]:
    reasons, hw = [], spec.hw
    if not option.fits and option.capacity:
        what = f"each {hw.gpu or 'GPU'} has" if hw.accelerator == "cuda" else "this machine has"
        peak, phase = option.memory.expected / GIB, option.memory.peak_phase
        terms = option.memory.phases[phase]
        largest = max(terms, key=lambda name: terms[name])
        reasons.append(
            f"needs {peak:.1f} GiB at its peak ({_PHASE[phase]}), most of it {_named(largest)} "
            f"({terms[largest] / GIB:.1f} GiB); {what} {option.capacity / GIB:.1f} GiB"
        )
    if lacking := main_memory.lacking(spec, ram):
        more = "" if hw.host_memory_gib else " (hw.host_memory_gib=… if the host has more)"
        reasons.append(lacking + more)
    return reasons


def _named(term: str) -> str:
    return {"optimizer": "optimiser states"}.get(term, term.replace("_", " "))


_PHASE = {
    "load": "while loading", "forward": "in the forward pass", "backward": "in the backward pass",
    "step": "in the optimiser step", "eval": "in evaluation", "save": "while saving",
}  # fmt: skip


def _too_much(spec: RunSpec, hours: float | None, price: cost.Cost | None) -> list[str]:
    """Limits that the plan is above, or that nobody can hold it to: on a pod an agent holds the run to them."""
    place = spec.where
    reasons = [] if spec.is_rented else [f"{what} is not known" for what in _unknown(spec, hours, price)]
    if place.max_hours is not None and hours is not None and hours > place.max_hours:
        reasons.append(f"takes {hours:.2f} hours, more than where.max_hours={place.max_hours:g}")
    if place.max_usd is not None and price is not None and price.total_usd > place.max_usd:
        reasons.append(f"costs ${price.total_usd:.2f}, more than where.max_usd={place.max_usd:g}")
    return reasons


def _unknown(spec: RunSpec, hours: float | None, price: cost.Cost | None) -> Iterator[str]:
    """Limits with nothing to compare them with."""
    if spec.where.max_hours is not None and hours is None:
        yield f"where.max_hours={spec.where.max_hours:g}: how long the run takes"
    if spec.where.max_usd is not None and price is None:
        yield f"where.max_usd={spec.where.max_usd:g}: what the run costs"
