"""The whole run, and the rules across its parts."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from runner.spec.cross_checks import disagreements
from runner.spec.data import DataSpec
from runner.spec.hw import DeepSpeedSpec, HardwareSpec
from runner.spec.method import Method, parse_layers
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
        problems: list[str] = []
        limit = self.model.context_length
        if limit and self.train.max_length > limit:
            problems.append(
                f"train.max_length={self.train.max_length} is beyond {self.model.name}'s limit of {limit} "
                f"tokens; write train.max_length={limit} or less"
            )
        if self.eval.early_stopping_patience and not self.eval.every_steps:
            problems.append("eval.early_stopping_patience needs measurements; add eval.every_steps=50, say")
        if self.train.on_loss_spike == "rewind" and not self.train.save_every_steps:
            problems.append(
                "train.on_loss_spike=rewind goes back to a checkpoint, and one by the clock may be far behind; "
                "add train.save_every_steps=100, say, or write train.on_loss_spike=skip"
            )
        if self.hw.num_nodes > 1 and self.where.name == "local" and not (self.hw.rendezvous or self.hw.hostfile):
            problems.append(
                f"hw.num_nodes={self.hw.num_nodes}, and the machines have no place to meet; write hw.rendezvous=HOST:29500 "
                "with the first one's address, or hw.hostfile=FILE"
            )
        layers = getattr(self.method, "layers", None)
        if layers is not None and self.model.num_layers:
            try:
                parse_layers(layers).select(self.model.num_layers)
            except ValueError as error:
                problems.append(f"method.layers={layers}: {error}")
        on_cpu = self.hw.accelerator == "cpu"
        if on_cpu and ("8bit" in self.train.optimizer or "paged" in self.train.optimizer):
            problems.append(f"train.optimizer={self.train.optimizer} needs a GPU; write train.optimizer=adamw")
        if self.train.precision == "bf16" and self.hw.bf16 is False and self.hw.accelerator == "cuda":
            problems.append(f"train.precision=bf16: {self.hw.name} has no bfloat16; write train.precision=fp16 or auto")
        if on_cpu and self.train.precision == "fp16":
            problems.append("train.precision=fp16 needs a GPU; write train.precision=bf16, fp32 or auto")
        if (
            self.train.attention.startswith("flash")
            and not self.hw.flash_attention
            and (self.hw.accelerator != "detect")
        ):
            problems.append(
                f"train.attention={self.train.attention} does not run on {self.hw.name}; write train.attention=varlen"
            )
        elif self.train.attention.startswith("flash") and self.train.precision == "fp32":
            problems.append(
                f"train.attention={self.train.attention} has kernels for 16 bits alone, and train.precision is fp32; "
                "write train.attention=varlen"
            )
        if on_cpu and self.train.liger is True:
            problems.append("train.liger=true needs a GPU; write train.liger=false or auto")
        problems += disagreements(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self
