"""Trainable, stored and frozen parameters: a method applied to a model's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from runner.plan.architectures import Family
from runner.plan.autograd.ops import LayerKind
from runner.plan.autograd.step_peak import TrainableLayers, patterns
from runner.plan.model_shape import LayerShape, Matrix, Shape
from runner.plan.quantization import MethodName, base_bytes, largest_load_peak
from runner.spec import Freeze, Full, Lora, Method, Peft, QLora4, QLora8
from runner.spec.adapters import Adapter, Layer
from runner.spec.method import parse_layers

Precision = Literal["bf16", "fp16", "fp32"]

OUTSIDE = ("embed_tokens", "norm", "lm_head")
"""Modules around the layers that `extra_modules` and `modules_to_save` may name (their names in Llama)."""
ALIASES = {
    "embed_in": "embed_tokens", "wte": "embed_tokens", "final_layernorm": "norm", "final_layer_norm": "norm",
    "ln_f": "norm", "embed_out": "lm_head",
}  # fmt: skip
"""The same modules in Phi, GPT-NeoX and GPT-2."""

_MODULES: dict[Family, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("embed_tokens", "norm", "lm_head"), ("layers", "self_attn", "mlp")),
    "phi": (("embed_tokens", "final_layernorm", "lm_head"), ("layers", "self_attn", "mlp")),
    "gpt_neox": (
        ("embed_in", "final_layer_norm", "lm_head"),
        ("layers", "attention", "mlp"),
    ),
    "gpt2": (("wte", "wpe", "ln_f", "lm_head"), ("h", "attn", "mlp")),
}
"""Last names of modules with weights, around the layers and in them, beside matrices and norms; transformers 5.23.0."""

_LAST_OF_ATTENTION = ("o_proj", "dense", "c_proj", "out_proj")
"""The matrix after which those of the MLP follow."""


def modules_around(shape: Shape) -> tuple[str, ...]:
    """Last names of the modules with weights around the layers."""
    return _MODULES[shape.traits.family][0]


def modules_of(shape: Shape) -> set[str]:
    """Last names of all modules with weights."""
    around, inside = _MODULES[shape.traits.family]
    found = {*around, *inside, *shape.traits.norm_names, *(m.name for m in shape.matrices if m.linear)}
    found |= {"q_norm", "k_norm"} if shape.traits.qk_norm else set()
    if shape.latent is not None:
        found |= {"kv_a_layernorm", *(["q_a_layernorm"] if shape.latent.query_rank else [])}
    if any(layer.linear for layer in shape.kinds):
        found |= {"linear_attn", "conv1d", "norm"}
    found |= {"experts", shape.traits.router} if shape.num_experts else set()
    found |= {"shared_expert"} if shape.traits.gated_expert else set()
    return found | ({"shared_experts"} if shape.traits.shared else set())


@dataclass(frozen=True, slots=True)
class Training:
    """One method on one model, with or without DeepSpeed: everything independent of the batch."""

    shape: Shape
    method: MethodName
    trains: TrainableLayers
    base_trained: int
    """Values of the model itself that train (under an adapter: the copies that `modules_to_save` makes)."""
    adapter: int
    """Values of the adapter."""
    adapter_weights: int
    """Weights of the adapter that a token is multiplied with: LoRA's values, and more where they are built of fewer."""
    trained_width: int
    """Bytes of a trained value of the model."""
    adapter_width: int
    """Bytes of an adapter's value."""
    frozen_bytes: float
    """Bytes of the weights that do not train, quantised or not."""
    load_extra: float
    """Bytes beyond the finished model while it is loaded: the largest matrix before it is quantised."""
    width: int
    """Bytes of the arithmetic."""
    autocast: bool
    """Trained weights are wider than the arithmetic and cast where they are used."""
    base: Literal["16", "nf4", "int8"]
    rank: int
    targets: frozenset[str] | None
    dropout: bool
    dora: bool
    peft: Adapter | None
    """The adapter, where it is not one of LoRA."""
    trained_layers: int
    """Layers in which something trains."""
    backward_layers: int
    """Layers from the first of them to the last of all: the backward pass runs through these."""
    matrices: tuple[tuple[int, int, int], ...] = ()
    """Matrices of the layers whose own weights train: rows, columns, and how many. Muon updates these."""

    @property
    def trainable(self) -> int:
        """Values that train."""
        return self.base_trained + self.adapter

    @property
    def trained_bytes(self) -> float:
        """Bytes of what trains, as the weights are held."""
        return float(self.base_trained * self.trained_width + self.adapter * self.adapter_width)

    @property
    def in_matrices(self) -> int:
        """Values that Muon updates."""
        return sum(rows * columns * count for rows, columns, count in self.matrices)

    @property
    def largest_matrix(self) -> int:
        """Values in the largest matrix of the model."""
        return max(max(m.weights for m in self.shape.matrices), self.shape.vocab_size * self.shape.hidden_size)


def training_of(shape: Shape, method: Method, precision: Precision, *, deepspeed: bool) -> Training:
    """Apply `method`; ValueError where `layers` names one that the model does not have.

    DeepSpeed keeps all weights in the arithmetic's width and the fp32 copies itself; without it the
    trainer computes under autocast over fp32 weights.
    """
    width = 4 if precision == "fp32" else 2
    if isinstance(method, (Full, Freeze)):
        trained_width = 4 if method.master_weights and not deepspeed else width
        return _whole(shape, method, width, trained_width, autocast=width < 4 and not deepspeed)
    name: MethodName = method.kind
    scaled = precision == "fp16" and not deepspeed  # torch's GradScaler wants fp32 gradients (methods.widen)
    adapter_width = 4 if (not method.packed and not deepspeed) or scaled else width
    chosen = None if method.layers is None else parse_layers(method.layers).select(shape.num_layers)
    every = method.target_modules == "all-linear"
    targets = None if every else frozenset(str(t).rpartition(".")[2] for t in method.target_modules)
    if every and chosen is not None:  # the worker then names the linear layers, and no fused experts
        targets = frozenset(m.name for m in shape.matrices if m.linear and m.asked_as is None)
    other = method.adapter if isinstance(method, Peft) else None
    if every and other is not None:
        targets = frozenset(m.name for m in shape.matrices if m.linear)  # and no fused experts
    adapted = _adapted(shape.matrices, targets, other)
    runs, first = _runs(shape, chosen, LayerKind(adapters=True))
    layers = shape.layers if chosen is None else tuple(shape.layers[i] for i in chosen)
    extra = {ALIASES.get(m, m) for m in method.modules_to_save} | _new_head(shape)
    trains = TrainableLayers(runs, *(module in extra for module in OUTSIDE))
    double = isinstance(method, QLora4) and method.double_quant
    sizes = _sizes(method, layers, targets)
    shared = other.shared([_layer(m) for m in adapted]) * adapter_width if other else 0
    return Training(
        shape, name, trains,
        base_trained=_outside(shape, extra) + _inside(shape, extra),
        adapter=sizes[0],
        adapter_weights=sizes[1],
        trained_width=4 if scaled else width,  # of the copies that `modules_to_save` makes: left as the model is
        adapter_width=adapter_width,
        frozen_bytes=float(base_bytes(shape, name, bytes_16=width, double_quant=double) + shared),
        load_extra=_load_extra(shape, name, width, double),
        width=width,
        autocast=width < 4 and not deepspeed,
        base="nf4" if name == "qlora4" else "int8" if name == "qlora8" else "16",
        rank=0 if isinstance(method, Peft) else method.rank,
        targets=targets,
        dropout=not isinstance(method, Peft) and method.dropout > 0,
        dora=not isinstance(method, Peft) and method.use_dora,
        peft=other,
        trained_layers=len(layers),
        backward_layers=shape.num_layers - first,
    )  # fmt: skip


def _adapted(matrices: Iterable[Matrix], targets: frozenset[str] | None, other: Adapter | None) -> list[Matrix]:
    return [m for m in matrices if m.adapted(targets, by_name=other is not None)]


def _sizes(
    method: Lora | QLora4 | QLora8 | Peft, layers: tuple[LayerShape, ...], targets: frozenset[str] | None
) -> tuple[int, int]:
    """Values of the adapters of these layers that train, and weights of them that a token is multiplied with."""
    counts = Counter(layers)
    other = method.adapter if isinstance(method, Peft) else None
    sizes = [(n, *_layer_sizes(method, _adapted(layer.matrices, targets, other))) for layer, n in counts.items()]
    return sum(n * values for n, values, _ in sizes), sum(n * weights for n, _, weights in sizes)


def _layer_sizes(method: Lora | QLora4 | QLora8 | Peft, adapted: list[Matrix]) -> tuple[int, int]:
    if isinstance(method, Peft):
        layers = [(m.count, _layer(m)) for m in adapted]
        found = method.adapter
        return sum(n * found.count(one) for n, one in layers), sum(n * found.multiplied(one) for n, one in layers)
    values = sum(m.adapter_parameters(method.rank) + (m.outputs if method.use_dora else 0) for m in adapted)
    return values, values


def _layer(matrix: Matrix) -> Layer:
    return Layer(matrix.name, matrix.inputs, matrix.outputs)


def _load_extra(shape: Shape, name: MethodName, width: int, double_quant: bool) -> float:
    """What quantising the largest matrix needs beside the finished model."""
    if name == "qlora4" or name == "qlora8":
        return float(largest_load_peak(shape, name, bytes_16=width, double_quant=double_quant))
    return 0.0


def _whole(shape: Shape, method: Full | Freeze, width: int, trained_width: int, *, autocast: bool) -> Training:
    if isinstance(method, Full):
        chosen: tuple[int, ...] = tuple(range(shape.num_layers))
        extra = set(OUTSIDE)
        values = shape.num_parameters
    else:
        chosen = parse_layers(method.layers).select(shape.num_layers)
        extra = {ALIASES.get(m, m) for m in method.extra_modules} | _new_head(shape)
        values = sum(shape.layers[i].parameters for i in chosen) + _outside(shape, extra)
    runs, first = _runs(shape, chosen, LayerKind(weights=True))
    if "embed_tokens" in extra:
        first = 0
    return Training(
        shape, method.kind, TrainableLayers(runs, *(module in extra for module in OUTSIDE)),
        base_trained=values,
        adapter=0,
        adapter_weights=0,
        trained_width=trained_width,
        adapter_width=width,
        frozen_bytes=float(width * (shape.num_parameters - values)),
        load_extra=0.0,
        width=width,
        autocast=autocast,
        base="16",
        rank=0,
        targets=None,
        dropout=False,
        dora=False,
        peft=None,
        trained_layers=len(chosen),
        backward_layers=shape.num_layers - first,
        matrices=_matrices(shape.layers[i] for i in chosen),
    )  # fmt: skip


def _matrices(layers: Iterable[LayerShape]) -> tuple[tuple[int, int, int], ...]:
    """Matrices of these layers by size."""
    found: Counter[tuple[int, int]] = Counter()
    for layer, n in Counter(layers).items():
        for matrix in layer.matrices:
            found[matrix.outputs, matrix.inputs] += n * matrix.count
    return tuple((*size, count) for size, count in found.items())


def _new_head(shape: Shape) -> set[str]:
    """A head that is not the model's own has everything to learn, whatever else trains."""
    return {"lm_head"} if shape.head_outputs else set()


def _outside(shape: Shape, modules: set[str]) -> int:
    """Values in the modules around the layers; a tied head is the embedding."""
    table = shape.embedding_parameters
    values = table if "embed_tokens" in modules else 0
    values += shape.final_norm_parameters if "norm" in modules else 0
    if "lm_head" in modules:
        tied = shape.tie_embeddings and "embed_tokens" not in modules
        values += table if tied else shape.head_parameters
    return values


def _inside(shape: Shape, modules: set[str]) -> int:
    """Values in the modules of all layers, which PEFT copies whole; a part of one that is named itself counts once."""
    return sum(_inside_layer(shape, layer, modules) for layer in shape.layers) if modules else 0


def _inside_layer(shape: Shape, layer: LayerShape, modules: set[str]) -> int:
    if modules & {"layers", "h"}:
        return layer.parameters
    norms = modules & {"input_layernorm", "post_attention_layernorm", "ln_1", "ln_2"}
    names = {"linear_attn"} if layer.linear else {"self_attn", "attention", "attn"}
    attention, mlp = bool(modules & names), "mlp" in modules
    first = 1 + next(i for i, m in enumerate(layer.matrices) if m.name in _LAST_OF_ATTENTION)
    named = [m for i, m in enumerate(layer.matrices) if m.name in modules or (mlp if i >= first else attention)]
    return sum(m.parameters for m in named) + shape.final_norm_parameters * len(norms)


def _runs(
    shape: Shape, chosen: tuple[int, ...] | None, kind: LayerKind
) -> tuple[tuple[tuple[tuple[LayerKind, ...], int], ...], int]:
    """Layers as repeated patterns, and the first that trains."""
    inside = set(range(shape.num_layers) if chosen is None else chosen)
    return patterns(shape, lambda i: kind if i in inside else LayerKind()), min(inside, default=shape.num_layers)


def saved_projections(training: Training) -> int:
    """Frozen values that VeRA's file has beside those that train, unless `save_projection` is false."""
    peft, targets = training.peft, training.targets
    if peft is None or not peft.arguments.get("save_projection", False):
        return 0
    return peft.shared([_layer(m) for m in training.shape.matrices if targets is None or m.name in targets])


def norms_and_biases(shape: Shape) -> int:
    """Values in parameters so small that ZeRO-3 keeps them whole on every GPU."""

    def small(layer: LayerShape) -> int:
        return layer.norm_parameters + sum(m.outputs * m.count for m in layer.matrices if m.bias)

    return shape.over_layers(small) + shape.final_norm_parameters


def largest_trained(training: Training) -> int:
    """Values in the largest single parameter that trains; 0 for adapters, which are small."""
    if training.adapter:
        return 0
    sizes = [_one(m) for m in training.shape.matrices]
    if training.trains.embedding or training.trains.head:
        sizes.append(training.shape.vocab_size * training.shape.hidden_size)
    return max(sizes)


def _one(matrix: Matrix) -> int:
    return matrix.weights if not matrix.linear else matrix.inputs * matrix.outputs
