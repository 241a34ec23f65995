"""The shape of a model: its matrices and vectors, from its sizes (model_sizes.py).

Pure arithmetic. Source of every matrix, bias and norm: `modeling_<architecture>.py` of transformers
5.23.0; a test builds each architecture there and compares. What gets an adapter and what is quantised
follows PEFT 0.21.2 (`_maybe_include_all_linear_layers`, `transformers_weight_conversion.py`) and
`replace_with_bnb_linear` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING

from runner.plan.architectures import Traits
from runner.plan.model_sizes import CHUNK, CONVOLVED, FACTS, LatentAttention, LinearAttention, Sizes, complete
from runner.spec import ModelSpec, RunSpec

if TYPE_CHECKING:
    from runner.plan.simulation import Simulation


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight matrix of a decoder layer, or several alike."""

    name: str
    """Its module's last name, such as `q_proj`."""
    inputs: int
    """Columns: features in."""
    outputs: int
    """Rows: features out."""
    bias: bool = False
    """It has a bias of `outputs` values."""
    count: int = 1
    """How many there are in one layer (experts of a mixture)."""
    linear: bool = True
    """It is an `nn.Linear` (GPT-2: a `Conv1D`): bitsandbytes quantises it. False for a mixture's router and
    experts, bare parameters; `all-linear` gives them an adapter all the same, unless `method.layers` chooses
    layers: then only the linear ones get one."""
    fused: bool = False
    """All `count` are one parameter, which is quantised as a whole (runner/train/quantised_experts.py); a router stays
    in 16 bits."""
    rank_factor: int = 1
    """What `all-linear` multiplies an adapter's rank by: 2 for a mixture's gate and up, fused into one."""
    asked_as: tuple[str, ...] | None = None
    """What LoRA's `target_modules` must name for it, all of them; None for its own name, and empty for what LoRA passes
    over: PEFT takes the names of an MLP in a mixture with shared experts for those of the other experts."""

    def adapted(self, targets: frozenset[str] | None, *, by_name: bool = False) -> bool:
        """An adapter of these `targets` (None: `all-linear`) reaches it; `by_name` for other types than LoRA."""
        names = (self.name,) if self.asked_as is None else self.asked_as
        if by_name:
            return self.linear and (targets is None or self.name in targets)
        if targets is None:
            return bool(names)
        return bool(names) and targets.issuperset(names) and (self.linear or self.asked_as is not None)

    def adapter_parameters(self, rank: int) -> int:
        """Values in the adapters A [rank, inputs] and B [outputs, rank] of LoRA: one pair for each of `count`."""
        return rank * self.rank_factor * (self.inputs + self.outputs) * self.count

    @property
    def weights(self) -> int:
        """Values in the matrix (all of them, in a mixture), without the bias."""
        return self.inputs * self.outputs * self.count

    @property
    def parameters(self) -> int:
        """Weights and bias."""
        return self.weights + (self.outputs * self.count if self.bias else 0)


@dataclass(frozen=True, slots=True, eq=False)
class LayerShape:
    """One kind of decoder layer."""

    matrices: tuple[Matrix, ...]
    """Its matrices, in the order of their use; in a mixture the router too."""
    norm_parameters: int
    """Values in its norms, its sinks, and a convolution with decays."""
    table: int | None = 0
    """Which of the model's cosines and sines rotate queries and keys; None where nothing does."""
    linear: LinearAttention | None = None
    """The gated delta rule that it has in place of attention."""

    @property
    def parameters(self) -> int:
        """Values in all of it."""
        return sum(m.parameters for m in self.matrices) + self.norm_parameters


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Shape of a decoder-only transformer.

    Compared by identity (`shape_of` makes one per model): as a key of caches it is hashed 100,000 times by `fit`.
    """

    traits: Traits
    """How a layer computes."""
    layers: tuple[LayerShape, ...]
    """From the first to the last; those that are alike are one object."""
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    tie_embeddings: bool
    final_norm_parameters: int
    """Values in the norm after the last layer."""
    position_parameters: int = 0
    """Values in a learned table of positions (GPT-2)."""
    head_bias: bool = False
    """The output head has a bias (Phi)."""
    num_experts: int = 0
    """Experts of one layer; 0 for a dense model."""
    experts_per_token: int = 0
    """Experts that each token is routed to."""
    head_outputs: int = 0
    """Outputs of the head where they are not the vocabulary's words; 0 where they are."""
    latent: LatentAttention | None = None
    """Its attention, where keys and values are made of a vector that all heads share."""
    rotary_dim: int = 0
    """Features of a head that are rotated; 0 without rotary positions.

    The usual ones of the family: a config may rotate another share. That changes no parameter, and
    nothing that is kept for the backward pass: queries and keys are as wide after rotation.
    """
    simulation: Simulation | None = None
    """What tells the memory and the operations of a step where `traits` do not."""
    kinds: tuple[LayerShape, ...] = field(init=False)
    """The different layers, in the order of their first use."""
    matrices: tuple[Matrix, ...] = field(init=False)
    """Different matrices of all layers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(self.layers)))
        object.__setattr__(self, "matrices", tuple(dict.fromkeys(m for kind in self.kinds for m in kind.matrices)))

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def embedding_parameters(self) -> int:
        """Values in the token embeddings (and in the learned positions)."""
        return self.vocab_size * self.hidden_size + self.position_parameters

    @property
    def head_parameters(self) -> int:
        """Values in the output head; 0 where it is the embedding matrix."""
        own = 0 if self.tie_embeddings else (self.head_outputs or self.vocab_size) * self.hidden_size
        return own + (self.vocab_size if self.head_bias else 0)

    @property
    def num_parameters(self) -> int:
        """All of them, tied ones counted once."""
        outside = self.embedding_parameters + self.head_parameters + self.final_norm_parameters
        return self.over_layers(lambda layer: layer.parameters) + outside

    def over_layers(self, value: Callable[[LayerShape], int]) -> int:
        """The sum of something of each layer."""
        values = {kind: value(kind) for kind in self.kinds}
        return sum(values[layer] for layer in self.layers)


def mixing_flops(shape: Shape, layer: LayerShape, span: float) -> float:
    """Forward operations of a token with others, beside those of the matrices: `span` is as long as the row whose half
    a causal kernel computes. Of a gated delta rule: its products with a chunk, two triangular systems, the state."""
    if (linear := layer.linear) is not None:
        key, value = linear.key_dim, linear.value_dim
        return linear.value_heads * (CHUNK * (5 * key + 3 * value) + 6 * key * value)
    value = shape.latent.value_dim if shape.latent else shape.head_dim
    return span * shape.num_heads * (shape.head_dim + value)


def cached_values(shape: Shape, layer: LayerShape, length: int) -> int:
    """Values that `generate` keeps of one answer of that length in a layer."""
    if (linear := layer.linear) is not None:  # the state is in fp32, which counts as two values
        return (
            CONVOLVED * (2 * linear.keys + linear.values) + 2 * linear.value_heads * linear.key_dim * linear.value_dim
        )
    if shape.latent:
        return (shape.latent.rank + shape.latent.rotated) * length
    return 2 * shape.num_kv_heads * shape.head_dim * length


MOST_VALUES = 2**31 - 1
"""Of one parameter that bitsandbytes quantises: its kernels count in an int32."""
_read = attrgetter(*FACTS)
# PhiConfig's defaults, the sizes of phi-1: 0.5 of 64 features; phi-2's config.json: partial_rotary_factor 0.4 of 80
_PHI_ROTARY = 32
_GPT_NEOX_ROTARY = 0.25  # rotary_pct of GPT-NeoX-20B and Pythia, and the default of GPTNeoXConfig


_simulated: dict[tuple[str, str | None], Shape] = {}
"""Shapes of models that are simulated, by id and revision."""


def add_simulated(model: ModelSpec, shape: Shape) -> None:
    """From here on `shape_of` knows a model that only a simulation knows."""
    _simulated[model.id, model.revision] = shape


def shape_of(model: ModelSpec) -> Shape:
    """The shape that the facts of `model` describe: under 5 µs for facts that were seen before.

    Raises RequestError where a fact is missing, where the architecture is none of `ARCHITECTURES`, and
    where the facts contradict each other.
    """
    if model.architecture is None and (found := _simulated.get((model.id, model.revision))) is not None:
        return found
    return _shape(_read(model))


def shape_for(spec: RunSpec) -> Shape:
    """The shape of the model that trains; RequestError where it is not known."""
    shape = shape_of(spec.model)
    return scored(shape) if spec.objective.scores else shape


@lru_cache(maxsize=256)
def scored(shape: Shape) -> Shape:
    """Return the shape with a head of one value instead of one per token (`GenericForSequenceClassification`,
    transformers)."""
    return replace(shape, tie_embeddings=False, head_bias=False, head_outputs=1)


@lru_cache(maxsize=4096)
def _shape(facts: tuple[str | int | None, ...]) -> Shape:
    s = complete(dict(zip(FACTS, facts, strict=True)))
    norm = s.hidden * (2 if s.traits.norm == "layer" else 1)
    layer = LayerShape(_MATRICES[s.traits.family](s), len(s.traits.norm_names) * norm + _qk_norms(s) + _sinks(s))
    odd, every = replace(layer, table=None if s.traits.odd == "unrotated" else 1), s.traits.odd_every
    if s.linear:
        odd, layer = replace(layer, table=0), _linear_layer(s, s.linear, len(s.traits.norm_names) * norm)
    attention = _latent_attention(s, s.latent) if s.latent else _attention(s)
    dense = replace(layer, matrices=(*attention, *_mlp(s, s.dense_inner))) if s.dense_layers else layer
    return Shape(
        traits=s.traits,
        layers=tuple(
            dense if i < s.dense_layers else odd if every and (i + 1) % every == 0 else layer for i in range(s.layers)
        ),
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_heads=s.heads,
        num_kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        vocab_size=s.vocab,
        context_length=s.context,
        tie_embeddings=s.tied,
        final_norm_parameters=norm,
        position_parameters=s.context * s.hidden if s.traits.family == "gpt2" else 0,
        head_bias=s.traits.family == "phi",
        num_experts=s.experts,
        experts_per_token=s.experts_per_token,
        rotary_dim=_rotary_dim(s),
        latent=s.latent,
    )


def _linear_layer(s: Sizes, linear: LinearAttention, norms: int) -> LayerShape:
    """A layer with a gated delta rule: `Qwen3_5GatedDeltaNet`."""
    joined = 2 * linear.keys + linear.values
    matrices = (
        Matrix("in_proj_qkv", s.hidden, joined),
        Matrix("in_proj_z", s.hidden, linear.values),
        Matrix("in_proj_b", s.hidden, linear.value_heads),
        Matrix("in_proj_a", s.hidden, linear.value_heads),
        Matrix("out_proj", linear.values, s.hidden),
    )
    small = CONVOLVED * joined + 2 * linear.value_heads + linear.value_dim  # convolution, dt_bias and A_log, norm
    return LayerShape((*matrices, *_forward(s)), norms + small, table=None, linear=linear)


def _qk_norms(s: Sizes) -> int:
    """Values in the norms of queries and keys."""
    if s.latent:
        return s.latent.query_rank + s.latent.rank
    heads = {"": 0, "head": 2, "whole": s.heads + s.kv_heads}[s.traits.qk_norm]
    return heads * s.head_dim


def _sinks(s: Sizes) -> int:
    return s.heads if s.traits.biased_experts else 0


def _llama(s: Sizes) -> tuple[Matrix, ...]:
    return (*(_latent_attention(s, s.latent) if s.latent else _attention(s)), *_forward(s))


def _forward(s: Sizes) -> tuple[Matrix, ...]:
    """The MLP, or a mixture."""
    if not s.traits.mixture:
        return _mlp(s, s.inner)
    biased, gated = s.traits.biased_experts, s.traits.gated_expert
    asked: tuple[tuple[str, ...] | None, ...] = ((),) * 3 if biased or gated else (None,) * 3
    if s.traits.shared:
        asked = ("gate",), ("gate_proj", "up_proj"), ("down_proj",)
    experts = (
        Matrix(s.traits.router, s.hidden, s.experts, biased, linear=False, asked_as=asked[0]),
        _fused("gate_up_proj", s.hidden, 2 * s.inner, s.experts, biased, rank_factor=2, asked_as=asked[1]),
        _fused("down_proj", s.inner, s.hidden, s.experts, biased, asked_as=asked[2]),
    )
    gate = (Matrix("shared_expert_gate", s.hidden, 1),) if gated else ()
    return (*experts, *(_mlp(s, s.shared_inner) if s.traits.shared or gated else ()), *gate)


def _latent_attention(s: Sizes, latent: LatentAttention) -> tuple[Matrix, ...]:
    bias, query = s.qkv_bias, s.heads * s.head_dim
    queries: tuple[Matrix, ...] = (Matrix("q_proj", s.hidden, query),)
    if latent.query_rank:
        queries = (
            Matrix("q_a_proj", s.hidden, latent.query_rank, bias),
            Matrix("q_b_proj", latent.query_rank, query),
        )
    return (
        *queries,
        Matrix("kv_a_proj_with_mqa", s.hidden, latent.rank + latent.rotated, bias),
        Matrix("kv_b_proj", latent.rank, s.heads * (latent.plain + latent.value_dim)),
        Matrix("o_proj", s.heads * latent.value_dim, s.hidden, bias),
    )


def _attention(s: Sizes) -> tuple[Matrix, ...]:
    query, key, bias = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.qkv_bias
    output = Matrix("o_proj", query, s.hidden, bias and s.traits.attention_bias == "all")
    gated = 2 if s.traits.gated_attention else 1
    if s.traits.fused_qkv:
        return Matrix("qkv_proj", s.hidden, query + 2 * key), output
    return (
        Matrix("q_proj", s.hidden, gated * query, bias),
        Matrix("k_proj", s.hidden, key, bias),
        Matrix("v_proj", s.hidden, key, bias),
        output,
    )


def _mlp(s: Sizes, inner: int) -> tuple[Matrix, ...]:
    asked = () if s.traits.shared else None
    down = Matrix("down_proj", inner, s.hidden, asked_as=asked)
    if s.traits.fused_gate_up:
        return Matrix("gate_up_proj", s.hidden, 2 * inner, asked_as=asked), down
    return (
        Matrix("gate_proj", s.hidden, inner, asked_as=asked),
        Matrix("up_proj", s.hidden, inner, asked_as=asked),
        down,
    )


def _fused(
    name: str,
    inputs: int,
    outputs: int,
    count: int,
    bias: bool,
    *,
    rank_factor: int = 1,
    asked_as: tuple[str, ...] | None,
) -> Matrix:
    small = inputs * outputs * count <= MOST_VALUES
    return Matrix(
        name, inputs, outputs, bias, count, linear=False, fused=small, rank_factor=rank_factor, asked_as=asked_as
    )


def _phi(s: Sizes) -> tuple[Matrix, ...]:
    query, key = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return (
        Matrix("q_proj", s.hidden, query, bias=True),
        Matrix("k_proj", s.hidden, key, bias=True),
        Matrix("v_proj", s.hidden, key, bias=True),
        Matrix("dense", query, s.hidden, bias=True),
        Matrix("fc1", s.hidden, s.inner, bias=True),
        Matrix("fc2", s.inner, s.hidden, bias=True),
    )


def _gpt_neox(s: Sizes) -> tuple[Matrix, ...]:
    return (
        Matrix("query_key_value", s.hidden, 3 * s.hidden, bias=True),
        Matrix("dense", s.hidden, s.hidden, bias=True),
        Matrix("dense_h_to_4h", s.hidden, s.inner, bias=True),
        Matrix("dense_4h_to_h", s.inner, s.hidden, bias=True),
    )


def _gpt2(s: Sizes) -> tuple[Matrix, ...]:
    return (
        Matrix("c_attn", s.hidden, 3 * s.hidden, bias=True),
        Matrix("c_proj", s.hidden, s.hidden, bias=True),
        Matrix("c_fc", s.hidden, s.inner, bias=True),
        Matrix("c_proj", s.inner, s.hidden, bias=True),
    )


_MATRICES = {"llama": _llama, "phi": _phi, "gpt_neox": _gpt_neox, "gpt2": _gpt2}


def _rotary_dim(s: Sizes) -> int:
    if s.traits.family == "gpt2":
        return 0
    if s.traits.family == "phi":
        return min(_PHI_ROTARY, s.head_dim)
    if s.latent:
        return s.latent.rotated
    return int(s.head_dim * (_GPT_NEOX_ROTARY if s.traits.family == "gpt_neox" else s.traits.rotary_share))
