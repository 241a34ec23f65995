"""Layers of linear attention on the tape: `Qwen3_5GatedDeltaNet` of transformers 5.23 without fla's kernels.

Its `torch_chunk_gated_delta_rule` computes in fp32 but for its products, which autocast narrows, over chunks of `CHUNK`
tokens, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

from runner.plan.autograd.ops import Block, LayerKind, module, over_root
from runner.plan.autograd.tape import Node, Storage, Tensor
from runner.plan.model_sizes import CHUNK, CONVOLVED, LinearAttention

Project = Callable[[Block, Tensor, str, LayerKind], Tensor]


@module
def gated_delta_net(k: Block, hidden: Tensor, kind: LayerKind, project: Project) -> Tensor:
    """`Qwen3_5GatedDeltaNet.forward`."""
    sizes = k.layer.linear
    assert sizes is not None
    mixed = project(k, hidden, "in_proj_qkv", kind)
    z = project(k, hidden, "in_proj_z", kind)
    b = project(k, hidden, "in_proj_b", kind)
    a = project(k, hidden, "in_proj_a", kind)
    mixed = _convolved(k, mixed, kind)
    query, key, value = k.chunks(mixed, [k.n * sizes.keys, k.n * sizes.keys, k.n * sizes.values])
    beta = k.tanh(b)  # sigmoid
    decay = _decay(k, a, kind)
    core = _delta_rule(k, query, key, value, decay, beta, sizes)
    core = _gated_norm(k, core, z, kind, sizes.value_dim)
    return project(k, core, "out_proj", kind)


def _convolved(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`causal_conv1d_fn`: padded on both sides, of which one is cut off, then SiLU."""
    own, values = x.width, x.values
    cut = k.slices(_convolution(k, x, kind), [values])[0]
    cut = k.pointwise(cut)
    return k.cast(cut, own)


def _convolution(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`conv1d`, of groups of one feature: keeps input and weight, whatever trains."""
    t, width, trained = k.t, k.width_of(kind), kind.weights
    features = x.values / k.n
    longer = x.values + k.set.b * (CONVOLVED - 1) * features
    x = k.cast(x, width)  # as the weight is, then as autocast wants it
    w = k.set.width if k.set.autocast else width
    narrow = k.cast(x, w)
    weight = t.new(CONVOLVED * features, w) if w != width else None
    source, values = narrow.node, narrow.values
    if source is None and not trained:
        return Tensor(longer, w, t.new(longer, w))
    kept = t.keep(narrow.storage, weight)
    out = Tensor(longer, w, t.new(longer, w))
    leaf = t.leaf(width) if trained else None

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces = [(source, t.new(values, w))] if source is not None else []
        return [*pieces, (leaf, t.new(CONVOLVED * features, w))] if leaf is not None else pieces

    out.node = t.node(w, backward, kept)
    return out


def _decay(k: Block, a: Tensor, kind: LayerKind) -> Tensor:
    """`-A_log.float().exp() * softplus(a.float() + dt_bias)`."""
    return k.weigh(k.pointwise(k.copy(k.cast(a, 4))), a.values / k.n, 4, kind.weights)


@module
def _gated_norm(k: Block, x: Tensor, gate: Tensor, kind: LayerKind, features: int) -> Tensor:
    """`Qwen3_5RMSNormGated.forward`."""
    own, trained = x.width, kind.weights
    x = k.cast(x, 4)
    x = over_root(k, x, features)
    x = k.weigh(k.cast(x, own), features, k.width_of(kind), trained)
    x = k.mul(x, k.pointwise(k.cast(gate, 4)))
    return k.cast(x, own)


def _delta_rule(
    k: Block, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, sizes: LinearAttention
) -> Tensor:
    """`torch_chunk_gated_delta_rule`."""
    own, groups = query.width, sizes.value_heads // sizes.key_heads
    if groups > 1:
        query = _longer(k, query, groups)
        key = _longer(k, key, groups)
    query, key, value, beta, decay = [_contiguous(k, x, 4) for x in (query, key, value, beta, decay)]
    query = _unit(k, query, sizes.key_dim)
    key = _unit(k, key, sizes.key_dim)
    query = k.scale(query)
    number = -(-k.set.s // CHUNK)
    longer = number * CHUNK / k.set.s
    query, key, value = [_longer(k, x, longer) for x in (query, key, value)]
    beta, decay = [_longer(k, x, longer) for x in (beta, decay)]
    v_beta = k.spread(value, beta)
    k_beta = k.spread(key, beta)
    total = _cumulated(k, decay)
    pairs = _differences(k, total)
    mask = k.t.new(CHUNK**2, 1)
    pairs = _masked(k, pairs, mask)
    pairs = k.tanh(pairs)  # exp
    system = k.mul(k.product(k_beta, key, pairs.values), pairs)
    within = k.mul(k.product(query, key, pairs.values), pairs)
    decayed = k.spread(k_beta, k.tanh(total))
    values = _solved(k, system, v_beta)
    reads = _solved(k, system, decayed)
    size = k.set.b * sizes.value_heads * sizes.key_dim * sizes.value_dim
    state = Tensor(size, 4, k.t.new(size, 4))
    out = Tensor(values.values, 4, k.t.new(values.values, 4))
    query = k.spread(query, k.tanh(total))
    key = k.spread(key, k.tanh(_after(k, total)))
    ends = k.tanh(_part(k, total, CHUNK))
    for i in range(number):
        new = k.subtract(_part(k, values, number), k.product(_part(k, reads, number), state, values.values / number))
        read = k.product(_part(k, query, number), state, values.values / number)
        out = k.write(out, k.add(read, k.product(_part(k, within, number), new, new.values)))
        if i == number - 1:  # nobody reads the last state: what it would need for its gradient dies with it
            state, ends, key, new = (Tensor(x.values, 4, x.storage) for x in (state, ends, key, new))
        state = k.add(k.spread(state, _part(k, ends, number)), k.product(_part(k, key, number), new, size))
    del state
    out = k.copy(out)  # as the solutions of the systems, it lies column by column
    return _contiguous(k, k.slices(out, [out.values / longer])[0], own)


def _longer(k: Block, x: Tensor, times: float) -> Tensor:
    """`repeat_interleave`, or `torch.nn.functional.pad`, which copies even if nothing is added."""
    t, values, width, source = k.t, x.values, x.width, x.node
    out = Tensor(times * values, width, t.new(times * values, width))
    if source is not None:
        out.node = t.node(width, lambda grad: [(source, t.new(values, width))])
    return out


def _contiguous(k: Block, x: Tensor, width: int) -> Tensor:
    """`x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)`."""
    return k.copy(x) if x.width == width else k.cast(x, width)


def _unit(k: Block, x: Tensor, features: int) -> Tensor:
    """`l2norm`: `x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)`; keeps x and the row's root."""
    t, source, values, rows = k.t, x.node, x.values, x.values / features
    squares = t.new(values, 4)
    root = t.new(rows, 4)
    del squares
    if source is None:
        return Tensor(values, 4, t.new(values, 4))
    kept_twice = t.keep(x.storage)
    squared = t.node(4, lambda grad: [(source, t.new(values, 4)), (source, t.new(values, 4))], kept_twice)
    kept = t.keep(x.storage, root)
    out = Tensor(values, 4, t.new(values, 4))

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        direct = t.new(values, 4)
        product = t.new(values, 4)  # gradient of the root, summed over the features
        small = t.new(rows, 4)
        del product
        return [(source, direct), (squared, small)]

    out.node = t.node(4, backward, kept)
    return out


def _cumulated(k: Block, x: Tensor) -> Tensor:
    """`cumsum`: backward `grad.flip(3).cumsum(3).flip(3)`."""
    t, values, source = k.t, x.values, x.node
    out = Tensor(values, 4, t.new(values, 4))
    if source is None:
        return out

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        flipped = t.new(values, 4)
        summed = t.new(values, 4)
        del flipped
        piece = t.new(values, 4)
        del summed
        return [(source, piece)]

    out.node = t.node(4, backward)
    return out


def _differences(k: Block, x: Tensor) -> Tensor:
    """`x.unsqueeze(4) - x.unsqueeze(3)`, of all pairs in a chunk."""
    t, values, source = k.t, x.values, x.node
    out = Tensor(CHUNK * values, 4, t.new(CHUNK * values, 4))
    if source is None:
        return out

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        negative = t.new(CHUNK * values, 4)
        pieces = [(source, t.new(values, 4)), (source, t.new(values, 4))]
        del negative
        return pieces

    out.node = t.node(4, backward)
    return out


def _masked(k: Block, x: Tensor, mask: Storage) -> Tensor:
    """`masked_fill`."""
    t, values, source = k.t, x.values, x.node
    kept = t.keep(mask) if source is not None else None
    out = Tensor(values, 4, t.new(values, 4))
    if source is not None:
        out.node = t.node(4, lambda grad: [(source, t.new(values, 4))], kept)
    return out


def _after(k: Block, x: Tensor) -> Tensor:
    """`x[..., -1:] - x`."""
    t, values, source, last = k.t, x.values, x.node, _part(k, x, CHUNK)
    out, end = Tensor(values, 4, t.new(values, 4)), last.node
    if source is not None and end is not None:
        out.node = t.node(4, lambda grad: [(end, t.new(values / CHUNK, 4)), (source, t.new(values, 4))])
    return out


def _part(k: Block, x: Tensor, number: int) -> Tensor:
    """One of so many equal parts."""
    return k.slices(x, [x.values / number])[0]


def _solved(k: Block, system: Tensor, right: Tensor) -> Tensor:
    """`torch.linalg.solve_triangular`: keeps the system and the solution."""
    t, values, squares, a, b = k.t, right.values, system.values, system.node, right.node
    out = Tensor(values, 4, t.new(values, 4))
    if a is None or b is None:
        return out

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        piece = t.new(values, 4)
        product = t.new(squares, 4)
        negative = t.new(squares, 4)
        del product
        lower = t.new(squares, 4)
        del negative
        return [(a, lower), (b, piece)]

    out.node = t.node(4, backward, t.keep(system.storage, out.storage))
    return out
