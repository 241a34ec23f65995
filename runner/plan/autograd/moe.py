"""A mixture of experts on the tape: `grouped_mm_experts_forward` of transformers 5.23, its default on GPU and CPU.

Every token goes to `experts_per_token` experts, so S = n · experts_per_token rows are computed, however they are
spread. The matrices of all experts are one parameter; autocast does not touch it, so that weights held in fp32
compute in fp32. PEFT 0.21 adapts it through `target_parameters`: its `ParamWrapper` adds B·A to the whole parameter
(`baddbmm`), a second copy of all experts that is kept for the backward pass.

Quantised ones compute in `runner/train/quantised_experts.py`: a parameter is unpacked for the time of a product, and
an adapter multiplies beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from runner.plan.autograd.ops import Block, LayerKind, module
from runner.plan.autograd.tape import Node, Storage, Tensor
from runner.plan.model_shape import Matrix
from runner.plan.quantization import BLOCK


@dataclass(slots=True)
class Weight:
    """One parameter of all experts, or of the router."""

    matrix: Matrix
    width: int
    """Bytes of a value."""
    node: Node | None = None
    """Where its gradient goes."""
    factors: list[tuple[Storage, Node]] = field(default_factory=list)
    """A and B in the parameter's width, which the wrapper holds until the module returns."""
    total: Storage | None = None
    """The parameter plus B·A."""


Routed = tuple[Tensor, tuple[Storage, Storage]]
"""Shares of the chosen experts; logits and the choice, which live until the mixture returns."""


@module
def mixture(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`MixtralSparseMoeBlock.forward`, `Qwen3MoeSparseMoeBlock.forward` and the first half of `Glm4MoeMoE.forward`."""
    scores, held = routed(k, x, kind)
    out = computed(k, x, scores, kind)
    del held
    return out


def routed(k: Block, x: Tensor, kind: LayerKind) -> Routed:
    """The architecture's router."""
    traits = k.shape.traits
    router = _wide_router if traits.shared else _biased_router if traits.biased_experts else _router
    return router(k, x, kind)


def computed(k: Block, x: Tensor, scores: Tensor, kind: LayerKind) -> Tensor:
    """What the chosen experts say, times their shares."""
    quantised = k.set.base != "16" and k.matrices["gate_up_proj"].fused and not kind.weights
    experts = _quantised_experts if quantised else _experts
    return experts(k, x, scores, _weight(k, "gate_up_proj", kind), _weight(k, "down_proj", kind))


@module
def _router(k: Block, x: Tensor, kind: LayerKind) -> Routed:
    """`MixtralTopKRouter.forward`: logits, softmax in fp32, the chosen ones' shares."""
    shape, n, weight = k.shape, k.n, _weight(k, "gate", kind)
    m = weight.matrix
    if weight.factors:
        logits = _product(k, x, weight, m.inputs, m.outputs)
    else:
        logits = k.linear(x, m.inputs, m.outputs, "gate", width=weight.width, trained=kind.weights)
    shares = k.tanh(k.cast(logits, 4))  # softmax
    index = k.t.new(n * shape.experts_per_token, 8)
    chosen = k.take(shares, n * shape.experts_per_token, index)
    return (k.cast(chosen, logits.width) if shape.traits.qk_norm else chosen), (logits.storage, index)


@module
def _biased_router(k: Block, x: Tensor, kind: LayerKind) -> Routed:
    """`GptOssTopKRouter.forward`: softmax of the chosen ones' logits."""
    m = k.matrices["router"]
    logits = k.linear(x, m.inputs, m.outputs, "router", width=k.width_of(kind), trained=kind.weights, bias=True)
    index = k.t.new(k.n * k.shape.experts_per_token, 8)
    return k.tanh(k.take(logits, k.n * k.shape.experts_per_token, index)), (logits.storage, index)


@module
def _wide_router(k: Block, x: Tensor, kind: LayerKind) -> Routed:
    """`Glm4MoeTopkRouter.forward`, `DeepseekV3TopkRouter.forward` and `DeepseekV2TopkRouter.forward`: a product of
    fp32, which autocast narrows; the shares of the chosen ones."""
    t, shape, weight = k.t, k.shape, _weight(k, "gate", kind)
    m, chosen = weight.matrix, k.n * k.shape.experts_per_token
    if weight.factors:
        _fold(k, weight)
        weight.factors, weight.width = [], k.set.width if k.set.autocast else 4
        logits = _product(k, k.cast(x, 4), weight, m.inputs, m.outputs)
    else:
        logits = k.linear(k.cast(x, 4), m.inputs, m.outputs, "gate", width=weight.width, trained=kind.weights)
    if not shape.traits.sigmoid:
        scores = k.tanh(k.cast(logits, 4))  # softmax
        index = t.new(chosen, 8)
        return k.scale(k.take(scores, chosen, index)), (logits.storage, index)
    scores = k.tanh(logits)  # sigmoid
    ranked = t.new(2 * k.n * shape.num_experts, 4)  # with the bias, and of the best groups
    index = t.new(chosen, 8)
    shares = k.take(scores, chosen, index)
    del ranked
    shares = k.mul(shares, k.tanh(shares))  # over their sum
    return k.scale(shares), (logits.storage, index)


@module
def _experts(k: Block, x: Tensor, scores: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    shape, t = k.shape, k.t
    h, f, s = shape.hidden_size, shape.intermediate_size, k.n * shape.experts_per_token
    ids, order = t.new(s, 8), t.new(s, 8)  # expert_ids_g and perm
    index = t.new(s, 8)
    selected = k.take(x, s * h, index)
    del index
    scores = k.take(scores, s, order)
    biases = _biases(k, gate_up, s)
    rows = _product(k, selected, gate_up, h, 2 * f)
    rows = _biased(k, rows, biases, gate_up, ids)
    rows = _gated(k, rows)
    biases = _biases(k, down, s)
    rows = _product(k, rows, down, f, h)
    rows = _biased(k, rows, biases, down, ids)
    weighted = _weighted(k, rows, scores)
    inverse = t.new(s, 8)
    weighted = k.take(weighted, s * h, inverse)
    out = _summed(k, x, weighted, s * h)
    del ids, order
    return k.cast(out, x.width)


@module
def _quantised_experts(k: Block, x: Tensor, scores: Tensor, gate_up: Weight, down: Weight) -> Tensor:
    shape, t = k.shape, k.t
    h, f, s = shape.hidden_size, shape.intermediate_size, k.n * shape.experts_per_token
    ids, order = t.new(s, 8), t.new(s, 8)
    rows = _projected(k, k.take(x, s * h, t.new(s, 8)), gate_up, h, 2 * f)
    _biases(k, gate_up, s)  # added in place
    rows = _gated(k, rows)
    rows = _projected(k, rows, down, f, h)
    _biases(k, down, s)
    rows = _weighted(k, rows, k.take(scores, s, order))
    rows = k.take(rows, s * h, t.new(s, 8))
    out = _summed(k, x, rows, s * h)
    del ids, order
    return k.cast(out, x.width)


def _biases(k: Block, weight: Weight, rows: float) -> Storage | None:
    """The bias of each row's expert, gathered."""
    return k.t.new(rows * weight.matrix.outputs, weight.width) if weight.matrix.bias else None


def _biased(k: Block, rows: Tensor, biases: Storage | None, weight: Weight, ids: Storage) -> Tensor:
    """`rows.add_(biases)`."""
    t, m = k.t, weight.matrix
    if biases is None or weight.node is None:
        return rows
    leaf, kept = t.leaf(weight.width), t.keep(ids)
    gathered = t.node(weight.width, lambda grad: [(leaf, t.new(m.count * m.outputs, weight.width))], kept)
    nodes = [node for node in (rows.node, gathered) if node is not None]
    return Tensor(rows.values, rows.width, rows.storage, t.node(rows.width, lambda grad: [(n, grad) for n in nodes]))


def _summed(k: Block, x: Tensor, rows: Tensor, values: int) -> Tensor:
    """What a token's experts have said, added up: `values` numbers become as many as `x` has."""
    t, source = k.t, rows.node
    out = Tensor(x.values, rows.width, t.new(x.values, rows.width))
    if source is not None:
        # the sum's gradient is spread by a view, which the view before it has to copy
        out.node = t.node(out.width, lambda grad: [(source, t.new(values, source.width))])
    return out


def _projected(k: Block, x: Tensor, weight: Weight, inputs: int, outputs: int) -> Tensor:
    """`_Product`, and what an adapter adds to its result in place."""
    t, w, rank = k.t, weight.width, k.set.rank * weight.matrix.rank_factor
    x = k.cast(x, w)
    out = _unpacked_product(k, x, weight, inputs, outputs)
    if not weight.factors:
        return out
    (low, low_leaf), (_, high_leaf) = weight.factors
    small = k.scale(_narrow(k, x, low, low_leaf, weight.matrix, inputs, rank))
    high = t.new(weight.matrix.count * rank * outputs, w)  # `contiguous`
    update = _narrow(k, small, high, high_leaf, weight.matrix, rank, outputs)
    nodes = [node for node in (out.node, update.node) if node is not None]
    out.node = t.node(w, lambda grad: [(node, grad) for node in nodes])
    return out


def _unpacked_product(k: Block, x: Tensor, weight: Weight, inputs: int, outputs: int) -> Tensor:
    """All experts are unpacked, first the scales of 4 bits; nothing is kept."""
    t, w, values, source = k.t, weight.width, weight.matrix.weights, x.node
    rows, scales = x.values / inputs, 2 * values / BLOCK if k.set.base == "nf4" else 0

    def unpacked() -> Storage:
        borrowed = t.new(scales, 4)
        whole = t.new(values, w)
        del borrowed
        return whole

    whole = unpacked()
    out = Tensor(rows * outputs, w, t.new(rows * outputs, w))
    del whole
    if source is not None:
        kept = t.keep(None)  # where each expert's rows end

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            whole = unpacked()
            piece = t.new(rows * inputs, w)
            del whole
            return [(source, piece)]

        out.node = t.node(w, backward, kept)
    return out


def _narrow(k: Block, x: Tensor, factor: Storage, leaf: Node, matrix: Matrix, inputs: int, outputs: int) -> Tensor:
    """`grouped_mm` with A or B of every expert: keeps its rows and the factor."""
    t, w, rows, source = k.t, x.width, x.values / inputs, x.node
    kept = t.keep(x.storage, factor if source is not None else None)
    out = Tensor(rows * outputs, w, t.new(rows * outputs, w))

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces = [(source, t.new(rows * inputs, w))] if source is not None else []
        return [*pieces, (leaf, t.new(matrix.count * inputs * outputs, w))]

    out.node = t.node(w, backward, kept)
    return out


@module
def _gated(k: Block, rows: Tensor) -> Tensor:
    """`_apply_gate`."""
    if k.shape.traits.biased_experts:
        return _clamped(k, rows)
    gate, up = k.chunks(rows, [rows.values / 2, rows.values / 2])
    return k.mul(k.pointwise(gate), up)


def _clamped(k: Block, rows: Tensor) -> Tensor:
    """`GptOssExperts._apply_gate`: every second value is a gate; both are clamped."""
    gate, up = k.slices(rows, [rows.values / 2, rows.values / 2])
    gate = k.pointwise(gate)
    up = k.pointwise(up)
    glu = k.mul(gate, k.tanh(k.scale(gate)))
    return k.mul(k.copy(up), glu)


def _weight(k: Block, name: str, kind: LayerKind) -> Weight:
    """A parameter as the module finds it: `ParamWrapper` has made its factors ready before the module runs."""
    t, m, setting = k.t, k.matrices[name], k.set
    if not (kind.adapters and setting.peft is None and m.adapted(setting.targets)):
        width = k.width_of(kind)
        return Weight(m, width, t.leaf(width) if kind.weights else None)
    values = [m.count * setting.rank * m.rank_factor * side for side in (m.inputs, m.outputs)]
    width, own = setting.frozen_width, setting.adapter_width
    if m.fused and setting.base != "16" and own == width:  # a view of what trains
        values = [0, 0]
    return Weight(m, width, factors=[(t.new(v, width), t.leaf(own)) for v in values])


def _fold(k: Block, weight: Weight) -> None:
    """The parameter plus B·A, made when it is first asked for and then cached (`parametrize.cached`)."""
    t, factors, width = k.t, weight.factors, weight.width
    sizes = [(factor.size / width, leaf) for factor, leaf in factors]
    kept = t.keep(*(factor for factor, _ in factors))
    weight.total = t.new(weight.matrix.weights, width)
    weight.node = t.node(width, lambda grad: [(leaf, t.new(values, width)) for values, leaf in sizes], kept)


def _product(k: Block, x: Tensor, weight: Weight, inputs: int, outputs: int) -> Tensor:
    """`torch.nn.functional.grouped_mm(x.to(weight.dtype), weight.transpose(-2, -1), offs=offsets)`."""
    if weight.factors:
        _fold(k, weight)
    t, w, leaf, values = k.t, weight.width, weight.node, weight.matrix.weights
    x = k.cast(x, w)
    rows, source = x.values / inputs, x.node
    if source is None and leaf is None:
        return Tensor(rows * outputs, w, t.new(rows * outputs, w))
    kept = t.keep(x.storage if leaf is not None else None, weight.total if source is not None else None)
    out = Tensor(rows * outputs, w, t.new(rows * outputs, w))

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces = []
        if source is not None:
            pieces.append((source, t.new(rows * inputs, w)))
        if leaf is not None:
            pieces.append((leaf, t.new(values, w)))
        return pieces

    out.node = t.node(out.width, backward, kept)
    return out


def _weighted(k: Block, rows: Tensor, scores: Tensor) -> Tensor:
    """`proj_out * sample_weights`: one weight per row; keeps both."""
    t, values, source, other = k.t, rows.values, rows.node, scores.node
    width = max(rows.width, scores.width)
    if source is None and other is None:
        return Tensor(values, width, t.new(values, width))
    kept = t.keep(rows.storage if other is not None else None, scores.storage)
    out = Tensor(values, width, t.new(values, width))
    count = scores.values

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces = []
        if source is not None:
            pieces.append((source, t.new(values, width)))
        if other is not None:
            product = t.new(values, width)
            pieces.append((other, t.new(count, width)))
            del product
        return pieces

    out.node = t.node(out.width, backward, kept)
    return out
