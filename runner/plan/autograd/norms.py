"""Norms and activation functions that are more than one kernel, as transformers 5.23 has them."""

from __future__ import annotations

from runner.plan.autograd.ops import Block, LayerKind, module
from runner.plan.autograd.tape import Node, Storage, Tensor


@module
def rms_norm(k: Block, x: Tensor, kind: LayerKind, features: int = 0) -> Tensor:
    """`LlamaRMSNorm.forward` (Mistral, Mixtral, Qwen, Phi-3): in fp32, then times the weight in x's own width.

    Gemma's stays in fp32 until the end: planned like this, one is up to 1% too large where layers train.
    """
    own, trained = x.width, kind.weights
    features = features or k.shape.hidden_size
    x = k.cast(x, 4)
    x = _over_root(k, x, features)  # in a variable until the end
    width = k.width_of(kind) if trained or k.set.autocast else own
    return k.weigh(k.cast(x, own), features, width, trained)


def _over_root(k: Block, x: Tensor, features: int) -> Tensor:
    """`x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)` for x in fp32; keeps x and the row's root."""
    t, source, values = k.t, x.node, x.values
    squares = t.new(values, 4)
    small = t.new(values / features, 4)
    del squares
    if source is None:
        return Tensor(values, 4, t.new(values, 4))
    kept = t.keep(x.storage, small)
    y = Tensor(values, 4, t.new(values, 4))

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        direct = t.new(values, 4)  # through x · rsqrt
        product = t.new(values, 4)  # gradient of rsqrt, summed over the features
        del product
        mean = t.new(values, 4)  # mean's gradient, written out in full
        power = t.new(values, 4)  # pow(x, 1)
        twice = t.new(values, 4)
        del power
        through = t.new(values, 4)
        del twice, mean
        return [(source, direct), (source, through)]

    y.node = t.node(y.width, backward, kept)
    return y


@module
def layer_norm(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`nn.LayerNorm`: one kernel; autocast runs it in fp32. Keeps x, and mean and deviation of every row."""
    t, features = k.t, k.shape.hidden_size
    x = k.cast(x, 4 if k.set.autocast else x.width)
    values, width, source = x.values, x.width, x.node
    trained = kind.weights
    if source is None and not trained:
        return Tensor(values, width, t.new(values, width))
    leaves = [t.leaf(k.width_of(kind)) for _ in range(2)] if trained else []
    out = Tensor(values, width, t.new(values, width))
    rows = t.new(2 * values / features, 4)
    kept = t.keep(x.storage, rows)

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces = [(source, t.new(values, width))] if source is not None else []
        return pieces + [(leaf, t.new(features, width)) for leaf in leaves]

    out.node = t.node(out.width, backward, kept)
    return out


@module
def gelu_new(k: Block, x: Tensor) -> Tensor:
    """`NewGELUActivation`: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))); autocast raises `pow` to fp32."""
    half = k.scale(x)
    cube = k.pointwise(k.cast(x, 4 if k.set.autocast else x.width))
    cube = k.scale(cube)
    inside = k.add(x, cube)
    del cube
    inside = k.scale(inside)
    shape = k.tanh(inside)
    del inside
    shape = k.copy(shape)
    return k.mul(half, shape)
