"""Adapter types of PEFT that `method=` can name beside LoRA: their arguments, and the parameters that each trains.

Counts are those of PEFT 0.21.2, `peft/tuners/<type>/layer.py`; tests/spec/test_adapters.py holds arguments, defaults and
counts against the installed PEFT. A type without an entry needs a formula, `method.trainable`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runner.spec.peft_types import UNCOUNTED

Value = bool | int | float | str | list[str] | None
Arguments = Mapping[str, Any]

OWN_KEYS = {
    "target_modules": "method.target_modules",
    "layers_to_transform": "method.layers",
    "modules_to_save": "method.modules_to_save",
}
"""Arguments of PEFT's classes that have a key of their own."""
MLP_OUTPUTS = ("down_proj", "fc2", "dense_4h_to_h")
"""Last linear layer of an MLP, by its name in Llama, Phi and GPT-NeoX."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer."""

    name: str
    """Last name of its module, such as `q_proj`."""
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class AdapterType:
    """What the schema and the plan know of a type."""

    arguments: Arguments
    """Arguments that may be set, with PEFT's defaults."""
    count: Callable[[Layer, Arguments], int]
    """Parameters trained in a layer."""
    checked: Callable[[Arguments], str | None] = lambda arguments: None
    """A sentence about arguments that do not go together, its remedy after a semicolon."""
    shared: Callable[[list[Layer], Arguments], int] = lambda layers, arguments: 0
    """Frozen values that all layers of the model share."""
    multiplied: Callable[[Layer, Arguments], int] | None = None
    """Weights that a token is multiplied with in a layer; None: those that train."""


def _oft(layer: Layer, arguments: Arguments) -> int:
    blocks, size = arguments["r"], arguments["oft_block_size"]
    if blocks:
        blocks = _divisor(layer.inputs, blocks)
        size = layer.inputs // blocks
    else:
        size = _divisor(layer.inputs, size)
        blocks = layer.inputs // size
    return int((1 if arguments["block_share"] else blocks) * size * (size - 1) // 2)


def oft_block(inputs: int, arguments: Arguments) -> int:
    """Rows of a block of OFT's rotation."""
    blocks = arguments["r"]
    return inputs // _divisor(inputs, blocks) if blocks else _divisor(inputs, arguments["oft_block_size"])


def _divisor(inputs: int, wanted: int) -> int:
    """`OFTLayer.adjust_oft_parameters`: the nearest divisor of `inputs`, the smaller one of two as near."""
    if wanted >= inputs:
        return inputs
    higher = next(n for n in range(wanted, inputs + 1) if inputs % n == 0)
    lower = next(n for n in range(wanted, 0, -1) if inputs % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _oft_checked(arguments: Arguments) -> str | None:
    blocks, size = arguments["r"], arguments["oft_block_size"]
    if not blocks and not size:
        return (
            "method.arguments.r and method.arguments.oft_block_size are both 0, and one has to decide the other; "
            "write method.arguments.oft_block_size=32, or a number of blocks: method.arguments.r=8"
        )
    if blocks and size:
        return (
            f"method.arguments.r={blocks} beside method.arguments.oft_block_size={size}: one decides the other; "
            "write method.arguments.oft_block_size=0 beside r, or leave r out"
        )
    if size == 1:
        return (
            "method.arguments.oft_block_size=1: a block of one row has nothing to rotate; "
            "write method.arguments.oft_block_size=2, or more"
        )
    return None


def _ia3(layer: Layer, arguments: Arguments) -> int:
    return layer.inputs if layer.name in arguments["feedforward_modules"] else layer.outputs


def _loha(layer: Layer, arguments: Arguments) -> int:
    return int(2 * arguments["r"] * (layer.inputs + layer.outputs))


def _whole(layer: Layer, arguments: Arguments) -> int:
    """The update is built as a matrix of the weight's size."""
    return layer.inputs * layer.outputs


def _lokr(layer: Layer, arguments: Arguments) -> int:
    rank, factor = arguments["r"], arguments["decompose_factor"]
    (left_in, right_in), (left_out, right_out) = _factors(layer.inputs, factor), _factors(layer.outputs, factor)
    whole_left = not (arguments["decompose_both"] and rank < max(left_out, left_in) / 2)
    whole_right = not rank < max(right_out, right_in) / 2
    left = left_out * left_in if whole_left else rank * (left_out + left_in)
    right = right_out * right_in if whole_right else rank * (right_out + right_in)
    return int(left + right)


def _factors(dimension: int, factor: int) -> tuple[int, int]:
    """`lokr.layer.factorization`: two factors, as near to `factor` (-1: to each other) as the search comes."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small, large = 1, dimension
    length = small + large
    while small < large:
        next_small = next(n for n in range(small + 1, dimension + 1) if dimension % n == 0)
        next_large = dimension // next_small
        if next_small + next_large > length or next_small > limit:
            break
        small, large = next_small, next_large
    return min(small, large), max(small, large)


def _vera_shared(layers: list[Layer], arguments: Arguments) -> int:
    """One A and one B for all layers, as large as the largest of them."""
    widest = max((layer.inputs for layer in layers), default=0) + max((layer.outputs for layer in layers), default=0)
    return int(arguments["r"] * widest)


TYPES: dict[str, AdapterType] = {
    "OFT": AdapterType(
        {"r": 0, "oft_block_size": 32, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": False,
         "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        _oft, _oft_checked, multiplied=lambda layer, arguments: layer.inputs * oft_block(layer.inputs, arguments),
    ),
    "VERA": AdapterType(
        {"r": 256, "projection_prng_key": 0, "save_projection": True, "vera_dropout": 0.0, "d_initial": 0.1},
        lambda layer, arguments: int(arguments["r"] + layer.outputs), shared=_vera_shared,
        multiplied=lambda layer, arguments: int(arguments["r"] * (layer.inputs + layer.outputs)),
    ),
    "IA3": AdapterType({"feedforward_modules": []}, _ia3),
    "LOHA": AdapterType({"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0}, _loha, multiplied=_whole),
    "LOKR": AdapterType(
        {"r": 8, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0, "decompose_both": False,
         "decompose_factor": -1, "rank_dropout_scale": False},
        _lokr, multiplied=_whole,
    ),
}  # fmt: skip
"""By PEFT's name of the type (`peft.PeftType`)."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter type with its arguments; hashable, so that the plan can keep what it has worked out for it."""

    peft_type: str
    given: tuple[tuple[str, Any], ...]
    """Arguments that were set; lists as tuples."""
    trainable: str | None = None
    """Formula of a type without an entry."""

    @property
    def defaults(self) -> Arguments:
        """Arguments that may be set, with PEFT's defaults."""
        known = TYPES.get(self.peft_type)
        return known.arguments if known else UNCOUNTED[self.peft_type]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments, with the defaults of a known type."""
        known = TYPES.get(self.peft_type)
        return {**(known.arguments if known else {}), **dict(self.given)}

    def count(self, layer: Layer) -> int:
        """Parameters trained in a layer; ValueError for a formula that cannot be evaluated."""
        known = TYPES.get(self.peft_type)
        if known is not None:
            return known.count(layer, self.arguments)
        assert self.trainable is not None
        return evaluate(self.trainable, self.arguments | {"inputs": layer.inputs, "outputs": layer.outputs})

    def multiplied(self, layer: Layer) -> int:
        """Weights that a token is multiplied with in a layer."""
        known = TYPES.get(self.peft_type)
        return known.multiplied(layer, self.arguments) if known and known.multiplied else self.count(layer)

    def shared(self, layers: list[Layer]) -> int:
        """Frozen values that all layers share."""
        known = TYPES.get(self.peft_type)
        return known.shared(layers, self.arguments) if known else 0


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}


def evaluate(formula: str, names: Mapping[str, Any]) -> int:
    """The whole number that a formula of `+ - * //`, `min`, `max` and `names` gives; ValueError for anything else."""
    try:
        return int(_value(ast.parse(formula, mode="eval").body, names))
    except SyntaxError:
        raise ValueError(f"{formula!r} is no formula") from None
    except ZeroDivisionError:
        raise ValueError(f"{formula!r} divides by 0") from None


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            if isinstance(names.get(name), int):
                return names[name]
            known = ", ".join(sorted(key for key, value in names.items() if isinstance(value, int)))
            raise ValueError(f"{name} is no number of method.arguments; there are {known}")
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
            return _FUNCTIONS[name](*(_value(arg, names) for arg in args))
    raise ValueError("a formula has numbers, + - * //, min and max, and no more")
