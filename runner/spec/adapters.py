"""Adapter types of PEFT that `method=` can name beside LoRA: their arguments, and the parameters that each trains.

Names, defaults and counts are those of PEFT 0.21.2, `peft/tuners/<type>/layer.py`; tests/spec/test_adapters.py holds
them against the installed one. A type without a count needs a formula, `method.trainable`; some cannot be used.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

UNCOUNTED: dict[str, dict[str, Any]] = {
    "ADAMSS": {"r": 100, "num_subspaces": 5, "subspace_rank": 1, "init_weights": "orthogonal", "use_asa": False,
        "asa_target_subspaces": 50, "init_warmup": 50, "final_warmup": 1000, "mask_interval": 100,
        "asa_importance_beta": 0.85, "asa_uncertainty_beta": 0.85, "asa_schedule_exponent": 3.0,
        "use_dynamic_rank": False, "svd_threshold": 0.1, "random_seed": 0},
    "BEFT": {"init_weights": True},
    "BOFT": {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0,
        "bias": "none", "init_weights": True},
    "C3A": {"block_size": 256, "bias": "none", "init_weights": "xavier_uniform"},
    "DEFT": {"r": 8, "decomposition_method": "relu", "init_scale": 1.0, "alpha": None, "para": False,
        "deft_dropout": 0.0, "init_weights": True, "bias": "none"},
    "DELORA": {"r": 8, "delora_lambda": 15, "module_dropout": 0.0, "bias": "none", "init_weights": True},
    "FOURIERFT": {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "bias": "none",
        "init_weights": False},
    "FROD": {"projection_prng_key": 0, "save_projection": True, "frod_dropout": 0.0, "bias": "none",
        "init_weights": True, "sparse_rate": 0.01, "regularization_alpha": 0.001, "progressbar": True,
        "runtime_offload_base_weight": False},
    "GLORA": {"r": 8, "bias": "none", "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant",
        "init_weights": True},
    "GRALORA": {"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_dropout": 0.0, "gralora_k": 2, "bias": "none",
        "init_weights": True},
    "HIRA": {"r": 32, "hira_dropout": 0.0, "init_weights": True},
    "HRA": {"r": 8, "apply_GS": False, "init_weights": True, "bias": "none"},
    "LILY": {"r": 32, "stride_A": 1, "num_B": 2, "scaling": 1.0, "init_weights": True},
    "MISS": {"r": 64, "miss_dropout": 0.0, "mini_r": 1, "init_weights": True, "bias": "none"},
    "PEANUT": {"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0, "init_weights": True},
    "PSOFT": {"r": 32, "psoft_alpha": 32, "psoft_dropout": 0.0, "ab_svd_init": "psoft_init", "psoft_svd": "full",
        "psoft_svd_lowrank_niter": 10, "random_seed": 0, "psoft_orth": True, "psoft_mag_b": True, "psoft_mag_a": True,
        "use_cayley_neumann": False, "num_cayley_neumann_terms": 5, "cayley_neumann_eps": None, "init_weights": True},
    "PVERA": {"r": 256, "projection_prng_key": 0, "save_projection": True, "pvera_dropout": 0.0, "d_initial": 0.1,
        "bias": "none", "init_weights": True, "sample_at_inference": False, "generator_seed": None},
    "RANDLORA": {"r": 32, "projection_prng_key": 0, "save_projection": True, "sparse": False, "very_sparse": False,
        "randlora_dropout": 0.0, "randlora_alpha": 640, "bias": "none", "init_weights": True},
    "ROAD": {"variant": "road_1", "group_size": 64, "init_weights": True},
    "SHIRA": {"r": 32, "mask_type": "random", "random_seed": None, "init_weights": True},
    "SUPERTUNING": {"sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None, "lora_dropout": 0.0,
        "init_weights": True, "save_precomputed_indices": True},
    "TINYLORA": {"r": 2, "u": 64, "weight_tying": 0.0, "projection_seed": 42, "save_projection": True,
        "init_v_bound": 0.02, "tinylora_dropout": 0.0, "bias": "none", "init_weights": True},
    "UNILORA": {"r": 4, "proj_seed": 42, "theta_d_length": 256, "unilora_dropout": 0.0, "bias": "none",
        "init_theta_d_bound": 0.02, "init_weights": True, "save_indices": False},
    "VBLORA": {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "save_only_topk_weights": False,
        "vblora_dropout": 0.0, "bias": "none", "init_vector_bank_bound": 0.02, "init_logits_std": 0.1},
    "WAVEFT": {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True,
        "random_loc_seed": 777, "bias": "none", "proportional_parameters": False, "init_weights": True},
}  # fmt: skip
"""Types for linear layers that need `method.trainable`: arguments that may be set, with PEFT's defaults."""

WHOLE_BLOCKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "BOFT": (("boft_block_size", "boft_block_num"), ("inputs",)),
    "C3A": (("block_size",), ("inputs", "outputs")),
    "GRALORA": (("gralora_k",), ("inputs", "outputs")),
    "ROAD": (("group_size",), ("outputs",)),
    "VBLORA": (("vector_length",), ("inputs", "outputs")),
}
"""Arguments that have to divide sides of each layer: `ValueError` in `peft/tuners/<type>/layer.py`. 0 is not set."""

ON_ALL_LAYERS = ("BEFT", "GLORA", "IA3", "ROAD", "SHIRA", "SUPERTUNING")
"""Types that PEFT cannot put on some layers only."""

_PROMPT = "learns a prompt, and no part of a linear layer"
UNUSABLE = {
    "LORA": "has methods of its own",
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "ADAPTION_PROMPT": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADALORA": "moves its rank between layers after each step, which the trainer does not do",
    "LN_TUNING": "trains norms, and no part of a linear layer",
    "OSF": "needs a rank for each matrix of the model",
    "POLY": "needs the number of a task with each row",
    "SHADOW": "trains a second model beside the first",
    "TRAINABLE_TOKENS": "trains rows of the embedding, and no part of a linear layer",
    "XLORA": "mixes adapters that are trained already",
}
"""Types that no `method=` can name, and why."""

_LEAST = {
    "oft_block_size": 0, "boft_block_size": 0, "num_cayley_neumann_terms": 2, "init_warmup": 0, "final_warmup": 0,
}  # fmt: skip
"""Smallest whole number of an argument, where it is neither 1 nor a default below 1."""


def out_of_bounds(key: str, value: Any, default: Any) -> str | None:
    """Error for a number that an argument cannot have, its remedy after a semicolon."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    name = f"method.arguments.{key}"
    if key.endswith("dropout"):
        inside = 0 <= value < 1
        return (
            None if inside else f"{name}={value}: expected at least 0 and less than 1; write {name}=0, or leave it out"
        )
    if key.endswith(("seed", "prng_key")):
        return None
    least = _LEAST.get(key, 0 if isinstance(default, float) else 1 if default is None else min(1, default))
    remedy = f"write {name}={default}, PEFT's default" if key in _LEAST else f"write {name}={least}, or more"
    return None if value >= least else f"{name}={value}: expected at least {least}; {remedy}"


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

    def uneven(self, layers: list[Layer]) -> str | None:
        """A sentence about an argument that does not divide a side of one of the layers, as PEFT needs it to; its remedy
        after a semicolon."""
        names, sides = WHOLE_BLOCKS.get(self.peft_type, ((), ()))
        values = {**self.defaults, **self.arguments}
        whole = math.gcd(*(getattr(layer, side) for layer in layers for side in sides)) if layers and sides else 0
        for name in names:
            value = values[name]
            wrong = [(layer, side) for layer in layers for side in sides if value and getattr(layer, side) % value]
            if wrong:
                layer, side = wrong[0]
                other = min((n for n in range(1, whole + 1) if whole % n == 0), key=lambda n: (abs(n - value), n))
                what = (
                    f"method.arguments.{name}={value} does not divide the {getattr(layer, side)} {side} of {layer.name}"
                )
                return f"{what}; write method.arguments.{name}={other}"
        return None

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


def _value(node: ast.expr, names: Mapping[str, object]) -> Any:
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
