"""Rotary positions and attention kernels on the tape."""

from __future__ import annotations

from runner.plan.autograd.ops import BLOCKWISE_QUERIES, Block
from runner.plan.autograd.tape import Node, Storage, Tensor
from runner.plan.model_shape import Shape


def rotate(k: Block, x: Tensor, cos: int, tables: Storage | None = None) -> Tensor:
    """`apply_rotary_pos_emb` for queries or keys: x·cos + rotate_half(x)·sin; `cos` is the tables' width.

    `tables`: those of this layer alone.
    """
    t, values, own, source = k.t, x.values, x.width, x.node
    wide = max(own, cos)
    straight = t.new(values, wide)
    half = t.new(values / 2, own)
    turned = t.new(values, own)
    del half
    crossed = t.new(values, wide)
    del turned
    out = Tensor(values, wide, t.new(values, wide))
    del straight, crossed
    if source is None:
        return out

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        piece = t.new(values, wide)  # · sin
        piece = piece if wide == own else t.new(values, own)
        negative = t.new(values / 2, own)
        first = t.new(values, own)  # the slices' gradients, each in a tensor of full size
        second = t.new(values, own)
        del negative, piece
        del second  # added in place
        straight = t.new(values, wide)  # · cos
        if wide != own:
            straight = t.new(values, own)
        return [(source, first), (source, straight)]

    out.node = t.node(out.width, backward, t.keep(tables))
    return out


def rotates_part(shape: Shape) -> bool:
    """The rest of each head is joined on again (GLM-4 and its mixture)."""
    return shape.rotary_dim < shape.head_dim


def joins(shape: Shape) -> bool:
    """Rotated heads are joined of parts."""
    return rotates_part(shape) or shape.traits.rotation == "split"


def own_tables(shape: Shape) -> bool:
    """Every layer interleaves a part of the cosines and sines for itself (GLM-4)."""
    return shape.traits.rotation == "interleaved" and rotates_part(shape)


def rotate_both(k: Block, q: Tensor, key: Tensor, cos: int) -> tuple[Tensor, Tensor]:
    """The architecture's `apply_rotary_pos_emb`."""
    rotation = k.shape.traits.rotation
    if rotation == "half" and not rotates_part(k.shape):
        return rotate(k, q, cos), rotate(k, key, cos)
    if rotation == "split":
        first = _rotate_split(k, q, cos)
        second = _rotate_split(k, key, cos)
        return first, second
    if rotation == "narrowed":
        own = q.width
        first, second = rotate(k, q, cos), rotate(k, key, cos)
        return k.cast(first, own), k.cast(second, own)
    if rotation == "interleaved" and not own_tables(k.shape):  # Cohere 2: in fp32
        own = q.width
        q, key = k.cast(q, 4), k.cast(key, 4)
        first, second = rotate(k, q, cos), rotate(k, key, cos)
        return k.cast(first, own), k.cast(second, own)
    tables = k.t.new(2 * k.set.s * k.shape.rotary_dim, cos) if own_tables(k.shape) else None
    (q, q_rest), (key, key_rest) = parts(k, q), parts(k, key)
    first, second = rotate(k, q, cos, tables), rotate(k, key, cos, tables)
    first = k.join(first, q_rest)
    second = k.join(second, key_rest)
    return first, second


def _rotate_split(k: Block, x: Tensor, cos: int) -> Tensor:
    """`_apply_rotary_emb` of gpt-oss: each half times cosines and sines, which are half as wide; then joined."""
    first, second = k.chunks(x, [x.values / 2, x.values / 2])
    low = k.subtract(k.times(first, cos), k.times(second, cos))
    high = k.add(k.times(second, cos), k.times(first, cos))
    return k.join(low, high)


def rotate_shared(k: Block, q: Tensor, key: Tensor, cos: int) -> tuple[Tensor, Tensor]:
    """Of latent attention: `apply_rotary_pos_emb_interleave` of DeepSeek-V3, `apply_rotary_emb` of V2."""
    if k.shape.traits.rotation == "complex":
        wide, wide_key = k.cast(q, 4), k.cast(key, 4)
        first = k.cast(k.times(wide, 4), q.width)
        return first, k.cast(k.times(wide_key, 4), key.width)
    halves, key_halves = k.slices(q, [q.values / 2] * 2), k.slices(key, [key.values / 2] * 2)
    first = _paired(k, halves, cos)
    return first, _paired(k, key_halves, cos)


def _paired(k: Block, halves: list[Tensor], cos: int) -> Tensor:
    first, second = halves
    low = k.subtract(k.times(first, cos), k.times(second, cos))
    return k.join(low, k.add(k.times(second, cos), k.times(first, cos)))


def parts(k: Block, x: Tensor) -> list[Tensor]:
    """The first `rotary_dim` features of each head, and the rest."""
    share = k.shape.rotary_dim / k.shape.head_dim
    return k.slices(x, [x.values * share, x.values * (1 - share)])


def rotate_part(k: Block, query: Tensor, key: Tensor, cos: int) -> tuple[Tensor, Tensor]:
    """GPT-NeoX's `apply_rotary_pos_emb`: the first features of each head are rotated, the rest is joined on again."""
    pairs = [parts(k, x) for x in (query, key)]
    turned = [rotate(k, turn, cos) for turn, _ in pairs]
    first, second = (k.join(turn, rest) for turn, (_, rest) in zip(turned, pairs, strict=True))
    return first, second


def mask(k: Block, width: int) -> list[Storage]:
    """The mask that the model makes once: for SDPA bytes, for eager attention numbers in the embeddings' width."""
    if k.set.attention not in ("sdpa", "eager"):
        return []
    masks = 2 if k.shape.traits.windows else 1
    return [k.t.new(masks * k.set.b * k.set.s**2, 1 if k.set.attention == "sdpa" else width)]


def attend(k: Block, q: Tensor, key: Tensor, v: Tensor) -> Tensor:
    """Attention over q [n, heads·d] and key, v [n, kv·d]."""
    if k.set.attention in ("eager", "scores"):
        return _eager(k, q, key, v)
    if k.set.attention == "blockwise":
        return _blockwise(k, q, key, v)
    return _fused(k, q, key, v)


def _fused(k: Block, q: Tensor, key: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2 (`mha_fwd`, `mha_bwd`), or SDPA's memory-efficient kernel, with a mask or once per document.

    The latter wants keys and values for every head; with a mask also that in the arithmetic's width, which every layer
    makes for itself and keeps (`convert_boolean_attn_mask` in torch's attention.cpp). Once per document it keeps what
    it made of each, and what the next layer gets is joined of them.
    """
    t, shape, w, s, b = k.t, k.shape, k.set.width, k.set.s, k.set.b
    masked, apart = k.set.attention == "sdpa", k.set.attention == "per_document"
    if masked or apart:
        key, v = repeat(k, key), repeat(k, v)
    if k.set.autocast:
        q, key, v = k.cast(q, w), k.cast(key, w), k.cast(v, w)
    same, values, narrow, width = key.values == q.values, q.values, key.values, q.width
    said, of_values = v.values * values / narrow, v.values  # heads of values may be narrower
    sources = (q.node, key.node, v.node)
    mask = t.new(b * s * s, width) if masked else None
    kernels = t.new(said, width)
    out = Tensor(said, width, t.new(said, width) if apart else kernels)
    sums = t.new(k.n * shape.num_heads, 4)
    if all(x is None for x in sources):
        return out
    rounded = -(-s // 128) * 128 * b
    padded = -(-shape.head_dim // 32) * 32

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        dq, dk, dv = t.new(values, width), t.new(narrow, width), t.new(of_values, width)
        inner = t.new(rounded * shape.num_heads, 4), t.new(rounded * shape.num_heads * padded, 4)  # softmax_d, dq_accum
        if not same:
            expanded = t.new(2 * values, width)  # dk and dv for every query head, summed at the end
            del expanded
        del inner
        return [(node, g) for node, g in zip(sources, (dq, dk, dv), strict=True) if node is not None]

    kept = t.keep(q.storage, key.storage, v.storage, kernels, sums, mask)
    out.node = t.node(out.width, backward, kept)
    return out


def _blockwise(k: Block, q: Tensor, key: Tensor, v: Tensor) -> Tensor:
    """`Blockwise` of train/varlen_kernels.py: scores of a block at a time; the softmax of a row that is one block is
    kept, that of longer ones computed again in the backward pass."""
    t, shape, w = k.t, k.shape, k.set.width
    if k.set.autocast:
        q, key, v = k.cast(q, w), k.cast(key, w), k.cast(v, w)
    values, narrow, width = q.values, key.values, q.width
    said, of_values = v.values * values / narrow, v.values
    sources = (q.node, key.node, v.node)
    # Of documents as long as a row, which take most; rows of one length are taken together.
    size, rows, s = min(BLOCKWISE_QUERIES, k.set.s), k.set.b, k.set.s
    largest = max(size * (s - s % size), s % size * s)  # of the last whole block of queries, and of the rest
    scores, queries = rows * shape.num_heads * largest, values * size / s
    copies = narrow + of_values if rows > 1 else 0.0  # keys and values, a head after the other
    keep = s <= BLOCKWISE_QUERIES
    parts = t.new(said, width)
    inner = t.new(scores + queries + copies + size * s, width)
    shares: Storage | None = t.new(scores, width)
    del inner
    out = Tensor(said, width, t.new(said, width))  # the documents' joined
    del parts
    if not keep:
        shares = None
    if all(x is None for x in sources):
        return out

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        wide = 4 if s > size else width  # summed over blocks
        dq, dk, dv = t.new(values, width), t.new(narrow, wide), t.new(of_values, wide)
        inner = t.new((2 if keep else 3) * scores + 2 * queries + copies, width)
        del inner
        joined = [t.new(values, width)]
        del dq
        joined.append(t.new(narrow, width))
        del dk
        joined.append(t.new(of_values, width))
        del dv
        return [(node, g) for node, g in zip(sources, joined, strict=True) if node is not None]

    out.node = t.node(out.width, backward, t.keep(q.storage, key.storage, v.storage, shares))
    return out


def repeat(k: Block, x: Tensor) -> Tensor:
    """`repeat_kv`: keys and values for every query head."""
    t, groups = k.t, k.shape.num_heads // k.shape.num_kv_heads
    if groups == 1:
        return x
    values, width, source = x.values, x.width, x.node
    out = Tensor(values * groups, width, t.new(values * groups, width))
    if source is not None:
        out.node = t.node(out.width, lambda grad: [(source, t.new(values, width))])
    return out


def _eager(k: Block, q: Tensor, key: Tensor, v: Tensor) -> Tensor:
    """`eager_attention_forward`: scores [b, heads, s, s], softmax in fp32."""
    keys, values = repeat(k, key), repeat(k, v)
    count = k.set.b * k.shape.num_heads * k.set.s**2
    weights = k.product(q, keys, count)
    weights = k.scale(weights)
    if k.shape.traits.softcap:
        weights = k.scale(k.tanh(k.scale(weights)))
    weights = k.copy(weights, q.width)  # + mask, in the width of the embeddings
    if k.shape.traits.biased_experts:
        weights = k.copy(weights)  # a column of sinks is joined on
    weights = k.tanh(k.cast(weights, 4))  # softmax
    weights = k.cast(weights, q.width)
    out = k.product(weights, values, values.values)
    return k.copy(out)  # .transpose(1, 2).contiguous()
