"""The operations that the supported models are made of, as torch, PEFT and bitsandbytes do them, for the tape.

Every function follows the code it is named for, in the same order and with the same local variables, because
those decide when a tensor dies. b sequences of s tokens; `n` = b·s; widths are bytes per number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runner.plan.shape import Matrix, Shape
from runner.plan.tape import CASTS, Node, Storage, Tape, Tensor

FUSED_ROWS = 4096  # TOKEN_CHUNK_SIZE of trl/kernels/chunked_logprob.py (TRL 1.16)
FUSED_COLUMNS = 32768  # _CHUNKED_LOGPROB_CHUNK_SIZE of trl/trainer/utils.py
MASK = 1  # bytes of a value of a dropout mask


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the shape that decides the memory of a step."""

    b: int
    """Micro batch, in sequences."""
    s: int
    """Tokens per sequence."""
    width: int = 2
    """Bytes of the arithmetic: 2 for bf16 and fp16, 4 for fp32."""
    autocast: bool = True
    """Weights that train are held in fp32 and cast where they are used."""
    trained_width: int = 4
    """Bytes of a trained base weight."""
    frozen_width: int = 2
    """Bytes of a frozen weight that is not quantised."""
    checkpointing: bool = False
    """Every layer is computed again in the backward pass."""
    attention: Literal["flash", "sdpa", "eager"] = "flash"
    """`flash`: no scores and no mask; `sdpa`: a mask for packed rows and keys for every head; `eager`: all scores."""
    head: Literal["fused", "labelled"] = "fused"
    """`fused`: TRL's tiles; `labelled`: logits of the labelled positions (on a CPU)."""
    labelled: float = 1.0
    """Share of the positions that have a label, for `labelled`."""
    rank: int = 0
    """Rank of the adapter; 0 without one."""
    targets: frozenset[str] | None = None
    """Matrices with an adapter; None means every linear one."""
    adapter_width: int = 4
    """Bytes of an adapter's weight: PEFT keeps 4 over a 16-bit base, TRL makes it 2 over a quantised one."""
    dropout: bool = False
    """The adapter drops inputs."""
    base: Literal["16", "nf4", "int8"] = "16"
    """How frozen linear layers are held."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What trains in a layer."""

    weights: bool = False
    adapters: bool = False


class Block:
    """Operations on one tape under one setting."""

    def __init__(self, tape: Tape, shape: Shape, setting: Setting) -> None:
        self.t, self.shape, self.set = tape, shape, setting
        self.n = setting.b * setting.s
        self.matrices = {m.name: m for m in shape.matrices}

    # --- operations of torch ---------------------------------------------------------------------

    def cast(self, x: Tensor, width: int) -> Tensor:
        """`x.to(dtype)`; x itself where nothing changes."""
        if x.width == width:
            return x
        t, values, before, source = self.t, x.values, x.width, x.node
        out = Tensor(values, width, t.new(values, width))
        if source is not None and t.recording:
            out.node = t.node(lambda grad: [(source, t.new(values, before))])
        return out

    def weight(
        self, key: object, values: float, width: int, trained: bool, wanted: int
    ) -> tuple[Storage | None, Node | None]:
        """A parameter as an operation sees it: under autocast a cast copy, made once per forward pass."""
        t = self.t
        leaf = t.leaf() if trained and t.recording else None
        if width == wanted:
            return None, leaf
        name = (t.current, key)
        if name in t.cache:
            return t.cache[name]
        copy = t.new(values, wanted, CASTS)
        node = t.node(lambda grad: [(leaf, t.new(values, width))]) if leaf is not None else None
        if trained:  # autocast caches only what trains
            t.cache[name] = copy, node
        return copy, node

    def linear(
        self, x: Tensor, inputs: int, outputs: int, key: object, *, width: int, trained: bool, factor: float = 1.0
    ) -> Tensor:
        """`x @ W.T` in the arithmetic's width; keeps x if W trains, and W's copy if x needs a gradient."""
        t, w = self.t, self.set.width if self.set.autocast else x.width
        x = self.cast(x, w)
        copy, leaf = self.weight(key, inputs * outputs, width, trained, w)
        rows = x.values / inputs
        out = Tensor(rows * outputs, w, t.new(rows * outputs, w))
        source = x.node
        if t.recording and (source is not None or leaf is not None):
            kept = (x.storage if leaf is not None else None, copy if source is not None else None)

            def backward(grad: Storage, kept: object = kept) -> list[tuple[Node, Storage]]:
                pieces = []
                if source is not None:
                    pieces.append((source, t.new(rows * inputs, w)))
                if leaf is not None:
                    pieces.append((leaf, t.new(inputs * outputs, w)))
                return pieces

            out.node = t.node(backward)
        return out

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, in the wider of both; keeps nothing."""
        t, width = self.t, max(a.width, b.width)
        out = Tensor(a.values, width, t.new(a.values, width))
        nodes = [x.node for x in (a, b) if x.node is not None]
        if nodes and t.recording:
            widths = [x.width for x in (a, b) if x.node is not None]
            values = a.values

            def backward(grad: Storage) -> list[tuple[Node, Storage]]:
                return [(n, grad if w == width else t.new(values, w)) for n, w in zip(nodes, widths, strict=True)]

            out.node = t.node(backward)
        return out

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b; keeps each factor that the other's gradient needs."""
        t, width = self.t, max(a.width, b.width)
        out = Tensor(a.values, width, t.new(a.values, width))
        if t.recording and (a.node is not None or b.node is not None):
            na, nb, wa, wb, values = a.node, b.node, a.width, b.width, a.values
            kept = (b.storage if na is not None else None, a.storage if nb is not None else None)

            def backward(grad: Storage, kept: object = kept) -> list[tuple[Node, Storage]]:
                pieces = []
                for node, own in ((na, wa), (nb, wb)):
                    if node is not None:
                        piece = t.new(values, width)
                        pieces.append((node, piece if own == width else t.new(values, own)))
                return pieces

            out.node = t.node(backward)
        return out

    def scale(self, x: Tensor, width: int | None = None, keep: Storage | None = None) -> Tensor:
        """x times something small that needs no gradient (a number, cos, sin); one new tensor each way."""
        t, values, own, source = self.t, x.values, x.width, x.node
        wide = max(own, width or own)
        out = Tensor(values, wide, t.new(values, wide))
        if source is not None and t.recording:

            def backward(grad: Storage) -> list[tuple[Node, Storage]]:
                piece = t.new(values, wide)
                return [(source, piece if own == wide else t.new(values, own))]

            out.node = t.node(backward)
        return out

    def pointwise(self, x: Tensor, width: int | None = None) -> Tensor:
        """A function whose backward pass needs x (SiLU) or its own result of the same size (tanh)."""
        t, values, own, source = self.t, x.values, x.width, x.node
        out = Tensor(values, own, t.new(values, own))
        if source is not None and t.recording:
            out.node = t.node(lambda grad, kept=x.storage: [(source, t.new(values, own))])  # type: ignore[misc]
        return out

    # --- modules ---------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, key: object, kind: LayerKind, features: int | None = None) -> Tensor:
        """`LlamaRMSNorm.forward`."""
        t, own = self.t, x.width
        features = features or self.shape.hidden_size
        x = self.cast(x, 4)
        source, values = x.node, x.values
        small = t.new(values / features, 4)  # rsqrt(mean of squares + eps)
        squares = t.new(values, 4)
        del squares
        y = Tensor(values, 4, t.new(values, 4))
        if source is not None and t.recording:

            def backward(grad: Storage, kept: object = (x.storage, small)) -> list[tuple[Node, Storage]]:
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

            y.node = t.node(backward)
        del x
        y = self.cast(y, own)
        trained = kind.weights
        width = max(y.width, self.set.trained_width if trained else self.set.frozen_width)
        if not trained and not self.set.autocast:
            width = y.width
        leaf = t.leaf() if trained and t.recording else None
        out = Tensor(values, width, t.new(values, width))
        normed, inner = y.node, y.width
        if t.recording and (normed is not None or leaf is not None):

            def weigh(grad: Storage, kept: object = y.storage if leaf else None) -> list[tuple[Node, Storage]]:
                pieces = []
                if normed is not None:
                    piece = t.new(values, width)
                    pieces.append((normed, piece if inner == width else t.new(values, inner)))
                if leaf is not None:
                    product = t.new(values, width)
                    pieces.append((leaf, t.new(features, width)))
                    del product
                return pieces

            out.node = t.node(weigh)
        return out

    def layer_norm(self, x: Tensor, key: object, kind: LayerKind) -> Tensor:
        """`nn.LayerNorm`: one kernel; autocast runs it in fp32."""
        t = self.t
        x = self.cast(x, 4 if self.set.autocast else x.width)
        values, width, source = x.values, x.width, x.node
        leaf = t.leaf() if kind.weights and t.recording else None
        out = Tensor(values, width, t.new(values, width))
        if t.recording and (source is not None or leaf is not None):

            def backward(grad: Storage, kept: object = x.storage) -> list[tuple[Node, Storage]]:
                return [(source, t.new(values, width))] if source is not None else []

            out.node = t.node(backward)
        return out

    def project(self, x: Tensor, name: str, kind: LayerKind) -> Tensor:
        """A linear layer of the model, quantised or not, with its adapter (PEFT 0.21, `lora.Linear.forward`)."""
        m, setting = self.matrices[name], self.set
        adapted = kind.adapters and m.linear and (setting.targets is None or name in setting.targets)
        if m.linear and setting.base != "16" and not kind.weights:
            result = self.quantised(x, m)
        else:
            width = setting.trained_width if kind.weights else setting.frozen_width
            result = self.linear(x, m.inputs, m.outputs, name, width=width, trained=kind.weights)
        if not adapted:
            return result
        x = self.cast(x, setting.adapter_width)
        dropped = self.dropout(x) if setting.dropout else x
        width = setting.adapter_width
        small = self.linear(dropped, m.inputs, setting.rank, (name, "A"), width=width, trained=True)
        del dropped
        wide = self.linear(small, setting.rank, m.outputs, (name, "B"), width=width, trained=True)
        del small
        wide = self.scale(wide)
        return self.add(result, wide)

    def quantised(self, x: Tensor, m: Matrix) -> Tensor:
        """bitsandbytes 0.50's `MatMul4Bit` and `MatMul8bitLt`: the matrix is unpacked for the time of a product."""
        t, rows, w = self.t, x.values / m.inputs, self.set.width
        x = self.cast(x, w)
        source = x.node
        four = self.set.base == "nf4"
        kept: Storage | None = None
        if four:
            unpacked = t.new(m.inputs * m.outputs, w)
        else:
            unpacked = t.new(x.values, 1)  # the input's int8 copy
            product = t.new(rows * m.outputs, 4)  # int32 sums
        out = Tensor(rows * m.outputs, w, t.new(rows * m.outputs, w))
        if not four:
            del product
        del unpacked
        if source is not None and t.recording:

            def backward(grad: Storage, kept: object = kept) -> list[tuple[Node, Storage]]:
                unpacked = t.new(m.inputs * m.outputs, w)
                piece = t.new(rows * m.inputs, w)
                del unpacked
                return [(source, piece)]

            out.node = t.node(backward)
        return out

    def dropout(self, x: Tensor) -> Tensor:
        """`native_dropout`: keeps a mask of one byte per value."""
        t, values, width, source = self.t, x.values, x.width, x.node
        mask = t.new(values, MASK)
        out = Tensor(values, width, t.new(values, width))
        if source is not None and t.recording:
            out.node = t.node(lambda grad, kept=mask: [(source, t.new(values, width))])  # type: ignore[misc]
        return out

    def rotate(self, x: Tensor, cos_width: int) -> Tensor:
        """`apply_rotary_pos_emb` for queries or keys: x·cos + rotate_half(x)·sin."""
        t, values, own, source = self.t, x.values, x.width, x.node
        wide = max(own, cos_width)
        straight = t.new(values, wide)
        half = t.new(values / 2, own)
        turned = t.new(values, own)
        del half
        crossed = t.new(values, wide)
        del turned
        out = Tensor(values, wide, t.new(values, wide))
        del straight, crossed
        if source is not None and t.recording:

            def crossed_back(grad: Storage) -> list[tuple[Node, Storage]]:
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

            out.node = t.node(crossed_back)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over q [n, heads·d] and k, v [n, kv·d]."""
        if self.set.attention == "eager":
            return self.eager(q, k, v)
        t, shape, w = self.t, self.shape, self.set.width
        if self.set.autocast:
            q, k, v = (self.cast(x, w) for x in (q, k, v))
        n, heads = self.n, shape.num_heads
        if self.set.attention == "sdpa":
            k, v = self.repeat(k), self.repeat(v)
        same = k.values == q.values
        values, narrow = q.values, k.values
        sources = (q.node, k.node, v.node)
        out = Tensor(values, q.width, t.new(values, q.width))
        lse = t.new(n * heads, 4)
        if t.recording and any(x is not None for x in sources):
            kept = (q.storage, k.storage, v.storage, out.storage, lse)
            width = q.width
            rounded = -(-self.set.s // 128) * 128 * self.set.b
            padded = -(-shape.head_dim // 32) * 32

            def backward(grad: Storage, kept: object = kept) -> list[tuple[Node, Storage]]:
                dq, dk, dv = t.new(values, width), t.new(narrow, width), t.new(narrow, width)
                inner = t.new(rounded * heads, 4), t.new(rounded * heads * padded, 4)  # softmax_d, dq_accum
                if not same:
                    expanded = t.new(2 * values, width)  # dk and dv for every query head, summed at the end
                    del expanded
                del inner
                return [(node, g) for node, g in zip(sources, (dq, dk, dv), strict=True) if node is not None]

            out.node = t.node(backward)
        return out

    def repeat(self, x: Tensor) -> Tensor:
        """`repeat_kv`: keys and values for every query head."""
        t, groups = self.t, self.shape.num_heads // self.shape.num_kv_heads
        if groups == 1:
            return x
        values, width, source = x.values, x.width, x.node
        out = Tensor(values * groups, width, t.new(values * groups, width))
        if source is not None and t.recording:
            out.node = t.node(lambda grad: [(source, t.new(values, width))])
        return out

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`eager_attention_forward`: scores [b, heads, s, s], softmax in fp32."""
        t, w = self.t, self.set.width
        keys, values = self.repeat(k), self.repeat(v)
        scores = self.set.b * self.shape.num_heads * self.set.s**2
        weights = self.product(q, keys, scores)
        weights = self.scale(weights)
        weights = self.scale(weights)  # + mask
        weights = self.softmax(weights)
        weights = self.cast(weights, w)
        out = self.product(weights, values, q.values)
        return self.scale(out)  # .transpose(1, 2).contiguous()

    def product(self, a: Tensor, b: Tensor, values: float) -> Tensor:
        """A batched matrix product of two activations."""
        t, w = self.t, self.set.width
        a, b = self.cast(a, w), self.cast(b, w)
        out = Tensor(values, w, t.new(values, w))
        na, nb, va, vb = a.node, b.node, a.values, b.values
        if t.recording and (na is not None or nb is not None):
            kept = (b.storage if na is not None else None, a.storage if nb is not None else None)

            def backward(grad: Storage, kept: object = kept) -> list[tuple[Node, Storage]]:
                pieces = []
                if na is not None:
                    pieces.append((na, t.new(va, w)))
                if nb is not None:
                    pieces.append((nb, t.new(vb, w)))
                return pieces

            out.node = t.node(backward)
        return out

    def softmax(self, x: Tensor) -> Tensor:
        """In fp32; keeps its result."""
        t, values, own, source = self.t, x.values, x.width, x.node
        x = self.cast(x, 4)
        out = Tensor(values, 4, t.new(values, 4))
        if source is not None and t.recording:
            kept, inner = out.storage, x.node
            assert inner is not None
            out.node = t.node(lambda grad, kept=kept: [(inner, t.new(values, 4))])  # type: ignore[misc]
        return out

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as views of one product; their gradients meet in one tensor of full size."""
        shape = self.shape
        d = shape.head_dim
        parts = [self.n * c * d for c in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
        q, key, v = self.views(x, parts)
        return q, key, v

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`chunk(2, dim=-1)`: two views."""
        a, b = self.views(x, [x.values / 2, x.values / 2])
        return a, b

    def views(self, x: Tensor, parts: Sequence[float]) -> list[Tensor]:
        """Views of x; every one's gradient is written into zeros of x's size, which are then added up."""
        t, values, width, source = self.t, x.values, x.width, x.node
        made = [Tensor(part, width, x.storage) for part in parts]
        if source is not None and t.recording:
            for view in made:
                view.node = t.node(lambda grad: [(source, t.new(values, width))])
        return made

    def take(self, x: Tensor, values: float) -> Tensor:
        """`x[index]`: a copy of some rows; the gradient has x's full size."""
        t, every, width, source = self.t, x.values, x.width, x.node
        out = Tensor(values, width, t.new(values, width))
        if source is not None and t.recording:
            out.node = t.node(lambda grad: [(source, t.new(every, width))])
        return out

    def scores(self, values: float, needs_grad: bool) -> Tensor:
        """Router weights spread over the features of a row: next to nothing, but its factor is kept for it."""
        small = Tensor(values, self.set.width, self.t.new(0, 4))
        if needs_grad and self.t.recording:
            small.node = self.t.node(lambda grad: [])
        return small

    def put(self, total: Tensor, part: Tensor) -> Tensor:
        """`total.index_add_(…)`: in place."""
        t, values, width, source = self.t, part.values, total.width, part.node
        before = total.node
        out = Tensor(total.values, width, total.storage, before)
        if source is not None and t.recording:

            def backward(grad: Storage) -> list[tuple[Node, Storage]]:
                pieces = [(source, t.new(values, width))]
                return pieces + ([(before, grad)] if before is not None else [])

            out.node = t.node(backward)
        return out

    def rotate_part(self, q: Tensor, k: Tensor, cos: int) -> tuple[Tensor, Tensor]:
        """Rotary positions on the first `rotary_dim` features of each head; the rest is joined on again."""
        rotated = []
        share = self.shape.rotary_dim / self.shape.head_dim
        pairs = []
        for x in (q, k):
            turn, rest = self.views(x, [x.values * share, x.values * (1 - share)])
            pairs.append((turn, rest))
        turned = [self.rotate(turn, cos) for turn, _ in pairs]
        for (_, rest), turn in zip(pairs, turned, strict=True):
            rotated.append(self.join(turn, rest))
        return rotated[0], rotated[1]

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """`cat((a, b), dim=-1)` in the wider of both; the gradients are views of its own."""
        t, width = self.t, max(a.width, b.width)
        values = a.values + b.values
        out = Tensor(values, width, t.new(values, width))
        nodes = [(x.node, x.values, x.width) for x in (a, b) if x.node is not None]
        if nodes and t.recording:

            def backward(grad: Storage) -> list[tuple[Node, Storage]]:
                return [(n, grad if w == width else t.new(v, w)) for n, v, w in nodes]

            out.node = t.node(backward)
        return out

    def gelu_new(self, x: Tensor) -> Tensor:
        """`NewGELUActivation`: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))); autocast raises `pow` to fp32."""
        half = self.scale(x)
        cube = self.pointwise(self.cast(x, 4 if self.set.autocast else x.width))
        cube = self.scale(cube)
        inside = self.add(x, cube)
        del cube
        inside = self.scale(inside)
        shape = self.kept_result(inside)
        del inside
        shape = self.shift(shape)
        return self.mul(half, shape)

    def kept_result(self, x: Tensor) -> Tensor:
        """tanh: its backward pass needs its result."""
        t, values, own, source = self.t, x.values, x.width, x.node
        out = Tensor(values, own, t.new(values, own))
        if source is not None and t.recording:
            out.node = t.node(lambda grad, kept=out.storage: [(source, t.new(values, own))])  # type: ignore[misc]
        return out

    def shift(self, x: Tensor) -> Tensor:
        """x + a number: a new tensor forward, nothing backward."""
        t, values, own, source = self.t, x.values, x.width, x.node
        out = Tensor(values, own, t.new(values, own))
        if source is not None and t.recording:
            out.node = t.node(lambda grad: [(source, grad)])
        return out
