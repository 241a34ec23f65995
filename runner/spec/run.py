"""The whole run, and the rules across its parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator, model_validator

from runner.spec.data import DataSpec
from runner.spec.hw import DeepSpeedSpec, HardwareSpec
from runner.spec.method import Full, Lora, Method, Peft, parse_layers
from runner.spec.model import ModelSpec
from runner.spec.objective import Objective, Sft
from runner.spec.part import Part
from runner.spec.train import EvalSpec, PushSpec, TrackSpec, TrainSpec
from runner.spec.where import LocalPlace, RentedPlace, Where


class RunInfo(Part):
    """Name and folder of the run."""

    name: str | None = None
    """Name of the run, the beginning of its id; null means model and method."""
    output_dir: str = "runs"
    """Folder in which every run gets its own directory."""
    on_changed_inputs: Literal["stop", "continue"] = "stop"
    """Reaction of `resume` to changed rows, chat template, reward files, tokenizer or local base model: refuse, or continue with the new ones. Applies to one resume."""
    metric: str = "auto"
    """Key of `summary.json` by which a sweep is sorted and an HPO sweeper optimises; auto means `eval.after.reward` with `objective=grpo`, else `eval.after.loss`."""
    metric_mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more of the metric is better; auto means max for `eval.after.reward` with `objective=grpo`, else min."""
    report: bool = True
    """Write `report.html`, a page with curves, answers, plan and settings, when the run ends."""
    notify: str | None = None
    """Webhook that is told how the run ended, as `env:VARIABLE`: the address is a secret, and is read from that variable where the run is started. Slack, Discord, ntfy, or any server that takes JSON."""
    notify_on: list[Literal["end", "failure", "cap"]] = ["end", "failure", "cap"]
    """Events that are posted: the run is done, it failed or was interrupted, `where.max_usd` was reached."""

    @field_validator("notify", mode="before")
    @classmethod
    def _address_in_a_variable(cls, value: object) -> object:
        """An address is not shown in the error: whoever has it can post."""
        if value is None:
            return None
        name = str(value).removeprefix("env:")
        if "/" in name or ":" in name:
            raise ValueError(
                "run.notify holds an address, which is a secret and would be kept in spec.json; "
                "write export NOTIFY_WEBHOOK=ADDRESS and then run.notify=env:NOTIFY_WEBHOOK"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("run.notify is no name of a variable; write run.notify=env:NOTIFY_WEBHOOK")
        return f"env:{name}"

    @field_validator("name")
    @classmethod
    def _name_fits_a_folder(cls, value: str | None) -> str | None:
        if value is not None and len(value) > 150:  # a file's name has 255 bytes, and the run's id adds to it
            raise ValueError(f"a name has at most 150 characters, and this has {len(value)}; write a shorter one")
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                "a name is made of letters, digits, dots, dashes and underscores, beginning with a letter or digit; "
                f"write run.name={re.sub(r'[^A-Za-z0-9._-]+', '-', value).lstrip('._-') or 'NAME'}"
            )
        return value


class SweepSpec(Part):
    """Execution of sweeps."""

    max_pods: int = Field(default=1, ge=1)
    """Number of simultaneously rented pods of a sweep. A pod whose run succeeded is used for the next run."""


class RunSpec(Part):
    """One run, complete: the file `spec.json` in the run directory."""

    model: ModelSpec
    method: Method
    hw: HardwareSpec
    # Defaults are made without validators: RunSpec's own holds those of all parts, and to build one per part takes time.
    deepspeed: DeepSpeedSpec = DeepSpeedSpec.model_construct()
    objective: Objective = Sft.model_construct()
    data: DataSpec
    where: Where = LocalPlace.model_construct()
    track: TrackSpec = TrackSpec.model_construct()
    train: TrainSpec = TrainSpec.model_construct()
    eval: EvalSpec = EvalSpec.model_construct()
    run: RunInfo = RunInfo.model_construct()
    push: PushSpec = PushSpec.model_construct()
    sweep: SweepSpec = SweepSpec.model_construct()

    @property
    def is_rented(self) -> bool:
        """The run is executed on a machine of a provider's. False for `where=auto`, which a resolved run has no more."""
        return isinstance(self.where, RentedPlace)

    @model_validator(mode="after")
    def _parts_agree(self) -> RunSpec:
        """Rules across parts: everything that can be refused without touching a GPU."""
        if problems := list(_disagreements(self)):
            raise ValueError("\n".join(problems))
        return self


def _disagreements(spec: RunSpec) -> Iterator[str]:
    """One line for every rule that is broken; its remedy after a semicolon."""
    yield from _training(spec)
    yield from _hardware(spec)
    yield from _methods(spec)
    objective = spec.objective
    if spec.data.source == "commands" and not objective.bundled:
        yield (
            f"data={spec.data.name} holds questions and answers, and objective={objective.name} needs "
            f"{objective.rows_needed}; name your own, such as data=file data.path=my.jsonl"
        )
    yield from objective.disagreements(spec)


def _training(spec: RunSpec) -> Iterator[str]:
    train, limit = spec.train, spec.model.context_length
    if limit and train.max_length > limit:
        what = f"train.max_length={train.max_length} is beyond {spec.model.name}'s limit of {limit} tokens"
        yield f"{what}; write train.max_length={limit} or less"
    if spec.eval.early_stopping_patience and not spec.eval.every_steps:
        yield "eval.early_stopping_patience needs measurements; add eval.every_steps=50, say"
    if train.on_loss_spike == "rewind" and not train.save_every_steps:
        yield (
            "train.on_loss_spike=rewind goes back to a checkpoint, and one by the clock may be far behind; "
            "add train.save_every_steps=100, say, or write train.on_loss_spike=skip"
        )
    if train.packing and not spec.objective.packs:
        name = spec.objective.name
        yield f"train.packing=true: objective={name} takes its rows one by one; write train.packing=false"
    every, saved = spec.push.every_steps, train.save_every_steps
    if every and (saved is None or every % saved):
        what = f"push.every_steps={every}: no checkpoint is written after every {every} steps"
        yield f"{what}; add train.save_every_steps={every}"


def _hardware(spec: RunSpec) -> Iterator[str]:
    train, hw = spec.train, spec.hw
    if hw.num_nodes > 1 and spec.where.name == "local" and not (hw.rendezvous or hw.hostfile):
        yield (
            f"hw.num_nodes={hw.num_nodes}, and the machines have no place to meet; write hw.rendezvous=HOST:29500 "
            "with the first one's address, or hw.hostfile=FILE"
        )
    if train.precision == "bf16" and hw.bf16 is False and hw.accelerator == "cuda":
        yield f"train.precision=bf16: {hw.name} has no bfloat16; write train.precision=fp16 or auto"
    if train.attention.startswith("flash"):
        if not hw.flash_attention and hw.accelerator != "detect":
            yield f"train.attention={train.attention} does not run on {hw.name}; write train.attention=varlen"
        elif train.precision == "fp32":
            what = f"train.attention={train.attention} has kernels for 16 bits alone, and train.precision is fp32"
            yield f"{what}; write train.attention=varlen"
    if train.tf32:
        yield from _tf32(spec)
    if train.compile is True:
        yield from _compile(spec)
    if hw.accelerator == "cpu":
        if "8bit" in train.optimizer or "paged" in train.optimizer:
            yield f"train.optimizer={train.optimizer} needs a GPU; write train.optimizer=adamw"
        if train.precision == "fp16":
            yield "train.precision=fp16 needs a GPU; write train.precision=bf16, fp32 or auto"
        if train.liger is True:
            yield "train.liger=true needs a GPU; write train.liger=false or auto"


def _tf32(spec: RunSpec) -> Iterator[str]:
    train, hw = spec.train, spec.hw
    if hw.accelerator == "cpu":
        yield "train.tf32=true needs a GPU; write train.tf32=false"
    elif hw.compute_capability is not None and hw.compute_capability < 8:
        yield f"train.tf32=true: {hw.name} has no TF32, which came with Ampere; write train.tf32=false"
    elif train.precision != "fp32":
        what = f"train.tf32=true rounds products of fp32, and train.precision={train.precision} has none"
        yield f"{what}; write train.precision=fp32, or train.tf32=false"


def _compile(spec: RunSpec) -> Iterator[str]:
    """What torch.compile cannot take, or only in pieces too small to gain by."""
    asked, off = "train.compile=true", "write train.compile=false"
    if spec.method.packed:
        yield f"{asked}: bitsandbytes' products in 4 and 8 bits are not compiled (method={spec.method.name}); {off}"
    if spec.deepspeed.name.startswith("zero3"):
        what = f"{asked}: deepspeed={spec.deepspeed.name} gathers weights in the middle of a layer"
        yield f"{what}; {off}, or deepspeed=zero2"
    if spec.model.num_experts:
        yield f"{asked}: a mixture's layers depend on where each token is routed ({spec.model.name}); {off}"
    if spec.train.liger is True:
        yield f"{asked} fuses what train.liger=true replaces by kernels of Liger's; write train.liger=false"
    capability = spec.hw.compute_capability
    if spec.hw.accelerator == "cuda" and capability is not None and capability < 7:
        yield f"{asked}: Triton has no kernels for {spec.hw.name}; {off}"


def _muon(spec: RunSpec) -> Iterator[str]:
    if spec.method.adapts:
        what = (
            f"train.optimizer=muon orthogonalises the update of a weight, and method={spec.method.name} trains factors"
        )
        yield f"{what} of one, of which that is not true; write train.optimizer=adamw, or method=full"
    elif spec.model.num_experts:
        what = (
            f"train.optimizer=muon: the experts of {spec.model.name} are one tensor of three dimensions, which torch's"
        )
        yield f"{what} Muon does not take; write train.optimizer=adamw"


_FUSED = ("sft", "pretrain", "dpo", "kto", "grpo")
"""Objectives whose TRL trainer refuses an adapter on the head: `add_fused_lm_head`, TRL 1.16."""


def _methods(spec: RunSpec) -> Iterator[str]:
    objective, method = spec.objective, spec.method
    if spec.train.optimizer == "muon":
        yield from _muon(spec)
    layers = getattr(method, "layers", None)
    if layers is not None and spec.model.num_layers:
        try:
            parse_layers(layers).select(spec.model.num_layers)
        except ValueError as error:
            yield f"method.layers={layers}: {error}"
    if isinstance(method, Lora) and method.init in ("pissa", "olora") and objective.has_reference:
        yield (
            f"method.init={method.init} moves a part of the model into the adapter, and objective={objective.name} needs "
            "the model without the adapter as its reference; write method.init=default"
        )
    if "lm_head" in getattr(method, "target_modules", ()) and objective.name in _FUSED:
        yield (
            f"method.target_modules: objective={objective.name} reads the head's own weight, so an adapter on lm_head "
            "would never train; leave lm_head out"
        )
    if isinstance(method, Peft) and spec.data.add_tokens and "embed_tokens" not in method.modules_to_save:
        head = "" if spec.model.tie_embeddings else ",lm_head"
        yield (
            f"data.add_tokens makes new embeddings, and method={method.name} trains none; "
            f"write method.modules_to_save=[embed_tokens{head}]"
        )
    if spec.model.from_scratch and not isinstance(method, Full):
        yield f"method={method.name}: a model from random weights trains whole; write method=full"
