"""Duration and cost of a whole run: steps, evaluations, set-up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runner.plan import cost
from runner.plan.choose_stage import StageChoice, StageSearch, asks_prompts, job_of
from runner.plan.memory import PROMPT_TOKENS
from runner.plan.step_time import Machine, Work, evaluation_time
from runner.plan.trainable import Training
from runner.spec import RunSpec

GB = 1e9


@dataclass(frozen=True)
class RunFacts:
    """Facts that the caller looks up."""

    num_steps: int | None = None
    """Optimiser steps; None where the data's size is not known."""
    tokens_total: int | None = None
    """Tokens learnt from, over all epochs."""
    data_tokens: int | None = None
    """Tokens of the data set."""
    shard_bytes: float = 0.0
    """Text of the shards that are still to be made."""
    data_bytes: float = 0.0
    """Of the data set as downloaded, or as sent to a pod."""
    held_out_tokens: float = 0.0
    """Tokens of the held-out rows."""
    prompts: int | None = None
    """Held-out rows that ask something; None where nobody knows."""
    prompt_tokens: float | None = None
    """Mean tokens of such a row."""
    answer_tokens: int | None = None
    """Tokens of its longest expected answer."""
    usd_per_gpu_hour: float | None = None
    price_source: str | None = None
    download: bool = True
    """The weights are not on this machine."""
    notes: tuple[str, ...] = ()


def hours_of(
    spec: RunSpec,
    options: StageSearch,
    training: Training,
    option: StageChoice,
    facts: RunFacts,
    disk: Mapping[str, float],
    checkpoints: float = 0.0,
) -> tuple[cost.Hours | None, cost.Cost | None]:
    """Hours and US$ of a run; None where its steps, the hardware's speed or the price are not known.

    `disk` is what lies on the disk at its end, bytes by term; `checkpoints` the bytes of all that are written.
    """
    machine = options.machine(spec.hw, spec.train.arithmetic)
    if option.step is None or machine is None or facts.num_steps is None:
        return None, None
    rented = spec.where.name != "local"
    weights = 2.0 * training.shape.num_parameters / GB
    hours = cost.hours(
        training_s=facts.num_steps * option.step.total_s,
        evaluation_s=_evaluation(spec, options.work(training, job_of(spec), 1), machine, option.stage, facts),
        download_gb=weights if facts.download else 0.0,
        load_gb=weights,
        save_gb=(disk.get("final_model", 0.0) + checkpoints) / GB,
        rented=rented,
    )
    gpus = max(1, spec.hw.num_gpus) * spec.hw.num_nodes  # a rented CPU machine has a price as a whole
    size = sum(disk.values()) / GB
    return hours, cost.usd(hours, facts.usd_per_gpu_hour, num_gpus=gpus, disk_gb=size if rented else 0.0)


def _evaluation(spec: RunSpec, work: Work, machine: Machine, stage: str, facts: RunFacts) -> float:
    """Seconds of all measurements: before, every so many steps, and after.

    Before training a model answers to the last token that it may; what has learnt the answers ends where they do.
    """
    evaluate, longest = spec.eval, spec.eval.max_new_tokens
    learnt = longest if facts.answer_tokens is None else min(longest, facts.answer_tokens)
    wanted = evaluate.num_prompts if asks_prompts(spec) else 0
    asked = wanted if facts.prompts is None else min(wanted, facts.prompts)
    unknown = min(spec.train.max_length, PROMPT_TOKENS)

    def seconds(prompts: int, new_tokens: int) -> float:
        return evaluation_time(
            work, machine, tokens=facts.held_out_tokens, num_prompts=prompts, new_tokens=new_tokens,
            prompt_tokens=facts.prompt_tokens or unknown, batch_size=evaluate.batch_size,
            stage=stage,  # type: ignore[arg-type]  # a stage's name
        )  # fmt: skip

    before = 0.0
    if spec.objective.passes(spec.method.adapts).reads_before:
        before = evaluation_time(
            work, machine, tokens=facts.data_tokens or 0, num_prompts=0, new_tokens=0, prompt_tokens=0, batch_size=1,
            stage=stage,  # type: ignore[arg-type]  # a stage's name
        )  # fmt: skip
    between = (facts.num_steps or 0) // evaluate.every_steps if evaluate.every_steps else 0
    return before + seconds(asked, longest) + between * seconds(0, 0) + seconds(asked, learnt)
