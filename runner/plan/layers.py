"""Decoder layers, embedding and head of the supported models, for the tape, as transformers 5.23 has them."""

from __future__ import annotations

from collections.abc import Callable

from runner.plan.blocks import FUSED_COLUMNS, FUSED_ROWS, Block, LayerKind
from runner.plan.tape import HEAD, Node, Storage, Tensor

Layer = Callable[[Block, Tensor, LayerKind, int], Tensor]


def llama(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`LlamaDecoderLayer`; Mistral, Mixtral, Qwen and Gemma differ in what `_llama_mlp` and the norms do."""
    residual = hidden
    hidden = k.rms_norm(hidden, "input_layernorm", kind)
    hidden = _llama_attention(k, hidden, kind, cos)
    hidden = k.add(residual, hidden)
    residual = hidden
    hidden = k.rms_norm(hidden, "post_attention_layernorm", kind)
    hidden = _experts(k, hidden, kind) if k.shape.num_experts else _llama_mlp(k, hidden, kind)
    return k.add(residual, hidden)


def _llama_attention(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    if "qkv_proj" in k.matrices:
        q, key, v = k.split(k.project(hidden, "qkv_proj", kind))
    else:
        q = k.project(hidden, "q_proj", kind)
        if k.shape.qk_norm:
            q = k.rms_norm(q, "q_norm", kind, k.shape.head_dim)
        key = k.project(hidden, "k_proj", kind)
        if k.shape.qk_norm:
            key = k.rms_norm(key, "k_norm", kind, k.shape.head_dim)
        v = k.project(hidden, "v_proj", kind)
    q, key = k.rotate(q, cos), k.rotate(key, cos)
    out = k.attend(q, key, v)
    return k.project(out, "o_proj", kind)


def _llama_mlp(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    if "gate_up_proj" in k.matrices:
        gate, up = k.halves(k.project(x, "gate_up_proj", kind))
        return k.project(k.mul(up, k.pointwise(gate)), "down_proj", kind)
    return k.project(
        k.mul(k.pointwise(k.project(x, "gate_proj", kind)), k.project(x, "up_proj", kind)), "down_proj", kind
    )


def _experts(k: Block, x: Tensor, kind: LayerKind) -> Tensor:
    """`MixtralExperts.forward`, with the tokens spread evenly over the experts."""
    shape, setting = k.shape, k.set
    width = setting.trained_width if kind.weights else setting.frozen_width
    rows = x.values / shape.hidden_size
    each = rows * shape.experts_per_token / shape.num_experts
    h, f = shape.hidden_size, shape.intermediate_size
    k.linear(x, h, shape.num_experts, "router", width=width, trained=kind.weights)
    total = Tensor(x.values, x.width, k.t.new(x.values, x.width))
    for expert in range(shape.num_experts):
        state = k.take(x, each * h)
        gate, up = k.halves(k.linear(state, h, 2 * f, ("gate_up", expert), width=width, trained=kind.weights))
        state = k.mul(k.pointwise(gate), up)
        state = k.linear(state, f, h, ("down", expert), width=width, trained=kind.weights)
        state = k.mul(state, k.scores(each * h, x.node is not None))
        total = k.put(total, state)
    return total


def phi(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`PhiDecoderLayer`: attention and MLP side by side after one norm; residual dropout 0.1 (phi-2's config.json)."""
    residual = hidden
    hidden = k.layer_norm(hidden, "input_layernorm", kind)
    attended = k.dropout(_phi_attention(k, hidden, kind, cos))
    forward = k.dropout(_phi_mlp(k, hidden, kind))
    return k.add(k.add(attended, forward), residual)


def _phi_attention(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    q = k.project(hidden, "q_proj", kind)
    key = k.project(hidden, "k_proj", kind)
    v = k.project(hidden, "v_proj", kind)
    q, key = k.rotate_part(q, key, cos)
    out = k.scale(k.attend(q, key, v))  # joined queries lie head by head, and so does the result: reshape copies it
    return k.project(out, "dense", kind)


def _phi_mlp(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    hidden = k.project(hidden, "fc1", kind)
    hidden = k.gelu_new(hidden)
    return k.project(hidden, "fc2", kind)


def gpt_neox(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`GPTNeoXLayer` with parallel attention and MLP (Pythia), fused query_key_value, exact GELU."""
    normed = k.layer_norm(hidden, "input_layernorm", kind)
    q, key, v = k.split(k.project(normed, "query_key_value", kind))
    del normed
    q, key = k.rotate_part(q, key, cos)
    attended = k.project(k.scale(k.attend(q, key, v)), "dense", kind)
    forward = k.project(k.layer_norm(hidden, "post_attention_layernorm", kind), "dense_h_to_4h", kind)
    forward = k.project(k.pointwise(forward), "dense_4h_to_h", kind)
    return k.add(k.add(forward, attended), hidden)


def gpt2(k: Block, hidden: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`GPT2Block`: fused c_attn, learned positions, `gelu_new`, dropout 0.1."""
    residual = hidden
    q, key, v = k.split(k.project(k.layer_norm(hidden, "ln_1", kind), "c_attn", kind))
    out = k.dropout(k.project(k.attend(q, key, v), "c_proj", kind))
    del q, key, v
    hidden = k.add(out, residual)
    residual = hidden
    forward = k.project(k.gelu_new(k.project(k.layer_norm(hidden, "ln_2", kind), "c_fc", kind)), "mlp.c_proj", kind)
    return k.add(residual, k.dropout(forward))


LAYERS: dict[str, Layer] = {"llama": llama, "phi3": llama, "phi": phi, "gpt_neox": gpt_neox, "gpt2": gpt2}


def checkpointed(k: Block, layer: Layer, x: Tensor, kind: LayerKind, cos: int) -> Tensor:
    """`torch.utils.checkpoint` without re-entry: only the layer's input is kept, and the layer is run again."""
    t = k.t
    if x.node is None and not (kind.weights or kind.adapters):
        return layer(k, x, kind, cos)
    t.recording = False
    out = layer(k, x, kind, cos)
    t.recording = True
    source, kept = x.node, Tensor(x.values, x.width, x.storage)

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        outer, t.nodes = t.nodes, []
        cache, t.cache = t.cache, {}
        kept.node = t.leaf(trained=False) if source is not None else None
        inner, again = kept.node, layer(k, kept, kind, cos)
        root, nodes = again.node, t.nodes
        del again
        t.cache = {}
        assert root is not None
        t.run(nodes, root, grad)
        t.nodes, t.cache = outer, cache
        if source is None or inner is None or inner.grad is None:
            return []
        return [(source, inner.grad)]

    out.node = t.node(backward)
    return out


def embed(k: Block, kind: LayerKind) -> Tensor:
    """Token embeddings [n, h] in the weights' own width; their gradient is dense."""
    t, shape, setting = k.t, k.shape, k.set
    width = setting.trained_width if kind.weights else setting.frozen_width
    values = k.n * shape.hidden_size
    out = Tensor(values, width, t.new(values, width))
    if kind.weights:
        leaf = t.leaf()
        table = shape.vocab_size * shape.hidden_size
        if shape.tie_embeddings:  # the head has put its gradient there already
            out.node = t.node(lambda grad: _dropped(t.new(table, width)))
        else:
            out.node = t.node(lambda grad: [(leaf, t.new(table, width))])
    return out


def _dropped(piece: Storage) -> list[tuple[Node, Storage]]:
    return []


def final_norm(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    """The norm after the last layer."""
    if k.shape.family in ("llama", "phi3"):
        return k.rms_norm(hidden, "norm", kind)
    return k.layer_norm(hidden, "norm", kind)


def head(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    """Loss of [n, h]: TRL's fused head, tile by tile, or (on a CPU) the labelled positions' logits at once."""
    return fused(k, hidden, kind) if k.set.head == "fused" else labelled(k, hidden, kind)


def fused(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    """`_ChunkedLogProbFunction` of TRL 1.16, every position labelled."""
    t, shape, setting = k.t, k.shape, k.set
    n, h, v = k.n, shape.hidden_size, shape.vocab_size
    rows, columns = min(n, FUSED_ROWS), min(v, FUSED_COLUMNS)
    w = setting.width if setting.autocast else hidden.width
    width = setting.trained_width if kind.weights else setting.frozen_width
    own, source = hidden.width, hidden.node
    if setting.b > 1:  # [:, :-1] is no longer in one piece: reshape copies it
        hidden = Tensor(n * h, own, t.new(n * h, own), source)
    statistics = t.new(8 * n, 4, HEAD)

    def tiles(chunks: int) -> list[Storage]:
        made = [t.new(rows * FUSED_COLUMNS, w, HEAD)]
        if own != w:
            made.append(t.new(rows * h, w, HEAD))
        if width != w:
            made.append(t.new(columns * h * (chunks if v > FUSED_COLUMNS else 1), w, HEAD))
        return made

    working = tiles(1)
    del working, statistics
    loss = Tensor(1, 4, t.new(4 * n, 4, HEAD))
    leaf = t.leaf() if kind.weights else None

    def backward(grad: Storage, kept: object = (hidden.storage, loss.storage)) -> list[tuple[Node, Storage]]:
        pieces: list[tuple[Node, Storage]] = []
        gradient = t.new(n * h, 4, HEAD) if source is not None else None
        weight = t.new(v * h, 4, HEAD) if leaf is not None else None
        working = tiles(2)
        if gradient is not None and source is not None:
            pieces.append((source, gradient if own == 4 else t.new(n * h, own)))
        if weight is not None and leaf is not None:
            pieces.append((leaf, weight if width == 4 else t.new(v * h, width)))
        del working
        return pieces

    if source is not None:
        source = t.node(_sliced(k, source, own))
    loss.node = t.node(backward)
    return loss


def _sliced(k: Block, source: Node, width: int) -> Callable[[Storage], list[tuple[Node, Storage]]]:
    """`hidden[:, :-1]`: its gradient is written into zeros of full size."""
    t, values = k.t, k.n * k.shape.hidden_size
    return lambda grad: [(source, t.new(values, width))]


def labelled(k: Block, hidden: Tensor, kind: LayerKind) -> Tensor:
    """`CountingTrainer.compute_loss` on a CPU: logits in the arithmetic's width, then in fp32, then log-softmax."""
    t, shape, setting = k.t, k.shape, k.set
    rows, h, v = k.n * setting.labelled, shape.hidden_size, shape.vocab_size
    width = setting.trained_width if kind.weights else setting.frozen_width
    source, own = hidden.node, hidden.width
    taken = Tensor(rows * h, own, t.new(rows * h, own))
    if source is not None:
        taken.node = t.node(_sliced(k, source, own))
    logits = k.linear(taken, h, v, "lm_head", width=width, trained=kind.weights)
    del taken
    logits = k.cast(logits, 4)
    values = rows * v
    logs = t.new(values, 4, HEAD)
    loss = Tensor(1, 4, t.new(1, 4, HEAD))
    inner = logits.node
    if inner is not None:

        def backward(grad: Storage, kept: object = logs) -> list[tuple[Node, Storage]]:
            chosen = t.new(values, 4, HEAD)  # the gradient of nll_loss, zeros but for the labels
            piece = t.new(values, 4, HEAD)
            del chosen
            return [(inner, piece)]

        loss.node = t.node(backward)
    return loss
