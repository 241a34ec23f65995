"""Embedding, final norm, and head with loss, on the tape."""

from __future__ import annotations

from runner.plan.autograd.ops import Block, LayerKind, norm
from runner.plan.autograd.tape import HEAD, Node, Storage, Tensor

FUSED_ROWS = 4096  # TOKEN_CHUNK_SIZE of trl/kernels/chunked_logprob.py (TRL 1.16)
FUSED_COLUMNS = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py
STATISTICS = 7  # fp32 vectors of a row's running maximum, sums and flags in `ChunkedLogProbFunction.forward`
LEFT = 4  # fp32 vectors that stay: log-probabilities, entropy, log z, and the loss's own


def embed(k: Block, kind: LayerKind, needs_grad: bool) -> tuple[Tensor, list[Storage]]:
    """Token embeddings [n, h] in the weights' own width; their gradient is dense.

    `needs_grad`: `enable_input_require_grads`, for checkpoints over frozen embeddings. Returned beside them:
    what the model's `forward` has in its variables until it returns: `inputs_embeds`, `position_embeds`.
    """
    t, shape, width = k.t, k.shape, k.width_of(kind)
    values = k.n * shape.hidden_size
    out = Tensor(values, width, t.new(values, width))
    if kind.weights:
        table = shape.vocab_size * shape.hidden_size
        if shape.tie_embeddings:  # the head has put its gradient there already

            def dropped(grad: Storage) -> list[tuple[Node, Storage]]:
                t.new(table, width)
                return []

            out.node = t.node(out.width, dropped)
        else:
            leaf = t.leaf(width)
            out.node = t.node(out.width, lambda grad: [(leaf, t.new(table, width))])
    if shape.traits.scaled_embedding == "inside":
        out = k.scale(out)
    if needs_grad and not kind.weights:
        out.node = t.leaf(width, trained=False)
        t.hold(out.storage)  # the graph holds its leaf
    if shape.traits.family == "gpt2":
        positions = t.new(k.set.s * shape.hidden_size, width)
        return k.dropout(k.copy(out)), [out.storage, positions]
    if shape.traits.scaled_embedding == "outside":
        out = k.scale(out)
    return out, [out.storage]


class Inner:
    """The inner model's `forward`: what its variables hold until it returns the normed output of the last layer."""

    __slots__ = ("hidden", "others")

    def __init__(self, hidden: Tensor, others: list[Storage]) -> None:
        self.hidden, self.others = [hidden], others

    def normed(self, k: Block, kind: LayerKind) -> Tensor:
        """The last norm; nothing else is left afterwards."""
        out = norm(k, self.hidden.pop(), kind)
        self.others.clear()
        return out


def head(k: Block, inner: Inner, norm: LayerKind, kind: LayerKind) -> Tensor:
    """The last norm and the loss: TRL's fused head, tile by tile; on a CPU the labelled rows' logits; or a number."""
    if k.set.head == "number":  # the loss over its few values is next to nothing
        hidden = inner.normed(k, norm)
        width = k.width_of(kind)
        return k.linear(hidden, k.shape.hidden_size, 1, "score", width=width, trained=kind.weights)
    return fused(k, inner, norm, kind) if k.set.head == "fused" else labelled(k, inner, norm, kind)


def fused(k: Block, inner: Inner, norm: LayerKind, kind: LayerKind) -> Tensor:
    """`ChunkedLogProbFunction` of TRL 1.16 on the rows `hidden[mask]`, every position labelled."""
    t, shape, setting = k.t, k.shape, k.set
    hidden = inner.normed(k, norm)
    n, h, v = k.n - setting.b, shape.hidden_size, shape.vocab_size  # the last position of a row predicts nothing
    w = setting.width if setting.autocast else hidden.width
    width, own = k.width_of(kind), hidden.width
    sliced = _sliced(k, hidden)
    index = t.new(2 * n, 8)  # nonzero(mask)
    rows = k.take(sliced, n * h)
    del index
    statistics = t.new(STATISTICS * n, 4, HEAD)
    _tiles(k, n, own, width, w, keeps_weight=False)
    del statistics
    source = rows.node
    loss = Tensor(1, 4, t.new(LEFT * n, 4, HEAD))
    leaf = t.leaf(width) if kind.weights else None
    if source is None and leaf is None:
        return loss

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        pieces: list[tuple[Node, Storage]] = []
        gradient = t.new(n * h, 4, HEAD) if source is not None else None
        weight = t.new(v * h, 4, HEAD) if leaf is not None else None
        working = _tiles(k, n, own, width, w, keeps_weight=True)
        if gradient is not None and source is not None:
            pieces.append((source, gradient if own == 4 else t.new(n * h, own)))
        if weight is not None and leaf is not None:
            pieces.append((leaf, weight if width == 4 else t.new(v * h, width)))
        del working
        return pieces

    loss.node = t.node(loss.width, backward, t.keep(rows.storage, loss.storage))
    return loss


def _tiles(k: Block, n: int, own: int, width: int, w: int, *, keeps_weight: bool) -> list[Storage | None]:
    """The loop over rows and columns; what its variables still hold at its end. Two rounds show every case."""
    t, h = k.t, k.shape.hidden_size
    made: list[Storage | None] = [t.new(min(n, FUSED_ROWS) * FUSED_COLUMNS, w, HEAD)]
    chunk = part = None
    for rows in _parts(n, FUSED_ROWS):
        chunk = t.new(rows * h, w, HEAD) if own != w else None
        for columns in _parts(k.shape.vocab_size, FUSED_COLUMNS):
            part = t.new(columns * h, w, HEAD) if width != w else None
            if not keeps_weight:  # a temporary in the forward pass, a variable in the backward pass
                part = None
    return [*made, chunk, part]


def _parts(total: int, most: int) -> list[int]:
    """The sizes of the first two of `total`'s chunks of `most`."""
    return [size for size in (min(total, most), min(total - most, most)) if size > 0]


def _sliced(k: Block, hidden: Tensor) -> Tensor:
    """`hidden[:, :-1]`: a view; its gradient is written into zeros of full size."""
    return k.slices(hidden, [hidden.values])[0]


def labelled(k: Block, inner: Inner, norm: LayerKind, kind: LayerKind) -> Tensor:
    """`UnguardedSftTrainer.compute_loss` on a CPU: logits in the arithmetic's width, then in fp32, then log-softmax."""
    t = k.t
    logits = _logits(k, inner, norm, kind)
    wide = k.cast(logits, 4)
    values = logits.values
    logs = t.new(values, 4, HEAD)
    loss = Tensor(1, 4, t.new(1, 4, HEAD))
    source = wide.node
    if source is not None:

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            chosen = t.new(values, 4, HEAD)  # the gradient of nll_loss, zeros but for the labels
            piece = t.new(values, 4, HEAD)
            del chosen
            return [(source, piece)]

        loss.node = t.node(loss.width, backward, t.keep(logs))
    return loss


def _logits(k: Block, inner: Inner, norm: LayerKind, kind: LayerKind) -> Tensor:
    shape = k.shape
    hidden = inner.normed(k, norm)
    rows = (k.n - k.set.b) * k.set.labelled
    taken = k.take(hidden, rows * shape.hidden_size)
    out = k.linear(taken, shape.hidden_size, shape.vocab_size, "lm_head", width=k.width_of(kind), trained=kind.weights)
    if shape.traits.scaled_logits:
        out = k.scale(out)
    return k.scale(k.tanh(k.scale(out))) if shape.traits.capped_logits else out
