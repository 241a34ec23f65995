"""Decoder layers of the supported models, for the tape, as transformers 5.23 has them.

Their linear layers, quantised or not, with adapters, are as PEFT 0.21 and bitsandbytes 0.50 have them.
"""

from __future__ import annotations

from collections.abc import Callable

from runner.plan.autograd import peft_adapters
from runner.plan.autograd.attention import attend, joins, parts, rotate, rotate_both, rotate_part, rotate_shared
from runner.plan.autograd.delta_rule import gated_delta_net
from runner.plan.autograd.moe import computed, mixture, routed
from runner.plan.autograd.ops import Block, LayerKind, gelu_new, module, norm
from runner.plan.autograd.tape import AGAIN, Node, Storage, Tensor
from runner.plan.model_shape import Matrix

Layer = Callable[[Block, Tensor, LayerKind, int], Tensor]


@module
def llama(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`LlamaDecoderLayer`, and those of the architectures that put norms elsewhere."""
    if k.shape.traits.layout == "beside":
        return _beside(k, hidden, kind, cos)
    residual = hidden
    hidden = _attention_half(k, hidden, kind, cos)
    hidden = k.add(residual, k.scale(hidden) if k.shape.traits.scaled_residual else hidden)
    residual = hidden
    hidden = _mlp_half(k, hidden, kind)
    hidden = k.add(residual, k.scale(hidden) if k.shape.traits.scaled_residual else hidden)
    return hidden


def _attention_half(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """Attention with its norms."""
    layout = k.shape.traits.layout
    if k.layer.linear is not None:
        return gated_delta_net(k, norm(k, hidden, kind), kind, project)
    if k.shape.latent is not None:
        return _latent_attention(k, norm(k, hidden, kind), kind, cos)
    hidden = _llama_attention(k, hidden if layout == "after" else norm(k, hidden, kind), kind, cos)
    return hidden if layout == "before" else norm(k, hidden, kind)


def _mlp_half(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    """The MLP, or a mixture, with its norms."""
    layout = k.shape.traits.layout
    if layout != "after":
        hidden = norm(k, hidden, kind)
    if k.shape.traits.router not in k.matrices:
        hidden = _llama_mlp(k, hidden, kind)
    else:
        traits = k.shape.traits
        of_experts = _shared_mixture if traits.shared else _gated_mixture if traits.gated_expert else mixture
        hidden = of_experts(k, hidden, kind)
    return hidden if layout == "before" else norm(k, hidden, kind)


def _beside(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`Cohere2DecoderLayer`: attention and MLP read one normed input."""
    residual = hidden
    hidden = norm(k, hidden, kind)
    attended = _llama_attention(k, hidden, kind, cos)
    forward = _llama_mlp(k, hidden, kind)
    hidden = k.add(k.add(residual, attended), forward)
    return hidden


@module
def _llama_attention(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    shape, d, traits = k.shape, k.shape.head_dim, k.shape.traits
    if traits.fused_qkv:
        qkv = project(k, hidden, "qkv_proj", kind)
        q, key, v = k.slices(qkv, [k.n * d * c for c in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)])
    elif traits.gated_attention:
        half = k.n * d * shape.num_heads
        q, gate = k.chunks(project(k, hidden, "q_proj", kind), [half, half])
        gate = k.copy(gate)
        q = norm(k, q, kind, d)
        key = norm(k, project(k, hidden, "k_proj", kind), kind, d)
        v = project(k, hidden, "v_proj", kind)
    elif traits.qk_norm:
        whole = traits.qk_norm == "whole"
        q = norm(k, project(k, hidden, "q_proj", kind), kind, d * shape.num_heads if whole else d)
        key = norm(k, project(k, hidden, "k_proj", kind), kind, d * shape.num_kv_heads if whole else d)
        v = project(k, hidden, "v_proj", kind)
    else:
        q = project(k, hidden, "q_proj", kind)
        key = project(k, hidden, "k_proj", kind)
        v = project(k, hidden, "v_proj", kind)
    if k.layer.table is not None:
        q, key = rotate_both(k, q, key, cos)
    if traits.scaled_queries:
        q = k.scale(q)
    out = attend(k, q, key, v)
    if traits.fused_qkv or (joins(shape) and k.layer.table is not None):
        out = k.copy(out)  # views of one product, and joined ones, turn into heads that lie apart, as does the result
    if traits.gated_attention:
        out = k.mul(out, k.tanh(gate))
    return project(k, out, "o_proj", kind)


@module
def _llama_mlp(k: Block, x: Tensor, kind: LayerKind, down: str = "down_proj") -> Tensor:
    if k.shape.traits.fused_gate_up:
        up = project(k, x, "gate_up_proj", kind)
        gate, up = k.chunks(up, [up.values / 2, up.values / 2])
        up = k.mul(up, k.pointwise(gate))
        return project(k, up, down, kind)
    return project(k, k.mul(k.pointwise(project(k, x, "gate_proj", kind)), project(k, x, "up_proj", kind)), down, kind)


@module
def _shared_mixture(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`Glm4MoeMoE.forward`: the experts of each token, and one for all."""
    hidden = mixture(k, x, kind)
    hidden = k.add(hidden, _llama_mlp(k, x, kind, "mlp.down_proj"))
    return hidden


@module
def _gated_mixture(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`Qwen3_5MoeSparseMoeBlock.forward`: what an expert for all tokens says is multiplied with a gate."""
    said = _llama_mlp(k, x, kind, "mlp.down_proj")
    scores, held = routed(k, x, kind)
    hidden = computed(k, x, scores, kind)
    said = k.spread(said, k.tanh(project(k, x, "shared_expert_gate", kind)))
    hidden = k.add(hidden, said)
    del held
    return hidden


@module
def _latent_attention(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`DeepseekV3Attention.forward`: keys and values are made of one vector for all heads, queries of another."""
    sizes, heads, n = k.shape.latent, k.shape.num_heads, k.n
    assert sizes is not None
    if sizes.query_rank:
        q = project(k, norm(k, project(k, hidden, "q_a_proj", kind), kind, sizes.query_rank), "q_b_proj", kind)
    else:
        q = project(k, hidden, "q_proj", kind)
    plain, turned = k.chunks(q, [n * heads * sizes.plain, n * heads * sizes.rotated])
    compressed = project(k, hidden, "kv_a_proj_with_mqa", kind)
    latent, key_turned = k.chunks(compressed, [n * sizes.rank, n * sizes.rotated])
    latent = norm(k, latent, kind, sizes.rank)
    turned, key_turned = rotate_shared(k, turned, key_turned, cos)
    query = k.join(plain, turned)
    key, v = _expanded(k, latent, key_turned, kind)
    out = attend(k, query, key, v)
    return project(k, out, "o_proj", kind)


def _expanded(k: Block, latent: Tensor, turned: Tensor, kind: LayerKind) -> tuple[Tensor, Tensor]:
    """`expand_kv`: keys are written into a new tensor, what is rotated once for every head."""
    sizes, heads, n = k.shape.latent, k.shape.num_heads, k.n
    assert sizes is not None
    both = project(k, latent, "kv_b_proj", kind)
    plain, v = k.chunks(both, [n * heads * sizes.plain, n * heads * sizes.value_dim])
    size = n * heads * (sizes.plain + sizes.rotated)
    key = Tensor(size, both.width, k.t.new(size, both.width))
    key = k.write(key, plain)
    key = k.write(key, k.expand(turned, heads))
    return key, v


@module
def phi(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`PhiDecoderLayer`: attention and MLP side by side after one norm; residual dropout 0.1 (phi-2's config.json)."""
    residual = hidden
    hidden = norm(k, hidden, kind)
    attended = _phi_attention(k, hidden, kind, cos)
    attended = k.dropout(attended)
    forward = k.dropout(_phi_mlp(k, hidden, kind))
    hidden = k.add(k.add(attended, forward), residual)
    return hidden


@module
def _phi_attention(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    q = project(k, hidden, "q_proj", kind)
    key = project(k, hidden, "k_proj", kind)
    v = project(k, hidden, "v_proj", kind)
    (turn, rest), (key_turn, key_rest) = parts(k, q), parts(k, key)  # variables until the end
    turn, key_turn = rotate(k, turn, cos), rotate(k, key_turn, cos)
    q = k.join(turn, rest)
    key = k.join(key_turn, key_rest)
    out = attend(k, q, key, v)
    out = k.copy(out)  # joined queries lie head by head, and so does the result: reshape copies it
    return project(k, out, "dense", kind)


@module
def _phi_mlp(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    hidden = project(k, hidden, "fc1", kind)
    hidden = gelu_new(k, hidden)
    hidden = project(k, hidden, "fc2", kind)
    return hidden


@module
def gpt_neox(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`GPTNeoXLayer` with parallel attention and MLP (Pythia), fused query_key_value, exact GELU."""
    attended = _neox_attention(k, norm(k, hidden, kind), kind, cos)
    forward = _neox_mlp(k, norm(k, hidden, kind), kind)
    return k.add(k.add(forward, attended), hidden)


@module
def _neox_attention(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    qkv = project(k, hidden, "query_key_value", kind)
    q, key, v = k.chunks(qkv, [qkv.values / 3] * 3)
    q, key = rotate_part(k, q, key, cos)
    out = attend(k, q, key, v)
    out = k.copy(out)
    out = project(k, out, "dense", kind)
    return out


@module
def _neox_mlp(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    hidden = project(k, hidden, "dense_h_to_4h", kind)
    hidden = k.pointwise(hidden)
    hidden = project(k, hidden, "dense_4h_to_h", kind)
    return hidden


@module
def gpt2(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`GPT2Block`: fused c_attn, learned positions, `gelu_new`, dropout 0.1."""
    residual = hidden
    hidden = norm(k, hidden, kind)
    attended = _gpt2_attention(k, hidden, kind)
    hidden = k.add(attended, residual)
    residual = hidden
    hidden = norm(k, hidden, kind)
    forward = _gpt2_mlp(k, hidden, kind)
    hidden = k.add(residual, forward)
    return hidden


@module
def _gpt2_attention(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    qkv = project(k, hidden, "c_attn", kind)
    q, key, v = k.chunks(qkv, [qkv.values / 3] * 3)
    out = attend(k, q, key, v)
    out = project(k, out, "c_proj", kind)
    return k.dropout(out)


@module
def _gpt2_mlp(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    hidden = project(k, hidden, "c_fc", kind)
    hidden = gelu_new(k, hidden)
    hidden = project(k, hidden, "mlp.c_proj", kind)
    return k.dropout(hidden)


LAYERS: dict[str, Layer] = {"llama": llama, "phi": phi, "gpt_neox": gpt_neox, "gpt2": gpt2}


def checkpointed(k: Block, layer: Layer, x: Tensor, kind: LayerKind, cos: int, table: Storage | None = None) -> Tensor:
    """`torch.utils.checkpoint` without re-entry: of a layer only its inputs are kept, and the layer is run again."""
    t = k.t
    kept = Tensor(x.values, x.width, x.storage, AGAIN if x.node is not None else None)

    def run(table: Storage | None = table) -> Tensor:
        k.enter(kind)
        again = t.frame is not None and t.frame.made is not None
        return layer(k, kept if again else x, kind, cos)

    return t.checkpoint(run)


BLOCK = 64  # values of a 4-bit weight that share a scale (runner/plan/quantization.py)


@module
def project(k: Block, x: Tensor, name: str, kind: LayerKind) -> Tensor:
    """A linear layer by its name: `lora.Linear.forward`, and the same of `Linear4bit` and `Linear8bitLt`."""
    m, setting = k.matrices[name], k.set
    quantised = setting.base != "16" and not kind.weights
    adapted = kind.adapters and m.adapted(setting.targets, by_name=setting.peft is not None)
    if adapted and setting.peft is not None:
        return peft_adapters.project(k, x, m, setting.peft, lambda x: _base(k, x, m, kind, quantised))
    result = _base(k, x, m, kind, quantised)
    if not adapted:
        return result
    if quantised and setting.base == "nf4":
        result = k.copy(result)
    if not setting.autocast or (not quantised and (setting.dropout or setting.dora)):
        x = k.cast(x, setting.adapter_width)  # else autocast does it (`leave_casts_to_autocast`)
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
        out.node = t.node(out.width, _through(k, m, source, rows, w))
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
        out.node = t.node(out.width, _through(k, m, source, rows, w))
    return out


def _through(k: Block, m: Matrix, source: Node, rows: float, w: int) -> Callable[[Storage], list[tuple[Node, Storage]]]:
    """The backward pass of a frozen packed matrix: it is unpacked once more for the gradient of the input."""

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        unpacked = k.t.new(m.inputs * m.outputs, w)
        piece = k.t.new(rows * m.inputs, w)
        del unpacked
        return [(source, piece)]

    return backward
