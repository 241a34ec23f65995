"""Resolve every `auto` of a validated run: those that the hardware decides, then ZeRO stage and micro batch. Pure."""

from __future__ import annotations

from typing import Any

from runner.errors import Problem, RequestError
from runner.plan.attention_kernels import has_sinks, needs_scores
from runner.plan.choose_stage import STAGES, StageChoice, StageSearch, batches, is_counted
from runner.plan.memory import GIB
from runner.plan.model_shape import shape_for
from runner.spec import RunSpec


def resolve_autos(spec: RunSpec, options: StageSearch | None = None) -> tuple[RunSpec, list[str]]:
    """The run with every `auto` decided that the hardware decides, and what a user should know about it.

    `spec.hw` must be detected already. With `options` the ZeRO stage and the micro batch are the fastest that fit;
    without (a model whose shape is not known) the micro batch follows from the global batch alone.
    """
    spec = resolve_hardware_autos(spec)
    _check_product(spec)
    _check_attention(spec)
    _check_packing(spec)
    _check_checkpointing(spec)
    notes: list[str] = []
    if options is not None:
        best = options.best(spec)
        stage, micro, accumulation = best.stage, best.micro_batch, best.accumulation
        checkpointing: bool | int | str = typed(best.checkpointing)
        notes += [*_why(spec, options, best), *_why_checkpointed(spec, options, best)]
    else:
        (micro, accumulation), *_ = batches(spec)
        checkpointing = True if spec.train.gradient_checkpointing == "auto" else spec.train.gradient_checkpointing
        stage = "none" if spec.deepspeed.name == "auto" and spec.hw.world_size == 1 else spec.deepspeed.name
    total = micro * accumulation * spec.hw.world_size
    if total != spec.train.batch_size:
        shape = f"{micro} × {accumulation} × {spec.hw.world_size} processes"
        notes.insert(0, f"global batch {spec.train.batch_size} rounded to {total} = {shape}")
    batch = {"micro_batch_size": micro, "accumulation_steps": accumulation, "gradient_checkpointing": checkpointing}
    update = {
        "train": spec.train.model_copy(update=batch | {"batch_size": total}),  # as run, so that spec.json repeats it
        "deepspeed": spec.deepspeed.model_copy(update={"name": stage} | _config(spec, stage)),
    }
    return spec.model_copy(update=update), notes


def _config(spec: RunSpec, stage: str) -> dict[str, str]:
    """The JSON's name for a stage that was chosen; what the user named stays."""
    sharded = stage not in ("none", "auto")
    return {"config": f"{stage}.json"} if sharded and spec.deepspeed.config is None else {}


def _why(spec: RunSpec, options: StageSearch, best: StageChoice) -> list[str]:
    """Why this ZeRO stage, where it was left open."""
    if spec.deepspeed.name != "auto" or spec.hw.world_size == 1:
        return []
    if not best.fits:
        return [f"deepspeed=auto: no stage fits without offloading; {best.stage} needs least"]
    lower = STAGES[: STAGES.index(best.stage)]
    too_big = []
    for stage in lower:
        tried = min(options.choices(spec, (stage,)), key=lambda option: option.memory.expected)
        if not tried.comfortable:
            too_big.append(f"{stage} needs {tried.memory.high / GIB:.1f} GiB with headroom")
    reason = "; ".join(too_big) if too_big else "it is the fastest that fits"
    return [f"deepspeed=auto took {best.stage}: {reason}"]


def typed(every: int) -> bool | int:
    """The value of `train.gradient_checkpointing` for every n-th layer."""
    return bool(every) if every < 2 else every


def _why_checkpointed(spec: RunSpec, options: StageSearch, best: StageChoice) -> list[str]:
    """Why so many layers are computed again, where that was left open."""
    if spec.train.gradient_checkpointing != "auto":
        return []
    taken = f"train.gradient_checkpointing=auto took {str(typed(best.checkpointing)).lower()}"
    if not is_counted(spec.method):
        return [f"{taken}: memory is a lower bound"]
    if best.capacity is None:
        return [f"{taken}: how much memory {spec.hw.name} has is not known"]
    if not best.checkpointing:
        return [f"{taken}: all fits with headroom"]
    whole = options.choice(spec, shape_for(spec), best.stage, best.micro_batch, best.accumulation, 0)
    needs = f"a micro batch of {best.micro_batch} needs {whole.memory.high / GIB:.1f} GiB with headroom"
    return [f"{taken}: without it {needs}"]


def _check_product(spec: RunSpec) -> None:
    """RequestError where micro batch, accumulation and global batch are all given and contradict each other."""
    world, wanted = spec.hw.world_size, spec.train.batch_size
    micro, accumulation = spec.train.micro_batch_size, spec.train.accumulation_steps
    if not (isinstance(micro, int) and isinstance(accumulation, int)):
        return
    total = micro * accumulation * world
    if total != wanted:
        raise RequestError(
            Problem(
                f"train.micro_batch_size={micro} × train.accumulation_steps={accumulation} × {world} process"
                f"{'es' * (world > 1)} = {total}, but train.batch_size={wanted}",
                None,
                f"write train.batch_size={total}, or leave accumulation_steps at auto",
            )
        )


def _check_attention(spec: RunSpec) -> None:
    """RequestError where transformers refuses to load the model with the attention that is named."""
    named = spec.train.attention
    if (named == "sdpa" and needs_scores(spec.model)) or (named.startswith("flash") and has_sinks(spec.model)):
        what = f"train.attention={named} cannot compute the attention scores of {spec.model.architecture}"
        raise RequestError(Problem(what, "train.attention", "write train.attention=varlen, or leave it at auto"))


def _check_packing(spec: RunSpec) -> None:
    """RequestError for packed rows of a model whose masks do not keep documents apart."""
    if spec.train.packing and has_sinks(spec.model):
        what = f"train.packing=true: packed documents would see one another in {spec.model.architecture}"
        raise RequestError(Problem(what, "train.packing", "write train.packing=false"))
    if spec.train.packing and spec.model.linear_num_key_heads:
        what = (
            f"train.packing=true: packed documents would see one another in {spec.model.architecture}: its linear "
            "attention keeps them apart with flash-linear-attention and causal-conv1d alone, which are not used here"
        )
        raise RequestError(Problem(what, "train.packing", "write train.packing=false"))


def _check_checkpointing(spec: RunSpec) -> None:
    """RequestError for every n-th layer of a model that has fewer: only the first would be recomputed."""
    named, layers = spec.train.gradient_checkpointing, spec.model.num_layers
    if named != "auto" and layers is not None and int(named) > layers:
        what = f"train.gradient_checkpointing={named}: {spec.model.name} has {layers} layers"
        remedy = "write train.gradient_checkpointing=auto, or a smaller number"
        raise RequestError(Problem(what, "train.gradient_checkpointing", remedy))


def resolve_hardware_autos(spec: RunSpec) -> RunSpec:
    """The `auto`s that the hardware alone decides."""
    train: dict[str, Any] = {"precision": _precision(spec)}
    on_gpu = spec.hw.accelerator == "cuda"
    if spec.train.attention == "auto":
        train["attention"] = "varlen"
    if spec.train.gradient_checkpointing == "auto" and not on_gpu:
        train["gradient_checkpointing"] = False
    if spec.train.compile == "auto":
        train["compile"] = False
    if spec.train.liger == "auto" and (not on_gpu or spec.train.compile is True):
        train["liger"] = False
    return spec.model_copy(update={"train": spec.train.model_copy(update=train)})


def _precision(spec: RunSpec) -> str:
    if spec.train.precision != "auto":
        return spec.train.precision
    if spec.hw.bf16:
        return "bf16"
    # Without bf16 a GPU still has fast fp16 (T4: 65 against 8 TFLOP/s); a CPU has nothing below fp32.
    return "fp16" if spec.hw.accelerator == "cuda" else "fp32"
