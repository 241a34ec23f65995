"""`method=`: what trains, in which layers (`last:2`, `first:4`, `0-3`, `[0,2,5-7]`)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from runner.spec import adapters
from runner.spec.part import Layers, Part

_HELP = "write last:2, first:4, a range such as 0-3, or a list such as [0,2,5-7]"


@dataclass(frozen=True)
class LayerChoice:
    """A choice of layers that does not know yet how many there are."""

    first: int = 0
    last: int = 0
    indices: frozenset[int] = frozenset()

    def select(self, num_layers: int) -> tuple[int, ...]:
        """Sorted indices among `num_layers` layers; ValueError if one does not exist."""
        needed = max(self.first, self.last, max(self.indices, default=-1) + 1)
        if needed > num_layers:
            raise ValueError(f"the model has {num_layers} layers (0 to {num_layers - 1}), not {needed}; {_HELP}")
        chosen = set(self.indices) | set(range(self.first))
        chosen |= set(range(num_layers - self.last, num_layers))
        return tuple(sorted(chosen))


def parse_layers(value: str | list[int | str]) -> LayerChoice:
    """Parse one choice of layers; ValueError says what to write instead."""
    if isinstance(value, str) and (match := re.fullmatch(r"(first|last):([1-9]\d*)", value.strip())):
        count = int(match[2])
        return LayerChoice(first=count) if match[1] == "first" else LayerChoice(last=count)
    indices: set[int] = set()
    for item in value.split(",") if isinstance(value, str) else value:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(item).strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{item!r} names no layers; {_HELP}")
        indices.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not indices:
        raise ValueError(f"no layers named; {_HELP}")
    return LayerChoice(indices=frozenset(indices))


Kind = Literal["full", "freeze", "lora", "qlora4", "qlora8", "peft"]
"""How a method trains, whatever its name: all adapters of PEFT's other types are `peft`."""


class _Method(Part):
    kind: ClassVar[Kind]
    adapts: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Its name, with the variant that its keys make of it: `lora (LoRA+ 16)`."""
        return str(getattr(self, "name", self.kind))

    """The model's own weights are frozen, and an adapter trains."""
    packed: ClassVar[bool] = False
    """The frozen weights are quantised."""


class Full(_Method):
    """Train every weight."""

    kind = "full"
    adapts = False

    name: Literal["full"] = "full"
    """Name of the choice."""
    master_weights: bool = True
    """Keep the weights in fp32 and compute in 16 bits; false keeps them in 16 bits, with half the memory, and loses small updates."""


class Freeze(_Method):
    """Train some whole layers and freeze the others."""

    kind = "freeze"
    adapts = False

    name: Literal["freeze"] = "freeze"
    """Name of the choice."""
    layers: Layers = "last:2"
    """Layers to train: `last:2`, `first:4`, a range `0-3`, or a list such as `[0,2,5-7]`; indices match exactly."""
    extra_modules: list[str] = []
    """Modules outside the layers to train as well, by exact name: `embed_tokens`, `norm`, `lm_head`, …"""
    master_weights: bool = True
    """Keep the trained weights in fp32 and compute in 16 bits; false keeps them in 16 bits."""

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, value: Layers) -> Layers:
        parse_layers(value)
        return value


class _Targets(_Method):
    """What all adapters share."""

    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Linear layers with an adapter: all except the output head, or a list of names such as `[q_proj,v_proj]`."""
    layers: Layers | None = None
    """Only these layers, written as for `freeze`; null means all."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapter, such as `[embed_tokens,lm_head]` after adding tokens."""

    @field_validator("layers")
    @classmethod
    def _layers_parse(cls, value: Layers | None) -> Layers | None:
        if value is not None:
            parse_layers(value)
        return value


class _LowRank(_Targets):
    """What LoRA and both QLoRA share."""

    rank: int = Field(default=16, ge=1)
    """Rank r of the update B·A."""
    alpha: int = Field(default=32, ge=1)
    """Scale: the update is multiplied by alpha / rank (alpha / √rank with rsLoRA)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732): better at high ranks."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): a little better at low ranks, slower."""
    learning_rate_ratio: float = Field(default=1.0, ge=1)
    """LoRA+ (arXiv 2402.12354): the learning rate of B as a multiple of that of A, which is `train.learning_rate`."""

    @property
    def label(self) -> str:
        """Its name, with the variant that its keys make of it: `lora (LoRA+ 16)`."""
        variants = ["DoRA"] if self.use_dora else []
        variants += [f"LoRA+ {self.learning_rate_ratio:g}"] if self.learning_rate_ratio > 1 else []
        return super().label + (f" ({', '.join(variants)})" if variants else "")


class Lora(_LowRank):
    """Train a low-rank update of the frozen model (arXiv 2106.09685)."""

    kind = "lora"

    name: Literal["lora"] = "lora"
    """Name of the choice."""
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    """Initialisation of A and B: PEFT's default, gaussian, or from a decomposition of the weight (PiSSA, OLoRA)."""

    @model_validator(mode="after")
    def _init_fits(self) -> Lora:
        if self.init in ("pissa", "olora") and self.use_rslora:
            raise ValueError(
                f"method.init={self.init} cannot be combined with method.use_rslora=true: PEFT cannot write "
                "the result as a plain adapter; set one of the two back to its default"
            )
        if self.init in ("pissa", "olora") and self.use_dora:
            raise ValueError(
                f"method.init={self.init} cannot be combined with method.use_dora=true; "
                "set one of the two back to its default"
            )
        return self


class QLora4(_LowRank):
    """LoRA over a base quantised to 4 bits (arXiv 2305.14314)."""

    kind = "qlora4"
    packed = True

    name: Literal["qlora4"] = "qlora4"
    """Name of the choice."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code book: nf4 fits normally distributed weights."""
    double_quant: bool = True
    """Quantise the quantisation constants too: 0.37 bit per parameter less."""


class QLora8(_LowRank):
    """LoRA over a base quantised to int8 (LLM.int8(), arXiv 2208.07339)."""

    kind = "qlora8"
    packed = True

    name: Literal["qlora8"] = "qlora8"
    """Name of the choice."""
    outlier_threshold: float = Field(default=6.0, ge=0)
    """Activations above this magnitude are multiplied in 16 bits."""


class Peft(_Targets):
    """Train another PEFT adapter on the frozen 16-bit model: OFT, VeRA, (IA)³, LoHa, LoKr, or a type named in a file of your own."""

    kind = "peft"

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the choice."""
    peft_type: str
    """PEFT's name of the type, such as `OFT`."""
    arguments: dict[str, bool | int | float | str | list[str] | None] = {}
    """Arguments of PEFT's configuration class: `method.arguments.r=16`."""
    trainable: str | None = None
    """Trained parameters of a linear layer, for a type unknown to the plan: a formula of `inputs`, `outputs` and `arguments`, such as `r * (inputs + outputs)`."""

    @property
    def adapter(self) -> adapters.Adapter:
        """The type and its arguments, for the plan."""
        given = ((key, tuple(value) if isinstance(value, list) else value) for key, value in self.arguments.items())
        return adapters.Adapter(self.peft_type, tuple(given), self.trainable)

    @field_validator("arguments", mode="before")
    @classmethod
    def _arguments_are_simple(cls, value: object) -> object:
        for key, given in value.items() if isinstance(value, dict) else ():
            if isinstance(given, float) and not math.isfinite(given):
                raise ValueError(f"method.arguments.{key}={given}: expected a finite number; write one")
            listed = isinstance(given, list) and all(isinstance(one, str) for one in given)
            if not listed and not isinstance(given, (bool, int, float, str, type(None))):
                raise ValueError(
                    f"method.arguments.{key}={str(given)[:60]}: expected a number, text, true or false, or a list of "
                    f"names; leave {key} out"
                )
        return value

    @model_validator(mode="after")
    def _arguments_fit(self) -> Peft:
        if problem := self._of_type() or self._of_arguments() or self._of_formula():
            raise ValueError(problem)
        return self

    def _of_type(self) -> str | None:
        given = f"method.peft_type={self.peft_type}"
        if reason := adapters.UNUSABLE.get(self.peft_type):
            written = "method=lora, qlora4 or qlora8" if self.peft_type == "LORA" else "method=lora"
            return f"{given} {reason}; write {written}"
        known = (*adapters.TYPES, *adapters.UNCOUNTED)
        if self.peft_type not in known:
            near = get_close_matches(self.peft_type.upper(), known, n=1)
            instead = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            return f"{given}: PEFT has no such type for linear layers; {instead}"
        if self.peft_type in adapters.TYPES or self.trainable:
            return None
        return (
            f"{given} is none of {', '.join(adapters.TYPES)}, whose parameters can be counted; "
            f"write {_quoted('FORMULA')} for one linear layer, such as {_quoted('r * (inputs + outputs)')}"
        )

    def _of_arguments(self) -> str | None:
        for key in self.arguments.keys() & adapters.OWN_KEYS:
            return f"method.arguments.{key} has a key of its own; write {adapters.OWN_KEYS[key]}"
        known = adapters.TYPES.get(self.peft_type)
        defaults = self.adapter.defaults
        for key, value in self.arguments.items():
            if key not in defaults:
                near = get_close_matches(key, defaults, n=1)
                remedy = f"did you mean method.arguments.{near[0]}?" if near else f"leave {key} out"
                return f"method.arguments.{key}: {self.peft_type} has {', '.join(defaults)}; {remedy}"
            if not _alike(value, defaults[key], strict=known is not None):
                return f"method.arguments.{key}={value} is of another kind than its default; write one like {defaults[key]}"
            if problem := adapters.out_of_bounds(key, value, defaults[key]):
                return problem
        if self.layers is not None and self.peft_type in adapters.ON_ALL_LAYERS:
            return f"method.layers: PEFT puts {self.peft_type} on all layers; leave it out"
        if known is None:
            return None
        return known.checked(self.adapter.arguments) or self._of_feedforward()

    def _of_feedforward(self) -> str | None:
        inside = set(self.adapter.arguments.get("feedforward_modules", ()))
        if isinstance(self.target_modules, list) and (left := inside - set(self.target_modules)):
            last = set(self.target_modules) & set(adapters.MLP_OUTPUTS)
            named = ",".join(sorted((inside - left) | last))
            return (
                f"method.arguments.feedforward_modules has {', '.join(sorted(left))}, which method.target_modules has not; "
                f"write method.arguments.feedforward_modules=[{named}]"
            )
        return None

    def _of_formula(self) -> str | None:
        if self.trainable is None:
            return None
        if self.peft_type in adapters.TYPES:
            return f"method.trainable: the parameters of {self.peft_type} are counted without it; leave it out"
        try:
            if self.adapter.count(adapters.Layer("any", 4096, 4096)) < 1:
                return f"method.trainable={self.trainable} counts no parameter of a layer; write another formula"
        except ValueError as error:
            example = _quoted("r * (inputs + outputs)")
            return f"method.trainable={self.trainable}: {error}; write a formula such as {example}"
        return None


def _quoted(formula: str) -> str:
    """A formula as a shell and Hydra both take it."""
    return f"method.trainable='\"{formula}\"'"


def _alike(value: object, default: object, *, strict: bool) -> bool:
    """A value may take the place of its default: a whole number that of any number, and nothing that of a truth.

    Not `strict`, PEFT itself looks at texts and truths: some of its arguments take either.
    """
    if not strict and (default is None or isinstance(default, (bool, str))):
        return default is None or isinstance(value, (bool, str))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _tag(value: object) -> str | None:
    """Which class a method is of: its name's, and PEFT's for every other name with a `peft_type`."""
    if isinstance(value, Part):
        return getattr(value, "kind", None)
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    return "peft" if "peft_type" in value and name not in get_args(Kind) else name


Method = Annotated[
    Annotated[Full, Tag("full")]
    | Annotated[Freeze, Tag("freeze")]
    | Annotated[Lora, Tag("lora")]
    | Annotated[QLora4, Tag("qlora4")]
    | Annotated[QLora8, Tag("qlora8")]
    | Annotated[Peft, Tag("peft")],
    Discriminator(_tag),
]
"""The methods applied to a loaded model: full, freeze, LoRA, QLoRA-4, QLoRA-8, and PEFT's other adapters."""
