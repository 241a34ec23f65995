"""A mixture of experts on the tape: `grouped_mm_experts_forward` of transformers 5.23, its default on GPU and CPU.

Every token goes to `experts_per_token` experts, so S = n · experts_per_token rows are computed, however they are
spread. The matrices of all experts are one parameter; autocast does not touch it, so that weights held in fp32
compute in fp32. PEFT 0.21 adapts it through `target_parameters`: its `ParamWrapper` adds B·A to the whole parameter
(`baddbmm`), a second copy of all experts that is kept for the backward pass.
"""

from __future__ import annotations

from runner.plan.blocks import Block, LayerKind, module
from runner.plan.shape import Matrix
from runner.plan.tape import Node, Storage, Tensor

Weight = tuple[int, "Storage | None", "Node | None"]
"""A parameter of all experts: bytes of a value, its sum with the adapter, where its gradient goes."""


@module
def mixture(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`MixtralSparseMoeBlock.forward` and `Qwen3MoeSparseMoeBlock.forward`."""
    wrapped = kind.adapters and k.set.targets is None
    scores = _router(k, x, kind, wrapped)
    cached: dict[str, Weight] = {}  # parametrize.cached(): both sums live until the experts are done
    for name in ("gate_up_proj", "down_proj"):
        if not wrapped:
            leaf = k.t.leaf(k.width_of(kind)) if kind.weights else None
            cached[name] = (k.width_of(kind), None, leaf)
    return _experts(k, x, scores, cached, wrapped)


@module
def _router(k: Block, x: Tensor, kind: LayerKind, wrapped: bool) -> Tensor:
    """`MixtralTopKRouter.forward`: logits, softmax in fp32, the chosen ones' shares."""
    shape, n = k.shape, k.n
    width = k.width_of(kind)
    m = k.matrices["gate"]
    if wrapped:
        logits = _product(k, x, _weight(k, "gate", {}, wrapped), m.inputs, m.outputs)
    else:
        logits = k.linear(x, m.inputs, m.outputs, "gate", width=width, trained=kind.weights)
    shares = k.tanh(k.cast(logits, 4))  # softmax
    chosen = k.take(shares, n * shape.experts_per_token)
    return chosen if shape.qk_norm is False else k.cast(chosen, logits.width)


def _experts(k: Block, x: Tensor, scores: Tensor, cached: dict[str, Weight], wrapped: bool) -> Tensor:
    shape, t = k.shape, k.t
    h, f, s = shape.hidden_size, shape.intermediate_size, k.n * shape.experts_per_token
    order = t.new(2 * s, 8)  # expert_ids_g and perm
    index = t.new(s, 8)
    selected = k.take(x, s * h)
    del index
    rows = _product(k, selected, _weight(k, "gate_up_proj", cached, wrapped), h, 2 * f, shape.num_experts)
    rows = _gated(k, rows)
    rows = _product(k, rows, _weight(k, "down_proj", cached, wrapped), f, h, shape.num_experts)
    weighted = _weighted(k, rows, scores)
    weighted = k.take(weighted, s * h)
    out = Tensor(x.values, weighted.width, t.new(x.values, weighted.width))
    source = weighted.node
    if source is not None:
        out.node = t.node(out.width, lambda grad: [(source, grad)])  # the sum's gradient is a view of its own
    del order
    return k.cast(out, x.width)


@module
def _gated(k: Block, rows: Tensor) -> Tensor:
    """`_apply_gate`."""
    gate, up = k.chunks(rows, [rows.values / 2, rows.values / 2])
    return k.mul(k.pointwise(gate), up)


def _weight(k: Block, name: str, cached: dict[str, Weight], wrapped: bool) -> Weight:
    """All experts' matrices; with an adapter their sum, made when it is first asked for."""
    if not wrapped:
        return cached[name]
    t, m, setting = k.t, k.matrices[name], k.set
    width, rank = setting.frozen_width, setting.rank * m.rank_factor
    narrow = [(m.count * rank * side, t.leaf(setting.adapter_width)) for side in (m.inputs, m.outputs)]
    factors = [t.new(values, width) for values, _ in narrow]
    kept = t.keep(*factors)
    total = t.new(m.weights, width)

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        return [(leaf, t.new(values, width)) for values, leaf in narrow]

    cached[name] = (width, total, t.node(width, backward, kept))
    return cached[name]


def _product(k: Block, x: Tensor, weight: Weight, inputs: int, outputs: int, count: int = 1) -> Tensor:
    """`torch.nn.functional.grouped_mm(x.to(weight.dtype), weight.transpose(-2, -1), offs=offsets)`."""
    t, (w, total, leaf) = k.t, weight
    x = k.cast(x, w)
    rows, source = x.values / inputs, x.node
    if source is None and leaf is None:
        return Tensor(rows * outputs, w, t.new(rows * outputs, w))
    kept = t.keep(x.storage if leaf is not None else None, total if source is not None else None)
    out = Tensor(rows * outputs, w, t.new(rows * outputs, w))

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces = []
        if source is not None:
            pieces.append((source, t.new(rows * inputs, w)))
        if leaf is not None:
            pieces.append((leaf, t.new(count * inputs * outputs, w)))
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
