"""Completeness of a model's facts: sizes, or a RequestError. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from runner.errors import Problem, RequestError

Family = Literal["llama", "phi3", "phi", "gpt_neox", "gpt2"]
"""Which code of transformers a layer follows: `llama` has RMSNorm, a gated MLP and rotary positions, as have Mistral,
Mixtral, Qwen and Gemma; `phi3` the same with fused q/k/v and gate/up; `phi`, `gpt_neox` and `gpt2` LayerNorm and
biases, with attention and MLP side by side in the first two."""


class Traits(NamedTuple):
    """How an architecture differs from the others of its family."""

    family: Family
    qkv_bias: bool = False
    qk_norm: bool = False
    mixture: bool = False


TRAITS = {
    "llama": Traits("llama"),
    "mistral": Traits("llama"),
    "mixtral": Traits("llama", mixture=True),
    "qwen2": Traits("llama", qkv_bias=True),
    "qwen3": Traits("llama", qk_norm=True),
    "qwen3_moe": Traits("llama", qk_norm=True, mixture=True),
    "gemma": Traits("llama"),
    "phi3": Traits("phi3"),
    "phi": Traits("phi"),
    "gpt_neox": Traits("gpt_neox"),
    "gpt2": Traits("gpt2"),
}

ARCHITECTURES = tuple(sorted(TRAITS))
"""What `model.architecture` may be for a model that is planned: `model_type` in transformers."""

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
FACTS = ("architecture", "head_dim", *_NEEDED, *_MIXTURE)
"""Fields of ModelSpec that `complete` reads."""

_OWN_HEADS = ("gpt_neox", "gpt2")  # every query head has its own keys and values, of width hidden_size / num_heads


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


def complete(facts: Mapping[str, str | int | None]) -> Sizes:
    """The facts as numbers; RequestError with all that is missing or contradictory."""
    traits = _traits(facts)
    known = {key: int(value) for key, value in facts.items() if key != "architecture" and value is not None}
    if traits.family in _OWN_HEADS and "num_heads" in known:
        known.setdefault("num_kv_heads", known["num_heads"])
    missing = [key for key in (*_NEEDED, *(_MIXTURE if traits.mixture else ())) if key not in known]
    if missing:
        raise RequestError(_missing(missing))
    head_dim = known.get("head_dim") or known["hidden_size"] // known["num_heads"]
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
    return TRAITS[str(architecture)]


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
    if hidden % heads and ("head_dim" not in known or traits.family in _OWN_HEADS):
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
    if not traits.mixture and any(key in known for key in _MIXTURE):
        what = f"model.architecture={architecture} has no experts"
        found.append(Problem(what, None, "write model.num_experts=null model.experts_per_token=null"))
    if traits.mixture and known["experts_per_token"] > known["num_experts"]:
        what = f"model.experts_per_token={known['experts_per_token']} of model.num_experts={known['num_experts']}"
        found.append(Problem(what, None, "a token cannot be routed to more experts than there are"))
    return found
