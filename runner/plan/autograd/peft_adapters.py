"""Linear layers with adapters of PEFT's other types, as PEFT 0.21 computes them (`peft/tuners/<type>/layer.py`)."""

from __future__ import annotations

from collections.abc import Callable

from runner.plan.autograd.ops import Block
from runner.plan.autograd.tape import Node, Storage, Tensor
from runner.plan.model_shape import Matrix
from runner.spec.adapters import Adapter, Layer, oft_block

Base = Callable[[Tensor], Tensor]
"""The frozen layer."""


def project(k: Block, x: Tensor, m: Matrix, adapter: Adapter, base: Base) -> Tensor:
    """The layer with its adapter; a type that is not known counts like the one that takes most, LoHa."""
    match adapter.peft_type:
        case "OFT":
            return _oft(k, x, m, adapter, base)
        case "VERA":
            return _vera(k, x, m, adapter, base)
        case "IA3":
            return _ia3(k, x, m, adapter, base)
        case "LOKR":
            return _built(k, x, m, adapter, base, factors=2)
        case _:
            return _built(k, x, m, adapter, base, factors=1)


def _oft(k: Block, x: Tensor, m: Matrix, adapter: Adapter, base: Base) -> Tensor:
    """`OFTRotationModule.forward`: Cayley's series of each block, then every block of the input times its own."""
    t, w, own = k.t, k.set.width if k.set.autocast else k.set.adapter_width, k.set.adapter_width
    size = oft_block(m.inputs, adapter.arguments)
    values = m.inputs * size  # of all blocks [inputs / size, size, size]
    before = x.width
    x = k.cast(x, own)
    leaf = t.leaf(own)
    skew = t.new(values, own)
    zeros = skew
    skew = t.new(values, own)  # minus its transpose
    del zeros
    total = t.new(values, own)
    powers: list[Storage] = []
    if adapter.arguments["use_cayley_neumann"]:  # every product casts both its factors and keeps them
        products = max(0, adapter.arguments["num_cayley_neumann_terms"] - 2)
        powers = [t.new(values, w) for _ in range(2 * products)]
    del skew
    kept = t.keep(*powers)
    count = adapter.count(Layer(m.name, m.inputs, m.outputs))
    rotation = Tensor(values, own, total)
    rotation.node = t.node(own, lambda grad: [(leaf, t.new(count, own))], kept)
    del total, powers, kept
    rotated = k.product(x, rotation, x.values)
    return base(k.cast(k.cast(rotated, own), before))


def _vera(k: Block, x: Tensor, m: Matrix, adapter: Adapter, base: Base) -> Tensor:
    """`VeraLayer`: λ_b · B(λ_d · A x), with A and B frozen and shared."""
    result, own, rank = base(x), k.set.adapter_width, adapter.arguments["r"]
    width = result.width
    x = k.cast(x, own)
    if adapter.arguments["vera_dropout"]:
        x = k.dropout(x)
    small = k.linear(x, m.inputs, rank, None, width=own, trained=False)
    small = k.weigh(small, rank, own, trained=True)
    wide = k.linear(small, rank, m.outputs, None, width=own, trained=False)
    return k.cast(k.add(result, k.weigh(wide, m.outputs, own, trained=True)), width)


def _ia3(k: Block, x: Tensor, m: Matrix, adapter: Adapter, base: Base) -> Tensor:
    """The input (of a feed-forward layer) or the output times a vector."""
    own = k.set.adapter_width
    if m.name in adapter.arguments["feedforward_modules"]:
        before = x.width
        return base(k.cast(k.weigh(k.cast(x, own), m.inputs, own, trained=True), before))
    result = base(x)
    return k.cast(k.weigh(result, m.outputs, own, trained=True), result.width)


def _built(k: Block, x: Tensor, m: Matrix, adapter: Adapter, base: Base, factors: int) -> Tensor:
    """LoHa and LoKr build the update as a matrix of the weight's size in every pass, and multiply with it."""
    t, own, values = k.t, k.set.adapter_width, m.inputs * m.outputs
    w = k.set.width if k.set.autocast else own
    result = base(x)
    width = result.width
    leaf = t.leaf(own)
    count = adapter.count(Layer(m.name, m.inputs, m.outputs))
    k.weight((id(m), "factors"), count, own, True, w)  # autocast keeps their narrow copies
    wide = own if factors == 2 else w  # Kronecker's left factor is not narrowed by autocast, as products are
    first = t.new(values, wide)
    second = t.new(values, w) if factors == 1 else first
    scaled = t.new(values, wide)
    del first, second
    update = Tensor(values, wide, scaled)
    del scaled

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        share = t.new(values, wide)
        pieces = [t.new(values, own) for _ in range(3 if factors == 1 else 1)]
        del share, pieces
        return [(leaf, t.new(count, own))]

    update.node = t.node(own, backward)
    x = k.cast(x, wide)
    added = k.product(x, update, x.values / m.inputs * m.outputs)
    return k.cast(k.add(result, added), width)
