"""The setting of a step, and torch's operations on the tape.

Every operation allocates, keeps and frees like torch's, in the same order: that decides when a tensor dies.
b rows of s tokens; `n` = b·s; widths are bytes per number. Norms and activation functions that are more than one kernel
are as transformers 5.23 has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

from runner.plan.autograd.tape import CASTS, Bundle, Node, Storage, Tape, Tensor
from runner.plan.model_shape import Matrix, Shape
from runner.spec.adapters import Adapter

MASK = 1  # bytes of a value of a dropout mask
P = ParamSpec("P")
R = TypeVar("R")


def module(forward: Callable[P, R]) -> Callable[P, R]:
    """A function that is an `nn.Module`'s: its arguments live until it returns, as in `Module.__call__`."""

    @wraps(forward)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return forward(*args, **kwargs)

    return call


AttentionKernel = Literal["flash", "blockwise", "per_document", "scores", "sdpa", "eager"]
"""`flash`: no scores and no mask. `blockwise`: `varlen` on a CPU, which keeps queries, keys and values, and in
rows of up to `BLOCKWISE_QUERIES` the softmax of the scores. `per_document`:
`varlen` on a GPU without a flash kernel: SDPA without a mask, and keys for every head. `scores`: `varlen` where scores
are capped, which holds those of each document, counted like `eager`'s. `sdpa`: one with a mask. `eager`: all scores."""
BLOCKWISE_QUERIES = 256
"""Queries whose scores `blockwise` holds at once: `BLOCK` in train/varlen_kernels.py."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the shape that decides the memory of a step."""

    b: int
    """Rows of a micro batch: its sequences, or 1 where they are packed."""
    s: int
    """Tokens per row."""
    width: int = 2
    """Bytes of the arithmetic: 2 for bf16 and fp16, 4 for fp32."""
    autocast: bool = True
    """Weights that train are held in fp32 and cast where they are used."""
    trained_width: int = 4
    """Bytes of a trained base weight."""
    frozen_width: int = 2
    """Bytes of a frozen weight that is not quantised."""
    checkpointing: int = 0
    """n where every n-th layer, from the first, is computed again in the backward pass: 1 for all, 0 for none."""
    attention: AttentionKernel = "flash"
    head: Literal["fused", "labelled", "number"] = "fused"
    """`fused`: TRL's tiles; `labelled`: logits of the labelled positions (on a CPU); `number`: one each."""
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
    dora: bool = False
    """The adapter is a DoRA: it also trains the length of every row."""
    peft: Adapter | None = None
    """The adapter, where it is not one of LoRA."""
    base: Literal["16", "nf4", "int8"] = "16"
    """How frozen linear layers are held."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Trained parts of a layer."""

    weights: bool = False
    adapters: bool = False
    variant: int = 0
    """Which of the shape's `kinds` it is."""
    again: bool = False
    """It is computed again in the backward pass."""


def _named(matrices: tuple[Matrix, ...]) -> dict[str, Matrix]:
    named: dict[str, Matrix] = {}
    for m in matrices:  # GPT-2 has a c_proj in its attention and one in its MLP
        named[f"mlp.{m.name}" if m.name in named else m.name] = m
    return named


class Block:
    """Operations on one tape under one setting."""

    def __init__(self, tape: Tape, shape: Shape, setting: Setting) -> None:
        self.t, self.shape, self.set = tape, shape, setting
        self.n = setting.b * setting.s
        self.by_kind = [_named(layer.matrices) for layer in shape.kinds]
        self.layer, self.matrices = shape.kinds[0], self.by_kind[0]

    def enter(self, kind: LayerKind) -> None:
        """A layer of this kind begins."""
        self.layer, self.matrices = self.shape.kinds[kind.variant], self.by_kind[kind.variant]

    def width_of(self, kind: LayerKind) -> int:
        """Bytes of a weight that is not quantised."""
        return self.set.trained_width if kind.weights else self.set.frozen_width

    def cast(self, x: Tensor, width: int) -> Tensor:
        """`x.to(dtype)`; x itself where nothing changes."""
        if x.width == width:
            return x
        t, values, before, source = self.t, x.values, x.width, x.node
        out = Tensor(values, width, t.new(values, width))
        if source is not None:
            out.node = t.node(out.width, lambda grad: [(source, t.new(values, before))])
        return out

    def weight(
        self, key: object, values: float, width: int, trained: bool, wanted: int
    ) -> tuple[Storage | None, Node | None]:
        """A parameter as an operation sees it: under autocast a cast copy, made once per forward pass."""
        t = self.t
        if width == wanted:
            return None, t.leaf(width) if trained else None
        name = (t.current, key)
        if name in t.cache:
            return t.cache[name]
        leaf = t.leaf(width) if trained else None
        copy = t.new(values, wanted, CASTS)
        node = t.node(wanted, lambda grad: [(leaf, t.new(values, width))]) if leaf is not None else None
        if trained:  # autocast caches only what trains
            t.cache[name] = copy, node
        return copy, node

    def linear(
        self, x: Tensor, inputs: int, outputs: int, key: object, *, width: int, trained: bool, bias: bool = False
    ) -> Tensor:
        """`x @ W.T` in the arithmetic's width; keeps x if W trains, and W's copy if x needs a gradient."""
        t, w = self.t, self.set.width if self.set.autocast else x.width
        x = self.cast(x, w)
        copy, leaf = self.weight(key, inputs * outputs, width, trained, w)
        rows, source = x.values / inputs, x.node
        if source is None and leaf is None:
            return Tensor(rows * outputs, w, t.new(rows * outputs, w))
        kept = t.keep(x.storage if leaf is not None else None, copy if source is not None else None)
        out = Tensor(rows * outputs, w, t.new(rows * outputs, w))
        other = t.leaf(width) if bias and leaf is not None else None

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            pieces = []
            if source is not None:
                product = t.new(rows * inputs, w)
                product.viewed = True  # of two dimensions, seen as three
                pieces.append((source, product))
                del product
            if leaf is not None:
                pieces.append((leaf, t.new(inputs * outputs, w)))
            if other is not None:
                pieces.append((other, t.new(outputs, w)))
            return pieces

        out.node = t.node(out.width, backward, kept)
        return out

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, in the wider of both; keeps nothing."""
        t, width = self.t, max(a.width, b.width)
        out = Tensor(a.values, width, t.new(a.values, width))
        nodes = [x.node for x in (a, b) if x.node is not None]
        if nodes:
            out.node = t.node(width, lambda grad: [(node, grad) for node in nodes])
        return out

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        """a - b: the gradient of b is a's, negated."""
        t, width = self.t, max(a.width, b.width)
        na, nb, values = a.node, b.node, a.values
        out = Tensor(values, width, t.new(values, width))
        if na is None or nb is None:
            return out
        out.node = t.node(width, lambda grad: [(na, grad), (nb, t.new(values, width))])
        return out

    def times(self, x: Tensor, width: int) -> Tensor:
        """x times numbers of `width` bytes that are there anyway and do not train."""
        t, values, source, wide = self.t, x.values, x.node, max(x.width, width)
        kept = t.keep(None) if source is not None else None
        out = Tensor(values, wide, t.new(values, wide))
        if source is not None:
            out.node = t.node(wide, lambda grad: [(source, t.new(values, wide))], kept)
        return out

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """a · b; keeps each factor that the other's gradient needs."""
        t, width = self.t, max(a.width, b.width)
        na, nb, values = a.node, b.node, a.values
        if na is None and nb is None:
            return Tensor(values, width, t.new(values, width))
        kept = t.keep(b.storage if na is not None else None, a.storage if nb is not None else None)
        out = Tensor(values, width, t.new(values, width))

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            return [(node, t.new(values, width)) for node in (na, nb) if node is not None]

        out.node = t.node(out.width, backward, kept)
        return out

    def scale(self, x: Tensor) -> Tensor:
        """x times a number, of which autograd keeps no tensor (`SavedVariable` packs no wrapped number)."""
        t, values, width, source = self.t, x.values, x.width, x.node
        out = Tensor(values, width, t.new(values, width))
        if source is not None:
            out.node = t.node(width, lambda grad: [(source, t.new(values, width))])
        return out

    def weigh(self, x: Tensor, features: float, width: int, trained: bool) -> Tensor:
        """x times a row of `features` numbers (a norm's weight), which may train: then x is kept."""
        t, values, source = self.t, x.values, x.node
        wide = max(x.width, width)
        if source is None and not trained:
            return Tensor(values, wide, t.new(values, wide))
        leaf = t.leaf(width) if trained else None
        kept = t.keep(x.storage if leaf is not None else None)
        out = Tensor(values, wide, t.new(values, wide))

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            pieces = []
            if source is not None:
                pieces.append((source, t.new(values, wide)))
            if leaf is not None:
                product = t.new(values, wide)
                pieces.append((leaf, t.new(features, wide)))
                del product
            return pieces

        out.node = t.node(out.width, backward, kept)
        return out

    def pointwise(self, x: Tensor) -> Tensor:
        """A function whose backward pass needs x (SiLU, GELU, a power)."""
        t, values, own, source = self.t, x.values, x.width, x.node
        kept = t.keep(x.storage) if source is not None else None
        out = Tensor(values, own, t.new(values, own))
        if source is not None:
            out.node = t.node(out.width, lambda grad: [(source, t.new(values, own))], kept)
        return out

    def tanh(self, x: Tensor) -> Tensor:
        """A function whose backward pass needs its result (also softmax)."""
        t, values, own, source = self.t, x.values, x.width, x.node
        out = Tensor(values, own, t.new(values, own))
        if source is not None:
            out.node = t.node(out.width, lambda grad: [(source, t.new(values, own))], t.keep(out.storage))
        return out

    def copy(self, x: Tensor, width: int = 0) -> Tensor:
        """`x.clone()`, or x + a constant of `width` bytes per value: a new tensor forward, nothing backward."""
        t, wide, source = self.t, max(x.width, width), x.node
        out = Tensor(x.values, wide, t.new(x.values, wide))
        if source is not None:
            out.node = t.node(wide, lambda grad: [(source, grad)])
        return out

    def dropout(self, x: Tensor) -> Tensor:
        """`native_dropout`: keeps a mask of one byte per value."""
        t, values, width, source = self.t, x.values, x.width, x.node
        out = Tensor(values, width, t.new(values, width))
        mask = t.new(values, MASK)
        if source is not None:
            out.node = t.node(out.width, lambda grad: [(source, t.new(values, width))], t.keep(mask))
        return out

    def product(self, a: Tensor, b: Tensor, values: float) -> Tensor:
        """A batched matrix product of two activations."""
        t, w = self.t, self.set.width if self.set.autocast else a.width
        a, b = self.cast(a, w), self.cast(b, w)
        na, nb, va, vb = a.node, b.node, a.values, b.values
        if na is None and nb is None:
            return Tensor(values, w, t.new(values, w))
        kept = t.keep(b.storage if na is not None else None, a.storage if nb is not None else None)
        out = Tensor(values, w, t.new(values, w))

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            return [(node, t.new(v, w)) for node, v in ((na, va), (nb, vb)) if node is not None]

        out.node = t.node(out.width, backward, kept)
        return out

    def slices(self, x: Tensor, parts: Sequence[float]) -> list[Tensor]:
        """`x[..., a:b]`: views; each one's gradient is written into zeros of x's size, and they are added up."""
        t, values, width, source = self.t, x.values, x.width, x.node
        made = [Tensor(part, width, x.storage) for part in parts]
        if source is not None:
            for view in made:
                view.node = t.node(view.width, lambda grad: [(source, t.new(values, width))])
        return made

    def chunks(self, x: Tensor, parts: Sequence[float]) -> list[Tensor]:
        """`split` and `chunk`: views; one step of the backward pass joins their gradients."""
        t, values, width, source = self.t, x.values, x.width, x.node
        made = [Tensor(part, width, x.storage) for part in parts]
        if source is not None:

            def backward(grad: Storage) -> list[tuple[Node, Storage]]:
                assert isinstance(grad, Bundle)
                missing = [t.new(p, width) for p, g in zip(parts, grad.grads, strict=True) if g is None]
                joined = t.new(values, width)
                del missing
                return [(source, joined)]

            for view, port in zip(made, t.fork(width, backward, len(parts)), strict=True):
                view.node = port
        return made

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """`cat((a, b), dim=-1)` in the wider of both; the gradients are views of its own."""
        t, width = self.t, max(a.width, b.width)
        out = Tensor(a.values + b.values, width, t.new(a.values + b.values, width))
        nodes = [(x.node, x.values, x.width) for x in (a, b) if x.node is not None]
        if nodes:
            out.node = t.node(width, lambda grad: [(n, grad if w == width else t.new(v, w)) for n, v, w in nodes])
        return out

    def write(self, out: Tensor, part: Tensor) -> Tensor:
        """`out[...] = part` (`CopySlices`): the gradient of the whole is copied, and that of the part taken out."""
        t, before, width, source = self.t, out.node, out.width, part.node
        values, some, narrow = out.values, part.values, part.width
        if source is None:
            return out

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            whole = t.new(values, width)
            taken = t.new(some, width)
            zeros = t.new(some, width) if before is not None else None
            piece = taken if narrow == width else t.new(some, narrow)
            del taken, zeros
            return [(before, whole), (source, piece)] if before is not None else [(source, piece)]

        return Tensor(values, width, out.storage, t.node(width, backward))

    def expand(self, x: Tensor, times: int) -> Tensor:
        """`x.expand(...)`: a view; the gradient is summed."""
        t, values, width, source = self.t, x.values, x.width, x.node
        node = t.node(width, lambda grad: [(source, t.new(values, width))]) if source is not None else None
        return Tensor(times * values, width, x.storage, node)

    def spread(self, x: Tensor, small: Tensor) -> Tensor:
        """x times one number for each of its rows."""
        t, values, source, other, rows = self.t, x.values, x.node, small.node, small.values
        width, narrow = max(x.width, small.width), small.width
        if source is None and other is None:
            return Tensor(values, width, t.new(values, width))
        kept = t.keep(small.storage if source is not None else None, x.storage if other is not None else None)
        out = Tensor(values, width, t.new(values, width))

        def backward(grad: Storage) -> list[tuple[Node, Storage]]:
            pieces = [(source, t.new(values, width))] if source is not None else []
            if other is not None:
                product = t.new(values, width)
                pieces.append((other, t.new(rows, narrow)))
                del product
            return pieces

        out.node = t.node(width, backward, kept)
        return out

    def take(self, x: Tensor, values: float, index: Storage | None = None) -> Tensor:
        """`x[index]`: a copy of `values` of x; keeps the index; the gradient is added into zeros of x's size."""
        t, every, width, source = self.t, x.values, x.width, x.node
        kept = t.keep(index) if source is not None else None
        out = Tensor(values, width, t.new(values, width))
        if source is not None:
            out.node = t.node(out.width, lambda grad: [(source, t.new(every, width))], kept)
        return out


def norm(k: Block, x: Tensor, kind: LayerKind, features: int = 0) -> Tensor:
    """The architecture's norm of so many features (default: the hidden size)."""
    features = features or k.shape.hidden_size
    match k.shape.traits.norm:
        case "layer":
            return _layer_norm(k, x, kind, features)
        case "rms":
            return _rms_norm(k, x, kind, features)
        case _:
            return _wide_norm(k, x, kind, features)


@module
def _rms_norm(k: Block, x: Tensor, kind: LayerKind, features: int) -> Tensor:
    """`LlamaRMSNorm.forward` (Mistral, Mixtral, Qwen, Phi-3): in fp32, then times the weight in x's own width."""
    own, trained = x.width, kind.weights
    x = k.cast(x, 4)
    x = over_root(k, x, features)  # in a variable until the end
    width = k.width_of(kind) if trained or k.set.autocast else own
    return k.weigh(k.cast(x, own), features, width, trained)


def over_root(k: Block, x: Tensor, features: int) -> Tensor:
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
def _wide_norm(k: Block, x: Tensor, kind: LayerKind, features: int) -> Tensor:
    """`Gemma2RMSNorm`, `Olmo2RMSNorm` and `Cohere2LayerNorm`: in fp32, the weight as well, until the end."""
    own, traits = x.width, k.shape.traits
    x = k.cast(x, 4)
    x = _standardised(k, x, features) if traits.norm == "layer_wide" else over_root(k, x, features)
    if traits.norm == "rms_wide":  # OLMo: the product has no name, so that its factor lives on while it is cast
        return k.cast(k.weigh(x, features, 4, kind.weights), own)
    x = k.weigh(x, features, 4, kind.weights)
    return k.cast(x, own)


def _standardised(k: Block, x: Tensor, features: int) -> Tensor:
    """`Cohere2LayerNorm`: less the mean, twice (once for the variance), times the root; keeps both and the root."""
    t, source, values, rows = k.t, x.node, x.values, x.values / features
    centred = t.new(values, 4)
    squares = t.new(values, 4)
    root = t.new(rows, 4)
    del squares
    if source is None:
        del centred
        centred = t.new(values, 4)
        return Tensor(values, 4, t.new(values, 4))

    def of_variance(grad: Storage) -> list[tuple[Node, Storage]]:
        spread = t.new(values, 4)
        power = t.new(values, 4)
        twice = t.new(values, 4)
        through = t.new(values, 4)
        del power, twice, spread
        return [(source, through), (mean, _negative())]

    def _negative() -> Storage:
        """Of a subtraction: the gradient of the mean, summed over the features."""
        negative = t.new(values, 4)
        summed = t.new(rows, 4)
        del negative
        return summed

    mean = t.node(4, lambda grad: [(source, t.new(values, 4))])
    variance = t.node(4, of_variance, t.keep(centred))
    again = t.new(values, 4)
    difference = t.node(4, lambda grad: [(source, grad), (mean, _negative())])
    kept = t.keep(again, root)
    y = Tensor(values, 4, t.new(values, 4))

    def backward(grad: Storage) -> list[tuple[Node, Storage]]:
        direct = t.new(values, 4)
        product = t.new(values, 4)
        summed = t.new(rows, 4)
        del product
        return [(difference, direct), (variance, summed)]

    y.node = t.node(4, backward, kept)
    return y


@module
def _layer_norm(k: Block, x: Tensor, kind: LayerKind, features: int) -> Tensor:
    """`nn.LayerNorm`: one kernel; autocast runs it in fp32. Keeps x, and mean and deviation of every row."""
    t = k.t
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
