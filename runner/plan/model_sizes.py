"""The sizes of a model: the facts of `conf/model` or of its `config.json`, complete and free of contradictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runner.errors import Problem, RequestError
from runner.plan.architectures import ARCHITECTURES, TRAITS, Traits

_NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "vocab_size",
    "context_length",
    "tie_embeddings",
    "num_kv_heads",
)


_MIXTURE = ("num_experts", "experts_per_token")
_SHARED = ("dense_layers", "dense_intermediate_size", "shared_intermediate_size")
_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")


FACTS = (
    "architecture",
    "head_dim",
    "attention_bias",
    "qk_norm",
    *_NEEDED,
    *_MIXTURE,
    *_SHARED,
    *_LINEAR,
    "q_lora_rank",
    *_LATENT,
)
"""Fields of ModelSpec that `complete` reads."""


_OWN_HEADS = ("gpt_neox", "gpt2")  # every query head has its own keys and values, of width hidden_size / num_heads


class LinearAttention(NamedTuple):
    """Sizes of layers with a gated delta rule in place of attention (Gated DeltaNet, arXiv 2412.06464)."""

    key_heads: int
    value_heads: int
    key_dim: int
    """Width of a head of queries and keys."""
    value_dim: int
    """Width of a head of values."""

    @property
    def keys(self) -> int:
        """Width of all keys, and of all queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.value_heads * self.value_dim


CHUNK = 64
"""Tokens that the gated delta rule takes at once: `chunk_size` of `torch_chunk_gated_delta_rule`, transformers 5.23."""
CONVOLVED = 4
"""Tokens under its convolution: `linear_conv_kernel_dim` of all published models."""


class LatentAttention(NamedTuple):
    """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    query_rank: int
    """Width of the vector that queries are made of; 0 where they are made of the layer's input."""
    rank: int
    """Width of the vector that keys and values are made of."""
    plain: int
    """Features of a head of queries and keys that are not rotated."""
    rotated: int
    """Those that are; those of keys are shared by all heads."""
    value_dim: int
    """Width of a head of values."""


class Sizes(NamedTuple):
    """Facts with none missing."""

    traits: Traits
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    experts: int
    experts_per_token: int
    qkv_bias: bool
    dense_layers: int
    dense_inner: int
    shared_inner: int
    linear: LinearAttention | None
    latent: LatentAttention | None


def complete(facts: Mapping[str, str | int | None]) -> Sizes:
    """The facts as numbers; RequestError with all that is missing or contradictory."""
    traits = _traits(facts)
    known = {key: int(value) for key, value in facts.items() if key != "architecture" and value is not None}
    if traits.family in _OWN_HEADS and "num_heads" in known:
        known.setdefault("num_kv_heads", known["num_heads"])
    linear = traits.odd == "attends"
    parts = (
        (_MIXTURE, traits.mixture), (_SHARED, traits.shared), (_SHARED[2:], traits.gated_expert), (_LINEAR, linear),
        (_LATENT, traits.latent),
    )  # fmt: skip
    needed = (*_NEEDED, *(key for keys, has in parts if has for key in keys))
    missing = [key for key in needed if key not in known]
    if missing:
        raise RequestError(_missing(missing))
    latent = LatentAttention(known.get("q_lora_rank", 0), *(known[key] for key in _LATENT)) if traits.latent else None
    head_dim = known.get("head_dim") or known["hidden_size"] // known["num_heads"]
    if latent:
        head_dim = latent.plain + latent.rotated
    if problems := _contradictions(str(facts["architecture"]), traits, known):
        raise RequestError(*problems)
    return Sizes(
        traits,
        known["hidden_size"],
        known["intermediate_size"],
        known["num_layers"],
        known["num_heads"],
        known["num_kv_heads"],
        head_dim,
        known["vocab_size"],
        known["context_length"],
        bool(known["tie_embeddings"]),
        known.get("num_experts", 0),
        known.get("experts_per_token", 0),
        bool(known.get("attention_bias", traits.qkv_bias)),
        known.get("dense_layers", 0),
        known.get("dense_intermediate_size", 0),
        known.get("shared_intermediate_size", 0),
        LinearAttention(*(known[key] for key in _LINEAR)) if linear else None,
        latent,
    )


def _traits(facts: Mapping[str, str | int | None]) -> Traits:
    architecture = facts["architecture"]
    if architecture is None:
        wanted = ("architecture", *_NEEDED)
        raise RequestError(_missing([key for key in wanted if facts[key] is None]))
    if architecture not in TRAITS:
        raise RequestError(
            Problem(
                f"model.architecture={architecture}: the shape of its layers is not known",
                None,
                f"known are {', '.join(ARCHITECTURES)}",
            )
        )
    traits = TRAITS[str(architecture)]
    return traits._replace(qk_norm="head") if _chooses_norms(traits) and facts["qk_norm"] else traits


def _chooses_norms(traits: Traits) -> bool:
    return traits.shared and not traits.latent


def _missing(keys: list[str]) -> Problem:
    return Problem(
        f"the model's size is not known: {', '.join(f'model.{key}' for key in keys)} missing",
        None,
        f"write {' '.join(f'model.{key}=…' for key in keys)}, "
        "or model=hub model.id=FOLDER, where FOLDER holds the model's config.json",
    )


def _contradictions(architecture: str, traits: Traits, known: dict[str, int]) -> list[Problem]:
    """What cannot be true of any model of this architecture."""
    hidden, heads, kv_heads = known["hidden_size"], known["num_heads"], known["num_kv_heads"]
    found = []
    if hidden % heads and ("head_dim" not in known or traits.family in _OWN_HEADS) and not traits.latent:
        what = f"model.hidden_size={hidden} is not a multiple of model.num_heads={heads}"
        found.append(
            Problem(what, None, "correct one of them" if traits.family in _OWN_HEADS else "write model.head_dim=…")
        )
    elif traits.family in _OWN_HEADS and known.get("head_dim", hidden // heads) != hidden // heads:
        what = f"model.head_dim={known['head_dim']}: in {architecture} a head is hidden_size / num_heads wide"
        found.append(Problem(what, None, f"write model.head_dim={hidden // heads}"))
    if heads % kv_heads:
        what = f"model.num_heads={heads} is not a multiple of model.num_kv_heads={kv_heads}"
        found.append(Problem(what, None, "correct one of them"))
    elif traits.family in _OWN_HEADS and kv_heads != heads:
        what = f"model.num_kv_heads={kv_heads}: {architecture} has no grouped key/value heads"
        found.append(Problem(what, None, f"write model.num_kv_heads={heads}"))
    if "attention_bias" in known and not traits.attention_bias:
        what = f"model.attention_bias: {architecture} leaves no choice of it"
        found.append(Problem(what, None, "write model.attention_bias=null"))
    if not traits.mixture and any(key in known for key in _MIXTURE):
        what = f"model.architecture={architecture} has no experts"
        found.append(Problem(what, None, "write model.num_experts=null model.experts_per_token=null"))
    of_experts = _SHARED if traits.shared else _SHARED[2:] if traits.gated_expert else ()
    wrong = [key for key in _SHARED if key in known and key not in of_experts]
    wrong += ["qk_norm"] if "qk_norm" in known and not _chooses_norms(traits) else []
    if wrong:
        keys = " ".join(f"model.{key}=null" for key in wrong)
        what = f"model.architecture={architecture} has no shared experts, and no choice of norms"
        if of_experts:
            what = f"model.architecture={architecture} has no {' and no '.join(f'model.{key}' for key in wrong)}"
        found.append(Problem(what, None, f"write {keys}"))
    if not traits.latent and any(key in known for key in ("q_lora_rank", *_LATENT)):
        keys = " ".join(f"model.{key}=null" for key in ("q_lora_rank", *_LATENT) if key in known)
        found.append(Problem(f"model.architecture={architecture} has no latent attention", None, f"write {keys}"))
    if traits.latent and "head_dim" in known:
        what = f"model.head_dim={known['head_dim']}: in {architecture} it is qk_nope_head_dim + qk_rope_head_dim"
        found.append(Problem(what, None, "write model.head_dim=null"))
    if traits.odd != "attends" and any(key in known for key in _LINEAR):
        keys = " ".join(f"model.{key}=null" for key in _LINEAR if key in known)
        found.append(Problem(f"model.architecture={architecture} has no linear attention", None, f"write {keys}"))
    if traits.odd == "attends" and known["linear_num_value_heads"] % known["linear_num_key_heads"]:
        more, fewer = known["linear_num_value_heads"], known["linear_num_key_heads"]
        what = f"model.linear_num_value_heads={more} is not a multiple of model.linear_num_key_heads={fewer}"
        found.append(Problem(what, None, "correct one of them"))
    if traits.shared and known["dense_layers"] > known["num_layers"]:
        what = f"model.dense_layers={known['dense_layers']} of model.num_layers={known['num_layers']}"
        found.append(Problem(what, None, "correct one of them"))
    if traits.mixture and known["experts_per_token"] > known["num_experts"]:
        what = f"model.experts_per_token={known['experts_per_token']} of model.num_experts={known['num_experts']}"
        found.append(Problem(what, None, "a token cannot be routed to more experts than there are"))
    return found
