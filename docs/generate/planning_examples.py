"""Worked figures of `docs/planning.md`: what a layer keeps, one run by pencil, states, ZeRO's stages."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from types import FrameType

import yaml

from runner.config import conf_files
from runner.config.command_line import Request
from runner.config.compose import compose
from runner.plan.autograd.layers import LAYERS
from runner.plan.autograd.ops import AttentionKernel, Block, LayerKind, Setting
from runner.plan.autograd.step_peak import TrainableLayers, replay_step
from runner.plan.autograd.tape import CASTS, Kept, Storage, Tape, Tensor
from runner.plan.choose_stage import job_of
from runner.plan.memory import CONTEXT, GIB, SLACK, setting_of
from runner.plan.model_shape import Shape, shape_of
from runner.plan.plan import Plan, plan_of
from runner.plan.run_time import RunFacts
from runner.plan.trainable import Training, training_of
from runner.resolve.plan_inputs import stage_search
from runner.resolve.steps import resolve
from runner.spec import RunSpec

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Head and rows."""

METHODS = ("full", "freeze", "lora", "qlora4", "qlora8")
RUN = ("model=mistral7b", "hw=h200", "train.max_length=2048", "train.micro_batch_size=1", "train.batch_size=1",
       "train.gradient_checkpointing=true")  # fmt: skip
"""The run that is worked out: one H200, which holds all of Mistral-7B."""


@cache
def _composed() -> RunSpec:
    return compose(Request(overrides=("hw=h200",)))


@cache
def spec_of(*words: str) -> RunSpec:
    """What the words resolve to; the hardware must be named, so that every machine writes the same page.

    One composition serves all: Hydra takes 0.07 s for each of the page's 25 runs. A test compares with Hydra's own.
    """
    content = _composed().model_dump()
    for key, _, value in sorted((word.partition("=") for word in words), key=lambda parts: "." in parts[0]):
        if key in conf_files.GROUPS:
            content[key] = conf_files.load_choice(key, value)
        else:
            group, _, name = key.partition(".")
            content[group][name] = yaml.safe_load(value)
    return resolve(RunSpec.model_validate(content))[0]


@cache
def planned(*words: str) -> Plan:
    """Its plan, for 1,000 steps at the price in conf/hw: no data and no price list is looked at."""
    spec = spec_of(*words)
    options = stage_search(spec)
    assert options is not None
    facts = RunFacts(num_steps=1000, usd_per_gpu_hour=spec.hw.usd_per_hour, price_source=spec.hw.price_date)
    return plan_of(spec, options, facts, [])


def trained(spec: RunSpec) -> tuple[Shape, Training, Setting]:
    """A run as the tape sees it, without DeepSpeed."""
    shape = shape_of(spec.model)
    assert spec.train.precision != "auto"
    training = training_of(shape, spec.method, spec.train.precision, deepspeed=False)
    return shape, training, setting_of(training, job_of(spec), 1)


def shape() -> str:
    """Letters and their values for Mistral-7B."""
    s = shape_of(spec_of(*RUN).model)
    return (
        f"P = {s.num_parameters:,} parameters, L = {s.num_layers} layers, h = {s.hidden_size:,}, f = "
        f"{s.intermediate_size:,} (inner width of the MLP), k = {s.num_kv_heads * s.head_dim:,} (width of keys and of "
        f"values), {s.num_heads} heads of d = {s.head_dim}, V = {s.vocab_size:,}; W = {weights(s):,} weights in the "
        "matrices of a layer"
    )


def weights(s: Shape) -> int:
    """Values in the matrices of one layer."""
    return sum(m.weights for m in s.matrices)


# --- what one layer keeps --------------------------------------------------------------------------------------

NORM, ATTENTION, MLP, LOW_RANK = "two norms", "attention: q, k, v, result, sums", "SiLU and its product", "A(x)"
INPUTS = {
    "q_proj": "input of q, k, v", "k_proj": "input of q, k, v", "v_proj": "input of q, k, v",
    "o_proj": "input of o", "gate_proj": "input of gate, up", "up_proj": "input of gate, up",
    "down_proj": "input of down",
}  # fmt: skip
COPIES = "16-bit copies of weights, MiB"
_BY = {"over_root": NORM, "weigh": NORM, "_fused": ATTENTION, "pointwise": MLP, "mul": MLP}


class Watched(Tape):
    """A tape that notes who keeps what for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, float] = defaultdict(float)
        self.known: list[Storage] = []

    def keep(self, *storages: Storage | None) -> Kept:
        """As the tape does."""
        self._note(sys._getframe(1), storages)
        return super().keep(*storages)

    def hold(self, storage: Storage) -> None:
        """As the tape does."""
        self._note(sys._getframe(1), (storage,))
        super().hold(storage)

    def _note(self, frame: FrameType | None, storages: Iterable[Storage | None]) -> None:
        for storage in storages:
            if storage is not None and not any(storage is other for other in self.known):
                self.known.append(storage)
                self.noted[COPIES if storage.kind == CASTS else _keeper(frame)] += storage.size


def _keeper(frame: FrameType | None) -> str:
    """Which part of a layer it is that keeps something: the first function on the way out that says so."""
    while frame is not None:
        name = frame.f_code.co_name
        if name in _BY:
            return _BY[name]
        key = frame.f_locals.get("key")
        if name == "linear" and isinstance(key, tuple) and key[1] == "B":
            return LOW_RANK
        if name == "project" and frame.f_locals.get("name") in INPUTS:
            return INPUTS[frame.f_locals["name"]]
        frame = frame.f_back
    raise LookupError("something is kept by a part of the layer that docs/planning.md has no name for")


@cache
def kept_by(method: str) -> dict[str, float]:
    """Bytes that a trained layer in the middle keeps without checkpointing, by part."""
    shape, training, setting = trained(spec_of(f"method={method}", *RUN, "train.gradient_checkpointing=false"))
    tape, kind = Watched(), training.trains.runs[-1][0][0]
    block = Block(tape, shape, setting)
    width, values = block.width_of(LayerKind(training.trains.embedding)), block.n * shape.hidden_size
    hidden = Tensor(values, width, tape.new(values, width))
    for _ in range(2):  # the second is an inner one: gradients flow into it
        tape.noted.clear()
        with tape.segment("layer"):
            hidden = LAYERS[shape.traits.family](block, hidden, kind, width)
    return dict(tape.noted)


def kept_per_layer(method: str, checkpointing: bool, attention: AttentionKernel = "flash") -> dict[str, float]:
    """By kind, what the forward pass holds more for one more trained layer, from the peaks of 12 and of 8 layers."""
    shape, training, setting = trained(spec_of(f"method={method}", *RUN))
    setting = replace(setting, checkpointing=checkpointing, attention=attention)
    kind = training.trains.runs[-1][0][0]
    eight, twelve = (
        replay_step(shape, setting, TrainableLayers((((kind,), count),), training.trains.embedding)).forward.kinds
        for count in (8, 12)
    )
    return {name: (twelve[name] - eight[name]) / 4 for name in eight}


def kept() -> Table:
    """One row per part of a layer, one column per method; bytes per token."""
    tokens = 2048
    columns = [kept_by(method) for method in METHODS]
    rows: list[tuple[str, ...]] = []
    for part in (NORM, *dict.fromkeys(INPUTS.values()), ATTENTION, MLP, LOW_RANK):
        rows.append((part, *(f"{column.get(part, 0.0) / tokens:,.0f}" for column in columns)))
    sums = [sum(size for part, size in column.items() if part != COPIES) / tokens for column in columns]
    rows.append(("**sum**, bytes per token and layer", *(f"**{size:,.0f}**" for size in sums)))
    layer = [kept_per_layer(method, checkpointing=True)["activations"] / tokens for method in METHODS]
    rows.append(("the same with checkpointing", *(f"**{size:,.0f}**" for size in layer)))
    rows.append((COPIES + " per layer", *(f"{column.get(COPIES, 0.0) / 2**20:,.1f}" for column in columns)))
    return ("kept by", *METHODS), rows


# --- one run by pencil -----------------------------------------------------------------------------------------


def pencil() -> list[tuple[str, str, str, float]]:
    """Phase, term, formula and GiB of Mistral-7B, full, b 1, s 2,048, with checkpointing; a test compares the plan."""
    s = shape_of(spec_of(*RUN).model)
    n = tokens = 2048
    p, h, v, layers = s.num_parameters, s.hidden_size, s.vocab_size, s.num_layers
    table, hidden, tables = 4 * v * h, 4 * n * h, 8 * tokens * s.head_dim
    moving = 4 * (p - v * h) + table + hidden + 16 * n
    rows: list[tuple[str, str, str, float]] = [
        ("always", "trained_weights", "4·P", 4 * p),
        ("always", "optimizer", "8·P", 8 * p),
        ("forward", "activations", "4·n·h × (1 + L + 3) + 8·s·d", hidden * (layers + 4) + tables + 16 * n),
        ("forward", "weight_casts", "2·L·W", 2 * layers * weights(s)),
        ("forward", "head_and_loss", "2·n·32,768 + 2·n·h + 2·V·h + 28·n", 2 * (n * 32768 + n * h + v * h) + 28 * n),
        ("backward", "gradients", "4·(P − V·h)", 4 * (p - v * h)),
        ("backward", "activations", "4·V·h + 4·n·h", table + hidden),
        ("backward", "process", "CUDA context", CONTEXT["expected"]),
        ("backward", "allocator_slack", f"{SLACK['expected']:.0%} of what moves", SLACK["expected"] * moving),
        ("step", "gradients", "4·P", 4 * p),
    ]
    return [(phase, term, formula, size / GIB) for phase, term, formula, size in rows]


def pencil_table() -> Table:
    """The same as a table."""
    rows: list[tuple[str, ...]] = []
    rows += [(phase, f"`{term}`", formula, f"{size:.3f}") for phase, term, formula, size in pencil()]
    return ("phase", "term", "formula", "GiB"), rows


def pencil_peak() -> str:
    """The sum at the peak."""
    sizes = [size for phase, _, _, size in pencil() if phase in ("always", "backward")]
    return " + ".join(f"{size:.3f}" for size in sizes) + f" = **{sum(sizes):.2f} GiB**"


def pencil_range() -> str:
    """Low and high of the same run."""
    peak = planned("method=full", *RUN).peak_gib
    return f"{peak['low']:.2f} to {peak['high']:.2f} GiB"


def states() -> Table:
    """What is always there, and the gradients, per method."""
    rows: list[tuple[str, ...]] = []
    for words in (
        ("method=full",),
        ("method=full", "method.master_weights=false"),
        *((f"method={m}",) for m in METHODS[1:]),
    ):
        plan = planned(*words, *RUN)
        terms = plan.phases["step"]
        sizes = [terms.get(name, 0.0) for name in ("frozen_weights", "trained_weights", "gradients", "optimizer")]
        label = " ".join(word.removeprefix("method=").removeprefix("method.") for word in words)
        rows.append((f"`{label}`", f"{plan.trainable_parameters:,}", *(f"{size:.2f}" for size in sizes)))
    return ("method", "trains", "frozen weights", "trained weights", "gradients", "optimiser"), rows


def adapter_states() -> str:
    """What is planned for a bf16 adapter, of which torch keeps 4 bytes a value."""
    plan = planned("method=qlora4", *RUN)
    size = round(plan.phases["step"]["optimizer"] * GIB / plan.trainable_parameters)
    return f"For a bf16 adapter {size} are planned{', twice what torch keeps' if size == 8 else ''}."


EIGHT = ("model=mistral7b", "method=full", "hw=a100x8", "train.max_length=2048", "train.micro_batch_size=1",
         "train.batch_size=8", "train.gradient_checkpointing=true")  # fmt: skip


def zero_stages() -> Table:
    """GiB on each of eight GPUs, by stage."""
    terms = ("weights", "master_weights", "optimizer", "gradients", "zero_buckets", "zero_gathered")
    rows: list[tuple[str, ...]] = []
    for stage in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
        phases = planned(*EIGHT, f"deepspeed={stage}").phases
        sizes = [phases["backward"].get(name, 0.0) for name in terms] + [phases["step"].get("zero_step", 0.0)]
        rows.append((f"`{stage}`", *(f"{size:.2f}" for size in sizes)))
    return ("stage", *(f"`{name}`" for name in terms), "`zero_step`"), rows


# --- over many runs --------------------------------------------------------------------------------------------


def phases_of_terms() -> dict[str, list[str]]:
    """Term → the phases in which one run or another has it."""
    found: dict[str, list[str]] = defaultdict(list)
    kinds: list[tuple[str, ...]] = [(f"method={method}", *RUN) for method in ("full", "lora", "qlora4")]
    others = ("data=ultrachat_200k", "train.packing=false", "train.batch_size=8")
    kinds += [("method=full", *RUN, "train.optimizer=muon")]
    kinds += [("method=full", *RUN, "objective=dpo", *others), ("method=lora", *RUN, "objective=grpo", *others)]
    kinds += [(*EIGHT, f"deepspeed={stage}") for stage in ("none", "zero2", "zero3", "zero3_offload")]
    for words in kinds:
        for phase, terms in planned(*words).phases.items():
            for name in terms:
                if phase not in found[name]:
                    found[name].append(phase)
    order = list(planned("method=full", *RUN).phases)
    return {name: sorted(phases, key=order.index) for name, phases in found.items()}
