"""Linear layers of a model, quantised or not, with their adapters, as PEFT 0.21 and bitsandbytes 0.50 do them."""

from __future__ import annotations

from runner.plan.autograd import peft_adapters
from runner.plan.autograd.ops import Block, LayerKind, module
from runner.plan.autograd.tape import Node, Storage, Tensor
from runner.plan.model_shape import Matrix

BLOCK = 64  # values of a 4-bit weight that share a scale (runner/plan/quantization.py)


@module
def project(k: Block, x: Tensor, name: str, kind: LayerKind) -> Tensor:
    """A linear layer by its name: `lora.Linear.forward`, and the same of `Linear4bit` and `Linear8bitLt`."""
    m, setting = k.matrices[name], k.set
    quantised = setting.base != "16" and not kind.weights
    adapted = kind.adapters and (setting.targets is None or m.name in setting.targets)
    if adapted and setting.peft is not None:
        return peft_adapters.project(k, x, m, setting.peft, lambda x: _base(k, x, m, kind, quantised))
    result = _base(k, x, m, kind, quantised)
    if not adapted:
        return result
    if quantised and setting.base == "nf4":
        result = k.copy(result)
    if not quantised or not setting.autocast:
        x = k.cast(x, setting.adapter_width)
    own = result.width
    if setting.dora:
        result = k.add(result, _dora(k, x, result, m, quantised))
    else:
        small = _lora_a(k, k.dropout(x) if setting.dropout else x, m)
        result = k.add(result, k.scale(_lora_b(k, small, m)))
    return k.cast(result, own)


@module
def _base(k: Block, x: Tensor, m: Matrix, kind: LayerKind, quantised: bool) -> Tensor:
    if quantised:
        return _nf4(k, x, m) if k.set.base == "nf4" else _int8(k, x, m)
    return k.linear(x, m.inputs, m.outputs, id(m), width=k.width_of(kind), trained=kind.weights, bias=m.bias)


@module
def _lora_a(k: Block, x: Tensor, m: Matrix) -> Tensor:
    return k.linear(x, m.inputs, k.set.rank, (id(m), "A"), width=k.set.adapter_width, trained=True)


@module
def _lora_b(k: Block, x: Tensor, m: Matrix) -> Tensor:
    return k.linear(x, k.set.rank, m.outputs, (id(m), "B"), width=k.set.adapter_width, trained=True)


@module
def _dora(k: Block, x: Tensor, result: Tensor, m: Matrix, quantised: bool) -> Tensor:
    """`DoraLinearVariant.forward`: builds the whole update, and its sum with the weight, to measure the rows."""
    t, values, setting = k.t, m.inputs * m.outputs, k.set
    base = None if setting.dropout else result
    x = k.dropout(x) if setting.dropout else x
    wide, w = x.width, setting.width if setting.autocast else setting.adapter_width
    eye = t.new(m.inputs**2, setting.adapter_width)
    narrow = t.new(m.inputs**2, w) if w != setting.adapter_width else eye
    if t.promises():  # lora_A keeps it as long as the update is there, which a checkpoint's first pass does not
        del narrow
    update = t.new(values, w)
    del eye
    if wide != w:
        update = t.new(values, wide)
    weight = t.new(values, setting.width) if quantised else None
    if wide != setting.width:
        weight = t.new(values, wide)
    scaled = t.new(values, wide)
    summed = t.new(values, wide)
    del scaled, summed
    low = _lora_b(k, _lora_a(k, x, m), m)
    if base is None:
        base = k.linear(x, m.inputs, m.outputs, None, width=wide, trained=False)
    elif m.bias:
        base = k.copy(base)  # base_result - bias
    stretched = k.weigh(base, m.outputs, 4, trained=True)
    out = k.add(stretched, k.scale(k.weigh(low, m.outputs, 4, trained=True)))
    del update, weight
    return out


def _nf4(k: Block, x: Tensor, m: Matrix) -> Tensor:
    """`MatMul4Bit`: the matrix and its scales are unpacked for the time of a product; nothing is kept."""
    t, rows, w, source = k.t, x.values / m.inputs, k.set.width, x.node
    x = k.cast(x, w)
    scales = t.new(2 * m.inputs * m.outputs / BLOCK, 4)
    unpacked = t.new(m.inputs * m.outputs, w)
    out = Tensor(rows * m.outputs, w, t.new(rows * m.outputs, w))
    del unpacked, scales
    if source is not None:

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            unpacked = t.new(m.inputs * m.outputs, w)
            piece = t.new(rows * m.inputs, w)
            del unpacked
            return [(source, piece)]

        out.node = t.node(out.width, backward)
    return out


def _int8(k: Block, x: Tensor, m: Matrix) -> Tensor:
    """`MatMul8bitLt` without outliers: keeps its input where no checkpoint sees it, until the loss goes."""
    t, rows, w, source = k.t, x.values / m.inputs, x.width, x.node
    half = t.new(x.values, 2)  # the input in fp16
    codes = t.new(x.values, 1)
    magnitudes, mask = t.new(x.values, 2), t.new(x.values, 1)
    del magnitudes, mask, half
    sums = t.new(rows * m.outputs, 4)
    product = t.new(rows * m.outputs, 2)
    del sums
    out = Tensor(rows * m.outputs, w, t.new(rows * m.outputs, w))
    del product, codes
    if source is not None:
        t.hold(x.storage)

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            unpacked = t.new(m.inputs * m.outputs, w)
            piece = t.new(rows * m.inputs, w)
            del unpacked
            return [(source, piece)]

        out.node = t.node(out.width, backward)
    return out
