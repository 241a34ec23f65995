"""Attention over the documents of packed and padded rows, without a mask.

transformers describes who sees whom by a function of two positions, from which SDPA gets a boolean mask of (tokens in
a row)² that no flash kernel takes. Here that function is evaluated next to the diagonal only, [b, s]: where a token
does not see the one before it, a document begins. `Documents` pass through the layers in the mask's place.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

NAME = "varlen"
"""The value of `train.attention`, and of `attn_implementation` in transformers."""
BLOCK = 256
"""Queries whose scores a CPU holds at once. Forward and backward of one document in bf16, 9 heads of 64, one thread of
an EPYC with avx512_bf16, SDPA's flash kernel against blocks of 256: 7.0 and 2.7 ms for 256 tokens, 61 and 25 ms for
1,024, 192 and 93 ms for 2,048; in fp32 6.9 and 6.8 ms, 74 and 66 ms for 1,024."""
JOINED = 128
"""Tokens of neighbouring documents that a CPU attends to at once, each to itself: as many short ones cost calls."""
EXTRAS = ("attn_logit_softcapping", "sinks")
"""What a layer calls a cap of its scores and its sinks, of which it gives `attention` `softcap` and `s_aux`."""
FLASH_SINCE = (8, 0)
"""Oldest compute capability of torch's flash kernels."""


class Documents(NamedTuple):
    """Rows [b, s], flattened to b·s tokens, as stretches that do not see each other."""

    lengths: tuple[int, ...]
    """Tokens of each stretch, in order; their sum is b·s."""
    padding: tuple[bool, ...]
    """The stretch is padding: what is computed for it is never read."""
    window: int | None
    """Tokens that a token sees at most, itself included; None where no document is longer."""
    starts: torch.Tensor | None
    """Where each stretch begins, and b·s at the end: int32, on a GPU alone, where the kernel wants it."""


def register() -> None:
    """Make `NAME` known to transformers; again without effect."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, documents_or_mask)


def use(model: Any) -> bool:
    """Switch the loaded model to this attention, where all of its attention layers can take it."""
    if not can_use(model):
        return False
    register()
    model.set_attn_implementation(NAME)
    return True


def can_use(model: Any) -> bool:
    """Every attention layer hands queries, keys, values and mask to transformers' interface, and only hands them on."""
    kinds: set[Any] = {type(module) for module in model.modules()}
    layers = [kind for kind in kinds if re.search(r"Attention\d*D?$", kind.__name__)]
    return bool(layers) and model._supports_attention_backend and all(_hands_on(layer) for layer in layers)


def kernel(model: Any, precision: str) -> str:
    """Return the name of the attention kernel, for environment.json."""
    name = model.config._attn_implementation
    if name != NAME:
        return str(name)
    if any(getattr(layer, extra, None) is not None for layer in model.modules() for extra in EXTRAS):
        return "products per document"
    if not on_gpu(model.device):
        return "blocks of products"
    flash = torch.cuda.get_device_capability(model.device) >= FLASH_SINCE and precision != "fp32"
    return "torch flash, variable lengths" if flash else "SDPA per document"


@lru_cache(maxsize=256)
def _hands_on(layer: Any) -> bool:
    """The layer's code calls the interface, and neither reads the mask (sparse attention) nor adds a bias to scores."""
    try:
        source = inspect.getsource(sys.modules[layer.__module__]) if layer.__bases__ else ""
        own = "".join(inspect.getsource(kind) for kind in layer.__mro__ if kind.__module__ == layer.__module__)
    except (OSError, TypeError, KeyError):
        return False
    reads = re.search(r"\b(attention|causal)_mask(\.|\[)|position_bias=", own)
    return "ALL_ATTENTION_FUNCTIONS" in source and "attention_interface(" in own and not reads


def documents_or_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **options: Any,
) -> Documents | torch.Tensor | None:
    """transformers' mask interface: the documents, else the dense mask as for SDPA ([b, 1, q, kv]; None: causal).

    A mask is made with keys of earlier calls (a cache), for attention to both sides, for a mask of the caller's own,
    and for rows with padding in the middle. `attention_mask` is [b, s], True where a token is.
    """
    found = None
    unusual = use_vmap or isinstance(q_offset, torch.Tensor) or q_offset or kv_offset
    if q_length == kv_length and not unusual:
        found = _documents(mask_function, attention_mask, (batch_size, q_length), local_size, torch.device(device))
    if found is not None:
        return found
    return sdpa_mask(  # type: ignore[no-any-return]  # transformers' is not typed
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        use_vmap=use_vmap, device=device, **options,
    )  # fmt: skip


def _documents(
    sees: Callable[..., torch.Tensor],
    real: torch.Tensor | None,
    shape: tuple[int, int],
    window: int | None,
    device: torch.device,
) -> Documents | None:
    """The documents of a mask function; None where they and a window do not describe it, or no mask is made anyway."""
    rows, place = torch.arange(shape[0], device=device)[:, None], torch.arange(shape[1], device=device)[None]

    def asked(distance: int) -> torch.Tensor:
        """Return which tokens attend to the one `distance` places before them, [b, s - |distance|]."""
        later, earlier = place[:, abs(distance) :], place[:, : shape[1] - abs(distance)]
        pair = (later, earlier) if distance > 0 else (earlier, later)
        return sees(rows, rows * 0, *pair).expand(shape[0], -1)

    wrong = asked(-1).any()
    if window is not None and window < shape[1]:
        wrong = wrong | asked(window).any()
    begins = torch.ones(shape, dtype=torch.bool, device=device)
    begins[:, 1:] = ~asked(1)
    real = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real[:, : shape[1]]
    edge = real[:, 1:] != real[:, :-1]
    begins[:, 1:] |= edge
    resumed = (edge & real[:, 1:]).sum(1) + real[:, 0].int() > 1  # padding in the middle, which the rest looks across
    facts = torch.stack([begins, real, (wrong | resumed.any()).expand(shape)]).cpu()  # the one wait for a GPU
    if facts[2, 0, 0]:
        return None
    first = facts[0].flatten().nonzero().flatten()
    ends = torch.cat([first, torch.tensor([shape[0] * shape[1]])])
    lengths, padding = ends.diff().tolist(), (~facts[1].flatten()[first]).tolist()
    if window is not None and window >= max(lengths):
        window = None
    if on_gpu(device) and window is None and not any(padding) and len(lengths) == shape[0]:
        return None  # whole rows: SDPA without a mask, which takes cuDNN's kernel on Hopper and Blackwell
    starts = ends.to(device, torch.int32) if on_gpu(device) else None
    return Documents(tuple(lengths), tuple(padding), window, starts)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Documents | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [b, h, s, d], key and value [b, kv, s, d] → [b, s, h, d].

    `softcap` bounds scores by tanh (Gemma 2), `s_aux` [h] are sinks (gpt-oss); neither flash kernel of torch has them.
    """
    extras = softcap is not None or s_aux is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(attention_mask, tuple):
        if extras:
            mask = _causal(query, key) if attention_mask is None else attention_mask
            out = eager(query, key, value, mask, scale, dropout, softcap, s_aux)
            return out.transpose(1, 2).contiguous(), None
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(  # type: ignore[no-any-return]  # transformers' is not typed
            module, query, key, value, attention_mask, **options
        )
    b, _, s, _ = query.shape
    q, k, v = (x.transpose(1, 2).reshape(b * s, x.shape[1], x.shape[3]) for x in (query, key, value))
    if not extras and not dropout and has_flash(q, k, v):
        out = _flash(q, k, v, attention_mask, scale)
    else:
        out = _one_by_one(q, k, v, attention_mask, s, scale, dropout, softcap, s_aux)
    return out.view(b, s, *out.shape[1:]), None


def on_gpu(device: torch.device) -> bool:
    """The device is an NVIDIA GPU."""
    return device.type == "cuda"


def has_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """torch's flash kernel takes these: on Ampere or later, in 16 bits (of autocast), with equal heads of up to 256."""
    d = q.shape[-1]
    return (
        on_gpu(q.device)
        and torch.cuda.get_device_capability(q.device) >= FLASH_SINCE
        and _dtype(q).itemsize == 2
        and d == k.shape[-1] == v.shape[-1]
        and d <= 256
        and d % 8 == 0
    )


def _dtype(x: torch.Tensor) -> torch.dtype:
    """That of the arithmetic."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float) -> torch.Tensor:
    """torch's kernel for rows of several lengths over [tokens, heads, d]; it knows no autocast."""
    q, k, v = (x.to(_dtype(x)) for x in (q, k, v))
    longest = max(documents.lengths)
    assert documents.starts is not None
    window = (-1, 0) if documents.window is None else (documents.window - 1, 0)
    return varlen_attn(  # type: ignore[return-value]  # a pair only where more is asked for
        q, k, v, documents.starts, documents.starts, longest, longest,
        scale=scale, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, row: int,
    scale: float, dropout: float, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """A call per document, or per run of documents of one length, over [tokens, heads, d]; `row`: tokens of a row."""
    in_blocks = not on_gpu(q.device) and softcap is None and sinks is None and not dropout
    runs = list(_joined(documents) if in_blocks else _runs(documents))
    sizes = [count * sum(lengths) for count, lengths, _ in runs]
    parts = zip(*(torch.split(x, sizes) for x in (q, k, v)), strict=True)
    groups = q.shape[1] // k.shape[1]
    outs = []
    for (count, lengths, padding), part in zip(runs, parts, strict=True):
        length = sum(lengths)
        if padding:
            outs.append(part[2].new_zeros(count * length, q.shape[1], v.shape[-1]))
        elif length == 1 and sinks is None and not dropout:  # a token that sees itself alone
            outs.append(part[2].repeat_interleave(groups, 1))
        else:
            a, b, c = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in part)
            band = documents.window if documents.window is not None and documents.window < length else None
            if in_blocks:
                a, b, c = (x.to(_dtype(x)) for x in (a, b, c))
                out = Blockwise.apply(  # type: ignore[no-untyped-call]  # torch's `apply` is not typed
                    a, b, c, scale, band, lengths, row <= BLOCK
                )
            else:
                out = _document(a, b, c, band, scale, dropout, softcap, sinks)
            outs.append(out.transpose(1, 2).reshape(count * length, q.shape[1], v.shape[-1]))
    dtype = _dtype(q)
    return torch.cat([out.to(dtype) for out in outs])


Run = tuple[int, tuple[int, ...], bool]
"""Neighbouring stretches of one kind: how many, the lengths of the documents in each, whether they are padding."""


def _runs(documents: Documents) -> Iterator[Run]:
    """Stretches of one length together."""
    for (length, padding), group in groupby(zip(documents.lengths, documents.padding, strict=True)):
        yield len(list(group)), (length,), padding


def _joined(documents: Documents) -> Iterator[Run]:
    """The same, and neighbours of several lengths as one stretch of up to `JOINED` tokens."""
    lengths: tuple[int, ...] = ()
    for count, (length,), padding in _runs(documents):
        alone = count > 1 or padding or length == 1
        if lengths and (alone or sum(lengths) + length > JOINED):
            yield 1, lengths, False
            lengths = ()
        if alone:
            yield count, (length,), padding
        else:
            lengths += (length,)
    if lengths:
        yield 1, lengths, False


def _document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None,
    scale: float, dropout: float, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention in documents of one length: q [n, h, s, d], k and v [n, kv, s, d] → [n, h, s, d]."""
    if softcap is not None or sinks is not None:
        return eager(q, k, v, _causal(q, k, window), scale, dropout, softcap, sinks)
    mask = None if window is None else _causal(q, k, window)
    k, v = (repeat_kv(x, q.shape[1] // k.shape[1]) for x in (k, v))  # the memory-efficient kernel knows no groups
    return functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None, scale=scale)


class Blockwise(torch.autograd.Function):
    """Causal attention by plain products over blocks of queries.

    What is kept are queries, keys and values, and of rows that are one block the softmax of their scores; that of
    longer ones is computed again in the backward pass. On a CPU this is faster than SDPA's kernel, in bf16 by half
    (`BLOCK`), as its products run in oneDNN.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        scale: float, window: int | None, lengths: tuple[int, ...], keep: bool,
    ) -> Any:  # fmt: skip
        """q [n, h, s, d], k [n, kv, s, d], v [n, kv, s, e], all of one dtype → [n, h, s, e].

        `lengths`, whose sum is s, are those of documents; several only where s ≤ `BLOCK`. `keep`: the scores' softmax,
        likewise.
        """
        n, h, s, _ = q.shape
        keys, values = (x.reshape(n * x.shape[1], s, x.shape[3]) for x in (k, v))
        out = q.new_empty(n, s, h, v.shape[3]).transpose(1, 2)
        kept: tuple[torch.Tensor, ...] = ()
        for queries, seen in _blocks(s, window):
            hidden = _hidden(q, queries, seen, window, lengths)
            shares = _shares(_grouped(q, k, queries), keys[:, seen], scale, hidden)
            out[:, :, queries] = torch.bmm(shares, values[:, seen]).view(n, h, -1, v.shape[3])
            kept = (shares,) if keep else ()
            del shares, hidden  # before the next block's are made
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.window, ctx.lengths = scale, window, lengths
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of queries, keys and values."""
        q, k, v, *kept = ctx.saved_tensors
        n, _, s, _ = q.shape
        keys, values = (x.reshape(n * x.shape[1], s, x.shape[3]) for x in (k, v))
        several = s > BLOCK  # summed over blocks of queries
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32 if several else x.dtype) for x in (keys, values))
        for queries, seen in _blocks(s, ctx.window):
            query, g = _grouped(q, k, queries), _grouped(grad, k, queries)
            hidden = None if kept else _hidden(q, queries, seen, ctx.window, ctx.lengths)
            shares = kept[0] if hidden is None else _shares(query, keys[:, seen], ctx.scale, hidden)
            del hidden
            dv[:, seen] += torch.bmm(shares.transpose(1, 2), g)
            scores = torch._softmax_backward_data(torch.bmm(g, values[:, seen].transpose(1, 2)), shares, -1, q.dtype)
            scores *= ctx.scale
            dq[:, :, queries] = torch.bmm(scores, keys[:, seen]).view(n, q.shape[1], -1, q.shape[3])
            dk[:, seen] += torch.bmm(scores.transpose(1, 2), query)
            del query, g, shares, scores
        return dq, dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape), None, None, None, None


def _blocks(s: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of a block, and the keys that one of them sees."""
    for first in range(0, s, BLOCK):
        last = min(first + BLOCK, s)
        yield slice(first, last), slice(0 if window is None else max(0, first - window + 1), last)


def _grouped(x: torch.Tensor, k: torch.Tensor, queries: slice) -> torch.Tensor:
    """Rows of all heads that share keys, one below the other: [n, h, s, d] → [n·kv, h/kv·block, d]."""
    n, kv = k.shape[:2]
    return x[:, :, queries].reshape(n * kv, -1, x.shape[3])


def _hidden(
    like: torch.Tensor, queries: slice, seen: slice, window: int | None, lengths: tuple[int, ...]
) -> torch.Tensor:
    """What is added to the scores of a block, [block, keys]: minus infinity where a query does not see a key."""
    size, keys = queries.stop - queries.start, seen.stop - seen.start
    hidden = like.new_full((size, keys), float("-inf")).triu_(keys - size + 1)
    if window is not None:
        hidden += like.new_full((size, keys), float("-inf")).tril_(keys - size - window)
    end = 0
    for length in lengths[:-1]:
        end += length
        hidden[end:, :end] = float("-inf")
    return hidden


def _shares(query: torch.Tensor, keys: torch.Tensor, scale: float, hidden: torch.Tensor) -> torch.Tensor:
    """Softmax of the scores of a block, [n·kv, h/kv·block, keys]."""
    every = hidden.repeat(query.shape[1] // len(hidden), 1)
    return torch.baddbmm(every, query, keys.transpose(1, 2), alpha=scale).softmax(-1)


def _causal(q: torch.Tensor, k: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Who sees whom, [s, keys], where the last query is at the last key."""
    shape = q.shape[2], k.shape[2]
    last = shape[1] - shape[0]
    mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(last)
    return mask if window is None else mask.triu(last - window + 1)


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor,
    scale: float, dropout: float = 0.0, softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Scores, softmax, sum: q [n, h, s, d], k and v [n, kv, t, d] → [n, h, s, d], keys and values not repeated.

    `mask` is boolean and broadcasts to [n, 1, s, t]; a query that sees no key gets zeros.
    """
    (n, h, s, d), (kv, t) = q.shape, k.shape[1:3]
    groups = h // kv
    rows = n * kv, groups * s
    bias = torch.zeros(mask.shape, dtype=_dtype(q), device=q.device).masked_fill_(~mask, torch.finfo(_dtype(q)).min)
    if softcap is None and mask.ndim == 2:
        scores = torch.baddbmm(
            bias.repeat(groups, 1), q.reshape(*rows, d), k.reshape(n * kv, t, d).transpose(1, 2), alpha=scale
        )
    else:
        scores = torch.bmm(q.reshape(*rows, d), k.reshape(n * kv, t, d).transpose(1, 2)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        bias = bias.expand(n, 1, s, t) if mask.ndim == 2 else bias[..., :t].expand(n, 1, s, t)
        scores = (scores.view(n, h, s, t) + bias).view(*rows, t)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, h, 1, 1).expand(n, h, s, 1).reshape(*rows, 1)
        scores = torch.cat([scores, column], -1)
    shares = scores.softmax(-1)[..., :t]
    if dropout:
        shares = functional.dropout(shares, dropout)
    return torch.bmm(shares, v.reshape(n * kv, t, v.shape[-1])).view(n, h, s, v.shape[-1])
