"""Kernels of attention over documents: torch's flash kernel, products in blocks on a CPU, or a call per document."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import repeat_kv

BLOCK = 256
"""Queries whose scores a CPU holds at once. Forward and backward of one document in bf16, 9 heads of 64, one thread of
an EPYC with avx512_bf16, SDPA's flash kernel against blocks of 256: 7.0 and 2.7 ms for 256 tokens, 61 and 25 ms for
1,024, 192 and 93 ms for 2,048; in fp32 6.9 and 6.8 ms, 74 and 66 ms for 1,024."""
JOINED = 128
"""Tokens of neighbouring documents that a CPU attends to at once, each to itself: as many short ones cost calls."""
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


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, scale: float) -> torch.Tensor:
    """torch's kernel for rows of several lengths over [tokens, heads, d]; it knows no autocast."""
    q, k, v = (x.to(_dtype(x)) for x in (q, k, v))
    longest = max(documents.lengths)
    assert documents.starts is not None
    window = (-1, 0) if documents.window is None else (documents.window - 1, 0)
    return varlen_attn(  # type: ignore[return-value]  # a pair only where more is asked for
        q, k, v, documents.starts, documents.starts, longest, longest,
        scale=scale, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def one_by_one(
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
        return eager(q, k, v, causal(q, k, window), scale, dropout, softcap, sinks)
    mask = None if window is None else causal(q, k, window)
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


def causal(q: torch.Tensor, k: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Who sees whom, [s, keys], where the last query is at the last key."""
    shape = q.shape[2], k.shape[2]
    last = shape[1] - shape[0]
    mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(last)
    return mask if window is None else mask.triu(last - window + 1)


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor,
    scale: float, dropout: float, softcap: float | None, sinks: torch.Tensor | None,
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
