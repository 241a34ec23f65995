"""Changes that make a run fit, smallest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runner.errors import RunnerError
from runner.plan import cost
from runner.plan.choose_stage import OFFLOADING, STAGES, StageChoice, StageSearch
from runner.plan.hardware_defaults import settled
from runner.plan.memory import FREE_SHARE, GIB
from runner.spec import HardwareSpec, Method, QLora4, RunSpec

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


def nearest(
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
    if train.gradient_checkpointing is False:
        yield "train.gradient_checkpointing=true", _with(spec, train={"gradient_checkpointing": True})
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size > 1:
        yield "train.micro_batch_size=1", _with(spec, train={"micro_batch_size": 1})
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


def _with(spec: RunSpec, **parts: dict[str, Any]) -> RunSpec:
    """A copy with some keys changed; what was left at `auto` is open still, and what was fixed stays."""
    update: dict[str, Any] = {name: getattr(spec, name).model_copy(update=keys) for name, keys in parts.items()}
    return spec.model_copy(update=update)


def _tried(words: str, spec: RunSpec, options: StageSearch) -> Change | None:
    try:
        option = options.best(settled(spec))
    except RunnerError:
        return None
    host = spec.hw.main_memory_gib(rented=spec.where.name == "runpod")
    if host and option.memory.host * spec.hw.world_size / spec.hw.num_nodes > FREE_SHARE * host * GIB:
        return None
    return Change(words, option, spec) if option.fits else None


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
        change = _tried(f"hw={hw.name}", on(spec, hw), options)
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


def on(spec: RunSpec, hw: HardwareSpec) -> RunSpec:
    """The run on other hardware."""
    return spec.model_copy(update={"hw": hw})
