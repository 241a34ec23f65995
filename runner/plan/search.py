"""Search over hardware, methods and models: every combination planned, ranked by cost or time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from runner.errors import RunnerError
from runner.plan.choose_stage import StageChoice, StageSearch
from runner.plan.hardware_defaults import settled
from runner.plan.memory import GIB
from runner.plan.nearest_fit import nearest, on
from runner.spec import HardwareSpec, Method, ModelSpec, RunSpec

MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """One combination with its best stage and micro batch."""

    model: str
    method: str
    hw: str
    num_gpus: int
    zero_stage: str
    micro_batch: int
    accumulation: int
    fits: bool
    peak_gib: float
    capacity_gib: float | None
    tokens_per_second: float | None
    usd_per_million_tokens: float | None
    """Of training alone, at the price of the hardware's file; None where there is no price."""
    hours: float | None
    """Of training, for as many sequences as the run would take; None where the data's size is not known."""
    usd: float | None
    note: str
    """What makes it fit, where it does not."""


def combinations(
    spec: RunSpec, models: Iterable[ModelSpec], methods: Iterable[Method], hardware: Iterable[HardwareSpec]
) -> Iterator[RunSpec]:
    """The run, with every model, method and hardware in turn; the sequence is cut to the model's context."""
    methods, hardware = list(methods), list(hardware)
    for model in models:
        length = min(spec.train.max_length, model.context_length or spec.train.max_length)
        train = spec.train.model_copy(update={"max_length": length})
        for method in methods:
            base = spec.model_copy(update={"model": model, "method": method, "train": train})
            for hw in hardware:
                yield on(base, hw)


def fit(
    specs: Iterable[RunSpec], options: StageSearch, *, sequences: int | None = None, advice: bool = True
) -> list[Row]:
    """One row per run."""
    rows = []
    for spec in specs:
        try:
            option = options.best(settled(spec))
        except RunnerError as error:  # a stage that this method cannot have
            rows.append(_refused(spec, str(error)))
            continue
        note = "" if option.fits or not advice else _advice(spec, options)
        rows.append(_row(spec, option, sequences, note))
    return rows


def ranked(rows: Iterable[Row], by: str) -> list[Row]:
    """Those that fit first, cheapest (`by="usd"`) or fastest (`by="time"`) first."""
    return sorted(rows, key=lambda row: _order(row, by))


def _order(row: Row, by: str) -> tuple[bool, float, float]:
    time = 1 / row.tokens_per_second if row.tokens_per_second else float("inf")
    usd = row.usd_per_million_tokens if row.usd_per_million_tokens is not None else float("inf")
    first, second = (usd, time) if by == "usd" else (time, usd)
    return not row.fits, (first if row.fits else row.peak_gib), second


def _row(spec: RunSpec, option: StageChoice, sequences: int | None, note: str) -> Row:
    hw, gpus = spec.hw, spec.hw.num_gpus * spec.hw.num_nodes
    seconds = option.seconds_per_sequence
    known = option.step is not None
    per_hour = None if hw.usd_per_hour is None or hw.accelerator == "cpu" else hw.usd_per_hour * gpus
    hours = sequences * seconds / 3600 if sequences and known else None
    per_million = None
    if known and per_hour is not None:
        per_million = seconds / spec.train.max_length * MILLION / 3600 * per_hour
    return Row(
        model=spec.model.name,
        method=spec.method.name,
        hw=hw.name,
        num_gpus=gpus,
        zero_stage=option.stage,
        micro_batch=option.micro_batch,
        accumulation=option.accumulation,
        fits=option.fits,
        peak_gib=round(option.memory.expected / GIB, 1),
        capacity_gib=hw.memory_gib,
        tokens_per_second=round(spec.train.max_length / seconds) if known else None,
        usd_per_million_tokens=round(per_million, 3) if per_million is not None else None,
        hours=round(hours, 2) if hours is not None else None,
        usd=round(hours * per_hour, 2) if hours is not None and per_hour is not None else None,
        note=note,
    )


def _refused(spec: RunSpec, why: str) -> Row:
    hw = spec.hw
    gpus = hw.num_gpus * hw.num_nodes
    names = spec.model.name, spec.method.name, hw.name, gpus, spec.deepspeed.name
    return Row(*names, 0, 0, False, 0.0, hw.memory_gib, None, None, None, None, why)


def _advice(spec: RunSpec, options: StageSearch) -> str:
    changes = nearest(spec, options, (), limit=2)
    return f"fits with {changes[0].described}" if changes else "no single change makes it fit"
