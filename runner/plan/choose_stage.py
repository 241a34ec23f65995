"""Candidates for a request on one machine: ZeRO stage × micro batch × checkpointing, each with memory and speed."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

from runner.errors import Problem, RequestError
from runner.plan.attention_kernels import attention_kernel
from runner.plan.memory import GIB, PROMPT_TOKENS, Job, Memory, floor, memory, setting_of
from runner.plan.model_shape import Shape, shape_for
from runner.plan.simulation import simulated_flops
from runner.plan.step_time import (
    Machine,
    StepTime,
    Work,
    evaluation_time,
    machine_of,
    orthogonalisation_flops,
    step_time,
    work_of,
)
from runner.plan.trainable import Precision, Training, training_of
from runner.plan.zero_config import ResolvedConfig, refusal, resolved_config
from runner.spec import HardwareSpec, Method, Peft, RunSpec
from runner.spec.adapters import TYPES

Templates = Mapping[str, Mapping[str, object]]
"""The DeepSpeed JSONs by stage, as they are in deepspeed_configs/."""

STAGES = ("none", "zero1", "zero2", "zero3")
"""What `deepspeed=auto` chooses from. Offloading costs a factor in time: it has to be asked for."""
OFFLOADING = ("zero2_offload", "zero3_offload")
ORDER = (*STAGES, *OFFLOADING)
NOISE = 1.05
"""A higher stage has to be 5% faster to be taken: the speeds are estimates (docs/planning.md)."""
MAX_MICRO_BATCH = 8
"""Larger ones gain little speed on any GPU once a sequence has 512 tokens."""
CHECKPOINTING = (0, 4, 2, 1)
"""What `train.gradient_checkpointing=auto` chooses from on a GPU, the one that keeps most first: no layer, every
fourth, every second, all. What lies between two of them is as near as the estimates of speed are."""


@dataclass(frozen=True, slots=True)
class StageChoice:
    """One stage and micro batch."""

    stage: str
    micro_batch: int
    accumulation: int
    checkpointing: int
    """n where every n-th layer is computed again in the backward pass: 1 for all, 0 for none."""
    batch: int
    """Global batch, as rounded."""
    memory: Memory
    capacity: float | None
    """Bytes of one GPU (of the machine, on a CPU); None where the hardware does not say."""
    step: StepTime | None
    """None where the hardware's speed is not known."""
    config: ResolvedConfig | None

    @property
    def fits(self) -> bool:
        """The expected peak is within the memory."""
        return self.capacity is None or self.memory.expected <= self.capacity

    @property
    def comfortable(self) -> bool:
        """Even the high estimate is."""
        return self.capacity is None or self.memory.high <= self.capacity

    @property
    def seconds_per_sequence(self) -> float:
        """Seconds per sequence of the whole machine; infinite if the speed is unknown."""
        return self.step.total_s / self.batch if self.step else float("inf")


class StageSearch:
    """Makes options; what they share between runs is worked out once."""

    def __init__(self, templates: Templates) -> None:
        self.templates = templates
        self._training: dict[Any, tuple[Method, Training]] = {}
        self._machines: dict[Any, tuple[HardwareSpec, Machine | None]] = {}
        self._work: dict[Any, tuple[Training, Work]] = {}
        self._configs: dict[Any, ResolvedConfig] = {}

    def training(self, shape: Shape, method: Method, precision: Precision, *, deepspeed: bool) -> Training:
        """`training_of`, remembered by identity: pydantic models with lists cannot be hashed."""
        key = (shape, id(method), precision, deepspeed)
        if key not in self._training:
            made = training_of(shape, method, precision, deepspeed=deepspeed)
            if shape.simulation is not None:
                made = shape.simulation.applied(made, method, precision, deepspeed=deepspeed)
            self._training[key] = (method, made)
        return self._training[key][1]

    def machine(self, hw: HardwareSpec, precision: str) -> Machine | None:
        """`machine_of`, remembered."""
        key = (id(hw), precision)
        if key not in self._machines:
            self._machines[key] = (hw, machine_of(hw, precision))
        return self._machines[key][1]

    def work(self, training: Training, job: Job, micro: int) -> Work:
        """`work_of` for micro batches of so many sequences, remembered."""
        span = attention_span(job, micro)
        key = (id(training), job.seq, job.checkpointing, job.passes, span)
        if key not in self._work:
            work = work_of(
                training.shape,
                job.seq,
                method=training.method,
                trained_layers=training.trained_layers,
                backward_layers=training.backward_layers,
                checkpointing=job.checkpointing,
                trained_parameters=training.trainable,
                adapter_parameters=training.adapter_weights,
                weight_bytes=training.frozen_bytes + training.trained_bytes,
                gradient_bytes=training.width,
                quiet=job.passes.quiet,
                span=span,
                update_flops=orthogonalisation_flops(training.matrices),
            )
            if training.shape.simulation is not None:
                work = replace(work, flops_per_token=_simulated_per_token(training, job))
            self._work[key] = (training, work)
        return self._work[key][1]

    def config(self, spec: RunSpec, stage: str, micro: int, accumulation: int, hidden: int) -> ResolvedConfig:
        """The resolved DeepSpeed JSON, remembered."""
        train = spec.train
        key = (stage, micro, accumulation, spec.hw.world_size, hidden, train.precision, train.max_grad_norm)
        if key not in self._configs:
            assert train.precision != "auto"
            self._configs[key] = resolved_config(
                self.templates[stage],
                micro_batch=micro,
                accumulation=accumulation,
                world=spec.hw.world_size,
                hidden_size=hidden,
                precision=train.precision,
                max_grad_norm=train.max_grad_norm,
                nvme_path=spec.deepspeed.nvme_path,
            )
        return self._configs[key]

    def choices(self, spec: RunSpec, stages: tuple[str, ...] | None = None) -> Iterator[StageChoice]:
        """Every micro batch of a run whose precision and hardware are resolved, best rounding first within a stage,
        with the checkpointing that needs least."""
        shape = shape_for(spec)
        for stage in stages or allowed_stages(spec):
            for micro, accumulation in batches(spec):
                yield self.choice(spec, shape, stage, micro, accumulation, checkpointings(spec)[-1])

    def choice(
        self, spec: RunSpec, shape: Shape, stage: str, micro: int, accumulation: int, checkpointing: int
    ) -> StageChoice:
        """One of them."""
        training = self._training_of(spec, shape, stage)
        job = job_of(spec, checkpointing)
        config = self.config(spec, stage, micro, accumulation, shape.hidden_size) if stage != "none" else None
        held = memory(training, job, micro, accumulation, stage, config)
        step = self.step(spec, shape, stage, micro, accumulation, checkpointing)
        capacity = None if spec.hw.memory_gib is None else spec.hw.memory_gib * GIB
        total = micro * accumulation * spec.hw.world_size
        return StageChoice(stage, micro, accumulation, checkpointing, total, held, capacity, step, config)

    def step(
        self, spec: RunSpec, shape: Shape, stage: str, micro: int, accumulation: int, checkpointing: int
    ) -> StepTime | None:
        """Its time; None where the hardware's speed is not known."""
        machine = self.machine(spec.hw, spec.train.arithmetic)
        if machine is None:
            return None
        job = job_of(spec, checkpointing)
        work = self.work(self._training_of(spec, shape, stage), job, micro)
        step = step_time(
            work,
            machine,
            micro_batch=micro * job.passes.sequences,
            accumulation=accumulation,
            stage=stage,  # type: ignore[arg-type]  # a stage's name
            optimizer=spec.train.optimizer,
        )
        return with_answers(step, work, machine, job, micro * accumulation)

    def _training_of(self, spec: RunSpec, shape: Shape, stage: str) -> Training:
        precision = spec.train.precision
        assert precision != "auto"
        return self.training(shape, spec.method, precision, deepspeed=stage != "none")

    def best(self, spec: RunSpec) -> StageChoice:
        """The fastest that fits with headroom; else the fastest that fits; else the one that misses by least.

        A stage whose fastest would not be taken is not worked out.
        """
        shape, stages = shape_for(spec), allowed_stages(spec)
        pair, level = batches(spec)[0], checkpointings(spec)[0]
        hopeless = [stage for stage in stages if self._hopeless(spec, shape, stage, pair)]
        chosen: list[StageChoice] = []
        taken: StageChoice | None = None
        for stage in stages:
            limit = taken.seconds_per_sequence / NOISE if taken else math.inf
            if stage in hopeless or (taken and self._seconds(spec, shape, stage, pair, level) >= limit):
                continue
            option = self._in_stage(spec, shape, stage)
            if option.comfortable and (not taken or option.seconds_per_sequence < limit):
                taken = option
            chosen.append(option)
        if taken:
            return taken
        smallest, least = min(batches(spec)), checkpointings(spec)[-1]
        chosen += [self.choice(spec, shape, stage, *smallest, least) for stage in hopeless]
        best = min(chosen, key=_rank)
        near = [o for o in chosen if o.fits and o.seconds_per_sequence <= NOISE * best.seconds_per_sequence]
        return min(near or [best], key=lambda o: ORDER.index(o.stage))

    def _in_stage(self, spec: RunSpec, shape: Shape, stage: str) -> StageChoice:
        """Of the best rounding the fastest with headroom; without headroom, what needs least.

        That is the safest: the largest micro batch would fill the card.
        """
        pairs, levels = batches(spec), checkpointings(spec)
        smallest = min(pairs)

        @cache
        def option(pair: tuple[int, int], level: int) -> StageChoice:
            return self.choice(spec, shape, stage, *pair, level)

        if (first := option(pairs[0], levels[0])).comfortable:
            return first
        if option(smallest, levels[0]).comfortable or (least := option(smallest, levels[-1])).comfortable:
            return self._fastest(spec, shape, stage, option)
        needs = least.memory.expected
        if least.memory.peak_phase not in ("forward", "backward"):  # which no micro batch changes, while it is the peak
            alike = [pair for pair in pairs if _off(spec, pair) == _off(spec, pairs[0])]
            at = bisect_left(alike, True, key=lambda pair: option(pair, levels[-1]).memory.expected <= needs)
            return option(alike[at], levels[-1]) if at < len(alike) else least
        # larger ones need more, unless they keep no gradients from step to step
        alone = [option(pair, levels[-1]) for pair in pairs if pair[1] == 1 < least.accumulation]
        return next((o for o in alone if o.comfortable), min([least, *alone], key=lambda o: o.memory.expected))

    def _fastest(
        self, spec: RunSpec, shape: Shape, stage: str, option: Callable[[tuple[int, int], int], StageChoice]
    ) -> StageChoice:
        """The fastest with headroom, which the smallest micro batch with the checkpointing that needs least has.

        A larger micro batch needs more, and so does recomputing fewer layers; both are faster. So few are worked out:
        the bounds of what has headroom are found by halving, and what cannot be faster than one that has is left out.
        """
        levels = checkpointings(spec)
        seconds = partial(self._seconds, spec, shape, stage)
        for _, some in groupby(batches(spec), key=partial(_off, spec)):
            pairs = list(some)  # the largest micro batch first
            best: StageChoice | None = None
            start = 0
            if not option(pairs[-1], levels[0]).comfortable:
                start = bisect_left(levels, True, 1, key=lambda level: option(pairs[-1], level).comfortable)
            for level in levels[start:]:
                if best:
                    limit = best.seconds_per_sequence
                    pairs = [pair for pair in pairs if pair[0] > best.micro_batch and seconds(pair, level) < limit]
                at = bisect_left(pairs, True, key=lambda pair: option(pair, level).comfortable)
                # one that keeps no gradients from step to step may need less than smaller ones
                if pairs and pairs[0][1] == 1 and option(pairs[0], level).comfortable:
                    at = 0
                if at < len(pairs):
                    best = option(pairs[at], level)
            if best:
                return best
        raise AssertionError("unreachable")

    def _seconds(self, spec: RunSpec, shape: Shape, stage: str, pair: tuple[int, int], level: int) -> float:
        """Of a sequence, as `StageChoice.seconds_per_sequence`."""
        step = self.step(spec, shape, stage, *pair, level)
        return step.total_s / (math.prod(pair) * spec.hw.world_size) if step else math.inf

    def _hopeless(self, spec: RunSpec, shape: Shape, stage: str, pair: tuple[int, int]) -> bool:
        """What is always there is more than there is room for."""
        if spec.hw.memory_gib is None:
            return False
        training, job = self._training_of(spec, shape, stage), job_of(spec, checkpointings(spec)[-1])
        config = self.config(spec, stage, *pair, shape.hidden_size) if stage != "none" else None
        return floor(training, job, stage, config) > spec.hw.memory_gib * GIB


def _rank(option: StageChoice) -> tuple[bool, float, int]:
    """Of those without headroom."""
    speed = round(option.seconds_per_sequence, 4) if option.fits else option.memory.expected
    return not option.fits, speed, ORDER.index(option.stage)


def allowed_stages(spec: RunSpec) -> tuple[str, ...]:
    """The stage that was named, or all that `auto` may take; RequestError for one that cannot work."""
    named = spec.deepspeed.name
    stages = STAGES if named == "auto" else (named,)
    if named == "auto" and spec.hw.world_size == 1:
        stages = ("none",)
    problems = {stage: _refusal(spec, stage) for stage in stages}
    allowed = tuple(stage for stage, problem in problems.items() if problem is None)
    if not allowed:
        raise RequestError(*dict.fromkeys(problem for problem in problems.values() if problem))
    return allowed


def _refusal(spec: RunSpec, stage: str) -> Problem | None:
    master = getattr(spec.method, "master_weights", True)
    return refusal(stage, spec.method.kind, spec.train.optimizer, spec.train.precision, master)


def _off(spec: RunSpec, pair: tuple[int, int]) -> int:
    """How many sequences the global batch is off with this micro batch and accumulation."""
    return abs(math.prod(pair) * spec.hw.world_size - spec.train.batch_size)


def batches(spec: RunSpec) -> list[tuple[int, int]]:
    """Micro batch and accumulation: nearest to the global batch first, then the largest micro batch."""
    world, wanted = spec.hw.world_size, spec.train.batch_size
    micro, accumulation = spec.train.micro_batch_size, spec.train.accumulation_steps
    least = spec.objective.least_micro_batch
    micros = [micro] if isinstance(micro, int) else range(max(least, min(MAX_MICRO_BATCH, wanted)), least - 1, -1)
    pairs = [
        (m, accumulation if isinstance(accumulation, int) else max(1, round(wanted / (world * m)))) for m in micros
    ]
    return sorted(pairs, key=lambda pair: (_off(spec, pair), -pair[0]))


def checkpointings(spec: RunSpec) -> tuple[int, ...]:
    """What is typed, or all that `auto` may take, the one that keeps most first.

    Where nobody knows that it fits without, `auto` checkpoints every layer.
    """
    if spec.train.gradient_checkpointing != "auto":
        return (spec.train.checkpoint_every,)
    return CHECKPOINTING if spec.hw.memory_gib is not None and is_counted(spec.method) else (1,)


def is_counted(method: Method) -> bool:
    """The plan knows what the method keeps and builds beside its parameters in a step.

    Types of PEFT's differ in that: a run with HRA was planned at 1.8 GiB and took 4.9.
    """
    return not isinstance(method, Peft) or method.peft_type in TYPES


def job_of(spec: RunSpec, checkpointing: int | None = None) -> Job:
    """The run in the memory arithmetic's own terms; precision and hardware must be resolved, and checkpointing, where
    it is not said."""
    train, hw = spec.train, spec.hw
    assert train.precision != "auto"
    return Job(
        seq=train.max_length,
        precision=train.precision,
        checkpointing=train.checkpoint_every if checkpointing is None else checkpointing,
        attention=attention_kernel(spec),
        optimizer=train.optimizer,
        on_gpu=hw.accelerator == "cuda",
        world=hw.world_size,
        eval_batch=spec.eval.batch_size if asks_prompts(spec) else 0,
        eval_new_tokens=spec.eval.max_new_tokens,
        passes=spec.objective.passes(spec.method.adapts),
        packed=train.packing,
    )


def _simulated_per_token(training: Training, job: Job) -> float:
    """Operations for a token of a step, as `flops_per_token`: those of a micro batch of one."""
    setting = setting_of(training, job, 1)
    forward, whole = simulated_flops(training.shape, setting, training.trains)
    return (whole + job.passes.quiet * forward) / (setting.b * setting.s)


def attention_span(job: Job, micro: int) -> float | None:
    """Tokens that attention on a GPU spans, as `flops_per_token` has it; None: the sequence, an upper bound.

    A kernel with a mask computes all pairs of a row, the masked ones too, and a packed micro batch is one row.
    """
    if not job.on_gpu or job.attention not in ("sdpa", "eager"):
        return None
    return 2.0 * job.seq * (micro * job.passes.sequences if job.packed else 1)


def asks_prompts(spec: RunSpec) -> bool:
    """Held-out prompts are answered before and after training: there are right answers to compare with."""
    return bool(spec.eval.num_prompts) and spec.objective.asks_prompts


def with_answers(step: StepTime, work: Work, machine: Machine, job: Job, sequences: int) -> StepTime:
    """The step with the generation of `sequences` answers on every process before it, all at once."""
    new = job.passes.new_tokens
    if not new:
        return step
    seconds = evaluation_time(
        work, machine, tokens=0.0, num_prompts=sequences * machine.world_size, batch_size=sequences, new_tokens=new,
        prompt_tokens=min(job.seq - new, PROMPT_TOKENS),
    )  # fmt: skip
    return replace(step, compute_s=step.compute_s + seconds, total_s=step.total_s + seconds)
