"""Memory of one GPU (or one CPU process), phase by phase and term by term.

The tape (step_peak.py) gives what comes and goes within a step; here is what is always there, and what no
tensor shows: the CUDA context, the collectives' buffers, the allocator's slack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from runner.plan import zero
from runner.plan.autograd.ops import AttentionKernel, LayerKind, Setting
from runner.plan.autograd.step_peak import Step, TrainableLayers, patterns
from runner.plan.autograd.tape import KINDS
from runner.plan.host_memory import CPU_PROCESS
from runner.plan.model_shape import Shape, cached_values
from runner.plan.simulation import step_of
from runner.plan.trainable import Precision, Training, largest_trained, norms_and_biases
from runner.plan.zero_config import ResolvedConfig
from runner.spec.objective_base import Passes

GIB = 2**30
Phases = dict[str, dict[str, float]]

# Bytes per trained value of each optimiser's states, over fp32 values. AdamW: two fp32 moments. In 8 bits
# (arXiv 2110.02861; bitsandbytes' blocks of 256): two bytes and two fp32 scales per block. Adafactor keeps a row and a
# column per matrix: under 0.01 of a byte per value at the sizes of language models.
STATES = {
    "adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256,
    "adafactor": 0.01, "sgd": 0.0, "muon": 4.0,
}  # fmt: skip
"""Muon keeps one fp32 momentum of a layer's matrices, and AdamW's two of all else (`states_per_value`)."""

# Users and vendors report 0.5 to 0.9 GiB for a CUDA context with its libraries' workspaces; it grows with the
# number of kernels a card's generation loads. Not measured by this project.
CONTEXT = {"low": 0.5 * GIB, "expected": 0.65 * GIB, "high": 0.9 * GIB}
# NCCL's channels and staging buffers, per process: an assumption, between 0.2 and 0.6 GiB in users' reports.
COLLECTIVES = {"low": 0.2 * GIB, "expected": 0.35 * GIB, "high": 0.6 * GIB}
# Share of what comes and goes that the caching allocator holds beyond it: reports go from 3 to 15%.
SLACK = {"low": 0.0, "expected": 0.04, "high": 0.15}
# On a CPU glibc keeps what is freed, and the more the longer a run goes on: the main job (SmolLM2, LoRA, 256 tokens, of
# which 1.38 GiB are accounted for and 0.45 come and go) peaks at 1.4 to 1.6 GiB after 5 and 6 steps, at 2.2 to 2.5
# after 250 and more, 2.46 in the README's run: 2.4 times what comes and goes. Long runs are what has to fit. Blocks
# beyond the 32 MiB of CPU_ENV (launcher/torchrun.py) are given back, so it stops growing: where is an assumption.
CPU_SLACK = {"low": 0.0, "expected": 2.3, "high": 3.0}
CPU_SLACK_MOST = {"low": 0.0, "expected": 1.2 * GIB, "high": 2.0 * GIB}
# Tokenizer and data libraries at first use (57 MiB), and what the first `generate()` leaves for good (79): same run.
CPU_FIRST_USE = 136 * 2**20
FREE_SHARE = 0.95
"""Of the main memory, for a run: an assumption; the system and its page cache take the rest."""
PLAIN = Passes()
PROMPT_TOKENS = 512
"""Longest prompt that an evaluation is planned for, where the sequence is longer."""


@dataclass(frozen=True, slots=True)
class Job:
    """Inputs of the memory of a run besides method, ZeRO stage and batch."""

    seq: int
    """Tokens per sequence."""
    precision: Precision
    checkpointing: int
    """n where every n-th layer is computed again in the backward pass: 1 for all, 0 for none."""
    attention: AttentionKernel
    optimizer: str
    on_gpu: bool
    world: int = 1
    eval_batch: int = 0
    """Prompts answered at once; 0 without such an evaluation."""
    eval_new_tokens: int = 0
    labelled: float = 1.0
    """Share of positions with a label (on a CPU, where the head sees only those)."""
    passes: Passes = PLAIN
    """What the objective makes of a micro batch."""
    packed: bool = False
    """Documents share sequences, and the sequences of a micro batch one row."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    phases: Phases
    peak_phase: str
    low: float
    expected: float
    high: float
    host: float
    """Bytes of main memory per process for what ZeRO offloads, or a paged optimiser's states."""


def setting_of(training: Training, job: Job, micro_batch: int) -> Setting:
    """The tape's view of a run. A packed micro batch is one row [1, b·s] (`padding_free`, TRL's collator), but scores
    that are computed by document are those of `seq` tokens at most."""
    sequences = micro_batch * job.passes.sequences
    rows = 1 if job.packed and job.attention != "scores" else sequences
    return Setting(
        b=rows,
        s=job.seq * sequences // rows,
        width=training.width,
        autocast=training.autocast,
        trained_width=training.trained_width,
        frozen_width=training.width,
        checkpointing=job.checkpointing,
        attention=job.attention,
        head=_head(job),
        labelled=job.labelled,
        rank=training.rank,
        targets=training.targets,
        adapter_width=training.adapter_width,
        dropout=training.dropout,
        dora=training.dora,
        peft=training.peft,
        base=training.base,
    )


def _head(job: Job) -> Literal["fused", "labelled", "number"]:
    """All logits, as ORPO and CPO have them, count like the labelled positions' with a label everywhere: 2·V bytes of
    logits and 8·V in fp32 a position, where they have 5·V in 16 bits and 4·V in fp32."""
    wanted = job.passes.head
    if wanted == "own":
        return "fused" if job.on_gpu else "labelled"
    return "labelled" if wanted == "logits" else wanted


def memory(
    training: Training,
    job: Job,
    micro_batch: int,
    accumulation: int,
    stage: str = "none",
    config: ResolvedConfig | None = None,
) -> Memory:
    """Peaks of every phase; `config` is the resolved DeepSpeed JSON of `stage`."""
    sharded = stage != "none"
    setting = setting_of(training, job, micro_batch)
    # Under ZeRO gradients are reduced as they come; `zero.terms` counts them as a whole.
    one = step_of(training.shape, setting, training.trains, sharded or accumulation > 1)
    states = _states(training, job, stage, config, accumulation > 1)
    fixed, forward = states.fixed, _forward(training, job, setting, one, micro_batch * accumulation, stage)
    gathered = {k: v for k, v in states.sent.items() if k == "zero_gathered"}  # answering runs the same layers
    phases: Phases = {
        "load": _load(training, fixed, stage),
        "forward": states.sent | forward | states.earlier | fixed,
        "backward": one.backward.kinds | states.earlier | fixed | states.sent | states.reduced,
        "step": fixed | states.step,
        "eval": fixed | gathered | _evaluation(training, job, setting),
        "save": dict(fixed),
    }
    return _with_overheads(phases, fixed, job, states.host)


def _forward(training: Training, job: Job, setting: Setting, one: Step, sequences: int, stage: str) -> dict[str, float]:
    """The highest moment before the backward pass: the model's own pass, one without gradients that runs while what the
    first keeps is held, or the generation of the answers to a whole optimiser step's prompts, `sequences` of them."""
    moments: list[dict[str, float]] = [one.forward.kinds]
    if job.passes.over_held:
        quiet = step_of(training.shape, replace(setting, rank=0, checkpointing=0), _quiet(training.shape))
        moments.append({k: one.held.kinds[k] + quiet.forward.kinds[k] for k in KINDS})
    if job.passes.new_tokens:
        new = job.passes.new_tokens
        answers = _answers(training, setting, sequences, min(job.seq - new, PROMPT_TOKENS), new)
        if stage.startswith("zero3"):  # gathered whole (`ds3_gather_for_generation`, TRL's default)
            answers["zero_gathered"] = training.frozen_bytes + training.trained_bytes
        moments.append(answers)
    return max(moments, key=lambda kinds: sum(kinds.values()))


@lru_cache
def _quiet(shape: Shape) -> TrainableLayers:
    return TrainableLayers(patterns(shape, lambda i: LayerKind()))


def floor(training: Training, job: Job, stage: str = "none", config: ResolvedConfig | None = None) -> float:
    """Bytes that are there whatever the micro batch: a quick no for what is far too large."""
    return sum(_states(training, job, stage, config).fixed.values())


class _States(NamedTuple):
    """Bytes by term of everything but the activations."""

    fixed: dict[str, float]
    """Always there, once training has begun."""
    step: dict[str, float]
    """In the optimiser's step."""
    sent: dict[str, float]
    """What comes with communication, while layers run."""
    earlier: dict[str, float]
    """Gradients of the micro batches before, in the passes of the next."""
    reduced: dict[str, float]
    """Gradients at their peak, where they are reduced as they come; else they are the tape's."""
    host: float
    """Main memory."""


def _states(
    training: Training, job: Job, stage: str, config: ResolvedConfig | None, accumulates: bool = False
) -> _States:
    states = STATES[job.optimizer]
    if stage == "none":
        trained = training.trained_bytes
        paged = _paged(training, job.optimizer)
        fixed = {
            "frozen_weights": training.frozen_bytes,
            "trained_weights": trained,
            "optimizer": 0.0 if paged else _moments(training, job.optimizer),
        }
        if job.world > 1:  # DDP's copy of the gradients: accelerate 1.15 leaves `gradient_as_bucket_view` off
            fixed["ddp_buckets"] = trained
        if job.passes.separate_reference:
            fixed["reference"] = reference_bytes(training)
        gradients, host = {"gradients": trained}, _moments(training, job.optimizer) if paged else 0.0
        step = gradients | paged | _orthogonalisation(training, job.optimizer)
        return _States(fixed, step, {}, gradients if accumulates else {}, {}, host)
    assert config is not None
    terms = zero.terms(
        job.world, trainable=training.trainable,
        frozen=training.shape.num_parameters - (0 if training.adapter else training.base_trained),
        frozen_bytes=training.frozen_bytes,
        largest_layer_parameters=training.largest_matrix, optimizer_bytes=states, config=config,
        precision=job.precision, largest_trained=largest_trained(training),
        persistent=norms_and_biases(training.shape) if training.method == "full" else 0,
    )  # fmt: skip
    fixed = {"weights": terms.weights, "master_weights": terms.master, "optimizer": terms.optimizer}
    if job.passes.separate_reference:  # ZeRO-3 shards it, lower stages hold all of it (`prepare_deepspeed`, TRL)
        fixed["reference"] = reference_bytes(training) / (job.world if stage.startswith("zero3") else 1)
    fixed = {k: v for k, v in fixed.items() if v}
    sent, reduced = {"zero_gathered": terms.gathered, "zero_buckets": terms.buckets}, {"gradients": terms.gradients}
    kept = {"gradients": terms.kept_gradients}
    if stage.startswith("zero3"):
        # Both are allocated once (`grad_partitions_flat_buffer`, `_setup_for_real_optimizer`, zero/stage3.py).
        fixed |= kept | {"zero_buckets": terms.buckets}
        return _States(fixed, {"zero_step": terms.step - terms.buckets}, sent, {}, reduced, terms.host)
    # ZeRO-1 reduces them in the last micro batch.
    earlier = {"gradients": terms.gradients - terms.kept_gradients} if stage == "zero1" else kept
    return _States(fixed, kept | {"zero_step": terms.step}, sent, earlier if accumulates else {}, reduced, terms.host)


def _paged(training: Training, optimizer: str) -> dict[str, float]:
    """Of paged states what the GPU has to hold at once: those of the weight that is being updated.

    They lie in CUDA's managed memory, which moves to main memory when something else wants the GPU's (bitsandbytes
    0.50, `get_paged`; arXiv 2305.14314 §3). Empty where nothing is paged: tensors below 1e5 values, as an adapter's,
    stay (`get_state_buffer`); under ZeRO a rank's part is one flat tensor, which is fetched whole.
    """
    if training.adapter or not optimizer.startswith("paged"):
        return {}
    return {"optimizer": STATES[optimizer] * largest_trained(training)}


def states_per_value(training: Training, optimizer: str) -> float:
    """Bytes of the optimiser's states per trained value, over fp32 values."""
    if optimizer != "muon":
        return STATES[optimizer]
    share = training.in_matrices / training.trainable
    return share * STATES["muon"] + (1 - share) * STATES["adamw"]


def _orthogonalisation(training: Training, optimizer: str) -> dict[str, float]:
    """What Muon needs for the matrix at hand: its update, two copies of it in bf16, and two square products of its
    shorter side (`_zeropower_via_newtonschulz`, torch 2.13, optim/_muon.py)."""
    if optimizer != "muon":
        return {}
    sizes = [(training.trained_width + 4) * m * n + 4 * min(m, n) ** 2 for m, n, _ in training.matrices]
    return {"orthogonalisation": float(max(sizes, default=0))}


def reference_bytes(training: Training) -> float:
    """The reference model, in the width of the arithmetic."""
    return float(training.width * training.shape.num_parameters)


def _moments(training: Training, optimizer: str) -> float:
    """Bytes of the optimiser's states; torch keeps them in the width of their weight (`zeros_like`, optim/adam.py)."""
    parts = ((training.base_trained, training.trained_width), (training.adapter, training.adapter_width))
    own, states = optimizer in ("adamw", "muon"), states_per_value(training, optimizer)
    return sum(count * states * (width / 4 if own else 1) for count, width in parts)


def _load(training: Training, fixed: Mapping[str, float], stage: str) -> dict[str, float]:
    """Weights as they arrive; the optimiser is not there yet.

    ZeRO-3 shards 16-bit weights as they come. Quantised ones it cannot: every process loads all of them, and
    DeepSpeed shards the finished model (`get_init_context`, transformers 5.23, modeling_utils.py).
    """
    weights = {k: v for k, v in fixed.items() if (k.endswith("weights") and k != "master_weights") or k == "reference"}
    if stage.startswith("zero3") and training.base != "16":
        weights |= {"weights": training.frozen_bytes + training.trained_bytes}
    return weights | ({"largest_matrix": training.load_extra} if training.load_extra else {})


def _evaluation(training: Training, job: Job, setting: Setting) -> dict[str, float]:
    """Answering prompts: keys and values of every layer, and one forward pass that keeps nothing."""
    if not job.eval_batch:
        return {}
    return _answers(training, setting, job.eval_batch, min(job.seq, PROMPT_TOKENS), job.eval_new_tokens)


def _answers(training: Training, setting: Setting, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Keys and values of so many answers at their longest, and the pass that reads their prompts."""
    shape = training.shape
    length = prompt + new_tokens
    cache = shape.over_layers(lambda layer: cached_values(shape, layer, length)) * batch * training.width
    # generate() computes the last position's logits only; the adapters' own products are next to nothing.
    forward = Setting(
        b=batch, s=prompt, width=setting.width, autocast=setting.autocast, trained_width=setting.trained_width,
        frozen_width=setting.frozen_width, attention=setting.attention, base=setting.base, head="labelled",
        labelled=1 / prompt,
    )  # fmt: skip
    kinds = step_of(shape, forward, _quiet(training.shape)).forward.kinds
    return {"kv_cache": float(cache)} | {name: kinds[name] for name in KINDS if kinds[name]}


def _with_overheads(phases: Phases, fixed: Mapping[str, float], job: Job, host: float) -> Memory:
    """Add what no tensor shows, and find the peak."""
    constant = sum(fixed.values())
    for name, terms in phases.items():
        phases[name] = {k: v for k, v in terms.items() if v}
    tensors = {name: sum(terms.values()) for name, terms in phases.items()}
    peak_phase = max(tensors, key=lambda name: tensors[name])

    def outside(case: str) -> float:
        if not job.on_gpu:
            return float(CPU_PROCESS + CPU_FIRST_USE)
        return CONTEXT[case] + (COLLECTIVES[case] if job.world > 1 else 0.0)

    def slack(case: str, phase: str) -> float:
        moving = 0.0 if phase == "load" else max(0.0, tensors[phase] - constant)
        return SLACK[case] * moving if job.on_gpu else min(CPU_SLACK[case] * moving, CPU_SLACK_MOST[case])

    totals = {
        case: tensors[peak_phase] + outside(case) + slack(case, peak_phase) for case in ("low", "expected", "high")
    }
    collectives = COLLECTIVES["expected"] if job.on_gpu and job.world > 1 else 0.0
    for name, terms in phases.items():
        overheads = {
            "process": outside("expected") - collectives,
            "collectives": collectives,
            "allocator_slack": slack("expected", name),
        }
        terms |= {k: v for k, v in overheads.items() if v}
    return Memory(phases, peak_phase, totals["low"], totals["expected"], totals["high"], host)
