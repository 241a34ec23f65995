"""Search: combinations of hardware, method and model, planned and ranked; the smallest changes that make a run fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import RunnerError
from runner.plan import cost, main_memory
from runner.plan.auto_values import resolve_hardware_autos
from runner.plan.choose_stage import OFFLOADING, STAGES, StageChoice, StageSearch
from runner.plan.memory import GIB
from runner.plan.model_shape import shape_for
from runner.spec import HardwareSpec, Method, ModelSpec, QLora4, RunSpec

MILLION = 1e6


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One combination with its best stage and micro batch."""

    model: str
    method: str
    hw: str
    num_gpus: int
    zero_stage: str
    micro_batch: int
    accumulation: int
    checkpointing: int
    """n where every n-th layer is computed again in the backward pass: 1 for all, 0 for none."""
    fits: bool
    peak_gib: float
    capacity_gib: float | None
    host_ram_gib: float | None
    """Main memory of one node at the peak, without the rows."""
    host_capacity_gib: float | None
    """Main memory that one node has (a rented one at least); None where nobody says."""
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
                yield on_hardware(base, hw)


def fit(
    specs: Iterable[RunSpec], options: StageSearch, *, sequences: int | None = None, advice: bool = True
) -> list[SearchRow]:
    """One row per run."""
    rows = []
    for spec in specs:
        try:
            ready = resolve_hardware_autos(spec)
            option = options.best(ready)
        except RunnerError as error:  # a stage that this method cannot have
            rows.append(_refused(spec, str(error)))
            continue
        ram = _main_memory(ready, option, options)
        lacking = main_memory.lacking(ready, ram) if option.fits else None
        advised = _advice(spec, options) if advice and (lacking or not option.fits) else ""
        rows.append(_row(spec, option, ram, sequences, "; ".join(filter(None, (lacking, advised)))))
    return rows


def ranked(rows: Iterable[SearchRow], by: str) -> list[SearchRow]:
    """Return rows that fit first, cheapest (`by="usd"`) or fastest (`by="time"`) first."""
    return sorted(rows, key=lambda row: _order(row, by))


def _order(row: SearchRow, by: str) -> tuple[bool, float, float]:
    time = 1 / row.tokens_per_second if row.tokens_per_second else float("inf")
    usd = row.usd_per_million_tokens if row.usd_per_million_tokens is not None else float("inf")
    first, second = (usd, time) if by == "usd" else (time, usd)
    return not row.fits, (first if row.fits else row.peak_gib), second


def _row(spec: RunSpec, option: StageChoice, ram: Mapping[str, float], sequences: int | None, note: str) -> SearchRow:
    hw, gpus = spec.hw, spec.hw.num_gpus * spec.hw.num_nodes
    seconds = option.seconds_per_sequence
    known = option.step is not None
    per_hour = None if hw.usd_per_hour is None or hw.accelerator == "cpu" else hw.usd_per_hour * gpus
    hours = sequences * seconds / 3600 if sequences and known else None
    per_million = None
    if known and per_hour is not None:
        per_million = seconds / spec.train.max_length * MILLION / 3600 * per_hour
    return SearchRow(
        model=spec.model.name,
        method=spec.method.label,
        hw=hw.name,
        num_gpus=gpus,
        zero_stage=option.stage,
        micro_batch=option.micro_batch,
        accumulation=option.accumulation,
        checkpointing=option.checkpointing,
        fits=option.fits and main_memory.lacking(spec, ram) is None,
        peak_gib=round(option.memory.expected / GIB, 1),
        capacity_gib=hw.memory_gib,
        host_ram_gib=round(sum(ram.values()) / GIB, 1),
        host_capacity_gib=main_memory.there(spec),
        tokens_per_second=round(spec.train.max_length / seconds) if known else None,
        usd_per_million_tokens=round(per_million, 3) if per_million is not None else None,
        hours=round(hours, 4) if hours is not None else None,  # 0.36 s: a short run's are not all alike
        usd=round(hours * per_hour, 2) if hours is not None and per_hour is not None else None,
        note=note,
    )


def _refused(spec: RunSpec, why: str) -> SearchRow:
    hw = spec.hw
    gpus = hw.num_gpus * hw.num_nodes
    names = spec.model.name, spec.method.label, hw.name, gpus, spec.deepspeed.name
    return SearchRow(
        *names, 0, 0, 0, False, 0.0, hw.memory_gib, None, main_memory.there(spec), None, None, None, None, why
    )


def _advice(spec: RunSpec, options: StageSearch) -> str:
    changes = nearest_changes(spec, options, (), limit=2)
    return f"fits with {changes[0].described}" if changes else "no single change makes it fit"


SHORTEST = 512


@dataclass(frozen=True, slots=True)
class Change:
    """One change that makes a run fit."""

    words: str
    """What to write on the command line."""
    option: StageChoice
    spec: RunSpec

    @property
    def described(self) -> str:
        """The words, and the main memory that offloading takes instead."""
        main = self.option.memory.host * self.spec.hw.world_size / self.spec.hw.num_nodes / GIB
        return f"{self.words}, with {main:,.0f} GiB of main memory" if main > 1 else self.words


def nearest_changes(
    spec: RunSpec,
    options: StageSearch,
    hardware: Iterable[HardwareSpec],
    *,
    limit: int = 3,
    sequences: int | None = None,
) -> list[Change]:
    """At most `limit` changes, each of which alone makes the run fit.

    `spec` is the run as it was asked for: what it leaves at `auto` is decided again under every change, as it will be
    when the change is typed.
    """
    found: list[Change] = []
    for words, changed in _changes(spec):
        if found and " " in words:  # two keys, one of which is enough
            continue
        change = _tried(words, changed, options)
        if change is not None:
            found.append(change)
        if len(found) == limit - 1:
            break
    larger = cheapest(spec, options, hardware, sequences)
    ranked = [*found, larger] if larger is not None else found
    return sorted(ranked, key=lambda change: change.option.stage in OFFLOADING)  # a factor in time: last


def _changes(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """Changes in the order of what they take away: nothing, time, context, exactness."""
    train, named = spec.train, spec.deepspeed.name
    slower: dict[str, dict[str, object]] = {}
    if train.gradient_checkpointing not in (True, "auto"):
        slower["train.gradient_checkpointing=true"] = {"gradient_checkpointing": True}
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size > 1:
        slower["train.micro_batch_size=1"] = {"micro_batch_size": 1}
    for words, keys in slower.items():
        yield words, _with(spec, train=keys)
    if len(slower) == 2:
        yield " ".join(slower), _with(spec, train={"gradient_checkpointing": True, "micro_batch_size": 1})
    if spec.hw.world_size > 1:
        for stage in STAGES:
            if stage != named and (stage != "none" or named == "none"):
                yield f"deepspeed={stage}", _with(spec, deepspeed={"name": stage})
    whole = not spec.method.adapts
    if whole and train.optimizer == "adamw" and spec.hw.accelerator == "cuda":
        yield "train.optimizer=adamw_8bit", _with(spec, train={"optimizer": "adamw_8bit"})
    length = train.max_length // 2
    while length >= SHORTEST:
        yield f"train.max_length={length}", _with(spec, train={"max_length": length})
        length //= 2
    if spec.method.kind != "qlora4":
        yield "method=qlora4", spec.model_copy(update={"method": _qlora4(spec.method)})
    if spec.hw.accelerator == "cuda":
        for stage in OFFLOADING:
            if stage != named:
                yield f"deepspeed={stage}", _with(spec, deepspeed={"name": stage})


def _qlora4(method: Method) -> QLora4:
    kept = {k: v for k, v in method.model_dump().items() if k in QLora4.model_fields and k != "name"}
    return QLora4(**(kept if method.kind in ("lora", "qlora8", "peft") else {}))


def _with(spec: RunSpec, **parts: dict[str, object]) -> RunSpec:
    """A copy with some keys changed; what was left at `auto` is open still, and what was fixed stays."""
    update: dict[str, Any] = {name: getattr(spec, name).model_copy(update=keys) for name, keys in parts.items()}
    return spec.model_copy(update=update)


def _tried(words: str, spec: RunSpec, options: StageSearch) -> Change | None:
    try:
        ready = resolve_hardware_autos(spec)
        option = options.best(ready)
    except RunnerError:
        return None
    if main_memory.lacking(ready, _main_memory(ready, option, options)):
        return None
    return Change(words, option, spec) if option.fits else None


def _main_memory(spec: RunSpec, option: StageChoice, options: StageSearch) -> dict[str, float]:
    """Bytes of main memory on one node, without the rows: nobody has read them."""
    precision = spec.train.precision
    assert precision != "auto"
    sharded = option.stage != "none"
    return main_memory.terms(spec, options.training(shape_for(spec), spec.method, precision, deepspeed=sharded), option)


@dataclass(frozen=True, slots=True)
class Offer:
    """Hardware that a run fits, with what it costs there."""

    change: Change
    seconds: float
    """Of the whole run, set-up and download included; of one sequence where the run's length is not known."""
    usd: float
    """For those seconds."""

    @property
    def hw(self) -> HardwareSpec:
        """The hardware."""
        return self.change.spec.hw


def offers(
    spec: RunSpec, options: StageSearch, hardware: Iterable[HardwareSpec], sequences: int | None = None,
    preferred: Sequence[str] = (),
) -> list[Offer]:  # fmt: skip
    """The same run on all hardware that has a price and that it fits, cheapest first. Among those that cost the same to
    the cent: RunPod's ids as `preferred` has them, then the fastest."""
    weights = 2 * (spec.model.num_parameters or 0) / 1e9
    before = cost.hours(training_s=0.0, download_gb=weights, load_gb=weights, rented=True).total * 3600
    found: list[Offer] = []
    for hw in hardware:
        if hw.accelerator != "cuda" or hw.usd_per_hour is None or hw.name == spec.hw.name:
            continue
        change = _tried(f"hw={hw.name}", on_hardware(spec, hw), options)
        if change is None or change.option.step is None:
            continue
        seconds = change.option.seconds_per_sequence * (sequences or 1) + (before if sequences else 0.0)
        found.append(Offer(change, seconds, seconds * hw.usd_per_hour * hw.num_gpus * hw.num_nodes / 3600))
    rank = {gpu_id: place for place, gpu_id in enumerate(preferred)}

    def order(offer: Offer) -> tuple[float, int, float]:
        equal = round(offer.usd, 2) if sequences else offer.usd
        return equal, rank.get(offer.hw.runpod_gpu_id or "", len(rank)), offer.seconds

    return sorted(found, key=order)


def cheapest(
    spec: RunSpec, options: StageSearch, hardware: Iterable[HardwareSpec], sequences: int | None = None
) -> Change | None:
    """The same run on the hardware that costs least: set-up and download included where `sequences` are known."""
    found = offers(spec, options, hardware, sequences)
    return found[0].change if found else None


def on_hardware(spec: RunSpec, hw: HardwareSpec) -> RunSpec:
    """The run on other hardware."""
    return spec.model_copy(update={"hw": hw})
