"""Attention over the documents of packed and padded rows, without a mask, as transformers calls it.

transformers describes who sees whom by a function of two positions, from which SDPA gets a boolean mask of (tokens in
a row)² that no flash kernel takes. Here that function is evaluated next to the diagonal only, [b, s]: where a token
does not see the one before it, a document begins. `Documents` pass through the layers in the mask's place.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from runner.train import varlen_kernels
from runner.train.varlen_kernels import FLASH_SINCE, Documents

NAME = "varlen"
"""The value of `train.attention`, and of `attn_implementation` in transformers."""
EXTRAS = ("attn_logit_softcapping", "sinks")
"""What a layer calls a cap of its scores and its sinks, of which it gives `attention` `softcap` and `s_aux`."""


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
    if not varlen_kernels.on_gpu(model.device):
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
    if varlen_kernels.on_gpu(device) and window is None and not any(padding) and len(lengths) == shape[0]:
        return None  # whole rows: SDPA without a mask, which takes cuDNN's kernel on Hopper and Blackwell
    starts = ends.to(device, torch.int32) if varlen_kernels.on_gpu(device) else None
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
            mask = varlen_kernels.causal(query, key) if attention_mask is None else attention_mask
            out = varlen_kernels.eager(query, key, value, mask, scale, dropout, softcap, s_aux)
            return out.transpose(1, 2).contiguous(), None
        options |= {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]  # transformers has no types
    b, _, s, _ = query.shape
    q, k, v = (x.transpose(1, 2).reshape(b * s, x.shape[1], x.shape[3]) for x in (query, key, value))
    if not extras and not dropout and varlen_kernels.has_flash(q, k, v):
        out = varlen_kernels.flash(q, k, v, attention_mask, scale)
    else:
        out = varlen_kernels.one_by_one(q, k, v, attention_mask, s, scale, dropout, softcap, s_aux)
    return out.view(b, s, *out.shape[1:]), None
