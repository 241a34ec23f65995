"""What tells the architectures apart whose plan is arithmetic: `model_type` in transformers → `Traits`.

Source: `modeling_<architecture>.py` of transformers 5.23.0; a test builds each architecture there and compares.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Family = Literal["llama", "phi", "gpt_neox", "gpt2"]
"""Which code of transformers a layer follows: `llama` has a gated MLP and rotary positions, and most architectures are
it with other `Traits`; `phi`, `gpt_neox` and `gpt2` have LayerNorm and biases, the first two attention and MLP side by
side."""


class Traits(NamedTuple):
    """Differences of an architecture from the others of its family."""

    family: Family = "llama"
    qkv_bias: bool = False
    """Queries, keys and values have a bias, unless `model.attention_bias` says otherwise."""
    attention_bias: Literal["", "qkv", "all"] = ""
    """What that key of a config gives a bias, with or without the attention's output; empty where there is none."""
    fused_qkv: bool = False
    """Queries, keys and values are one matrix."""
    fused_gate_up: bool = False
    """Gate and up are one matrix."""
    qk_norm: Literal["", "head", "whole"] = ""
    """Queries and keys are normalised: each head of them, or all heads as one."""
    mixture: bool = False
    """Layers have a router and experts in place of an MLP."""
    shared: bool = False
    """A mixture whose first layers have an MLP, and all others also an expert that every token goes through. The router
    is in fp32."""
    sigmoid: bool = False
    """The shares of a mixture's experts are sigmoids, and no softmax."""
    gated_expert: bool = False
    """A mixture with an expert that every token goes through, and a gate for what it says."""
    router: str = "gate"
    """Name of a mixture's router."""
    biased_experts: bool = False
    """gpt-oss: experts and router have biases, and LoRA leaves both alone; each head of attention has a sink, and
    packed documents see one another."""
    layout: Literal["before", "after", "around", "beside"] = "before"
    """Norms of a layer: before attention and MLP, after them, both, or one before the two side by side."""
    norm: Literal["rms", "rms_wide", "rms_offset", "layer", "layer_wide"] = "rms"
    """`rms`: times the weight in the input's width; `rms_wide`: in fp32; `rms_offset`: times 1 + the weight, in fp32;
    `layer`: torch's LayerNorm; `layer_wide`: one written out in fp32, without a bias."""
    norm_names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Modules of a layer that are norms, beside those of queries and keys."""
    rotation: Literal["half", "narrowed", "interleaved", "split", "pairs", "complex"] = "half"
    """`half`: the second half of a head against the first; `split`: the same, each half by itself; `narrowed`: as
    `half`, cast back to the width of the heads; `interleaved`: every second feature, in fp32; `pairs`: the same, each
    by itself; `complex`: as complex numbers."""
    rotary_share: float = 1.0
    """Share of a head's features that are rotated where a config does not say."""
    odd_every: int = 0
    """Every so many layers one is unlike the others; 0 where all are alike."""
    odd: Literal["unrotated", "own_table", "attends"] = "own_table"
    """How: it has no positions; or cosines and sines of its own; or attention, where the others have a gated delta
    rule."""
    latent: bool = False
    """Keys and values are made of a vector that all heads share (MLA), queries of another."""
    gated_attention: bool = False
    """What attention says is multiplied with a gate, which the projection of queries makes, too."""
    windows: bool = False
    """Some layers see a window: the model makes a mask for them, too."""
    softcap: bool = False
    """Attention scores go through tanh."""
    scaled_embedding: Literal["", "inside", "outside"] = ""
    """Embeddings are multiplied, in their own module or behind it."""
    scaled_residual: bool = False
    """What attention and MLP say is multiplied before it is added."""
    scaled_queries: bool = False
    """Rotated queries are multiplied by a number for each position."""
    scaled_logits: bool = False
    capped_logits: bool = False
    """Logits go through tanh."""


_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA = Traits(layout="around", norm="rms_offset", norm_names=_AROUND, scaled_embedding="inside", windows=True)
_OLMO = Traits(
    qk_norm="whole", layout="after", norm="rms_wide", rotation="narrowed",
    norm_names=("post_attention_layernorm", "post_feedforward_layernorm"),
)  # fmt: skip
TRAITS = {
    "llama": Traits(attention_bias="all"),
    "mistral": Traits(),
    "ministral3": Traits(scaled_queries=True),
    "mixtral": Traits(mixture=True),
    "qwen2": Traits(qkv_bias=True),
    "qwen3": Traits(qk_norm="head", attention_bias="all"),
    "qwen3_moe": Traits(qk_norm="head", mixture=True, attention_bias="all"),
    "glm4_moe": Traits(mixture=True, shared=True, sigmoid=True, attention_bias="qkv", rotary_share=0.5),
    "deepseek_v2": Traits(mixture=True, shared=True, attention_bias="all", latent=True, rotation="complex"),
    "deepseek_v3": Traits(
        mixture=True, shared=True, sigmoid=True, attention_bias="all", latent=True, rotation="pairs"
    ),
    "gpt_oss": Traits(
        qkv_bias=True, attention_bias="all", mixture=True, router="router", biased_experts=True, norm="rms_wide",
        rotation="split", windows=True,
    ),
    "qwen3_5_text": Traits(
        qk_norm="head", attention_bias="all", norm="rms_offset", odd_every=4, odd="attends", gated_attention=True,
        rotary_share=0.25,
    ),
    "qwen3_5_moe_text": Traits(
        qk_norm="head", attention_bias="all", norm="rms_offset", odd_every=4, odd="attends", gated_attention=True,
        rotary_share=0.25, mixture=True, gated_expert=True,
    ),
    "gemma": Traits(norm="rms_offset", scaled_embedding="inside", attention_bias="all"),
    "gemma2": _GEMMA._replace(softcap=True, capped_logits=True, attention_bias="all"),
    "gemma3_text": _GEMMA._replace(qk_norm="head", odd_every=6, attention_bias="all"),
    "olmo2": _OLMO._replace(attention_bias="all"),
    "olmo3": _OLMO._replace(attention_bias="all", windows=True, odd_every=4),
    "granite": Traits(attention_bias="all", scaled_embedding="outside", scaled_residual=True, scaled_logits=True),
    "glm4": Traits(
        qkv_bias=True, attention_bias="qkv", fused_gate_up=True, layout="around", rotation="interleaved",
        rotary_share=0.5,
        norm_names=(
            "input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm",
        ),
    ),
    "smollm3": Traits(attention_bias="all", odd_every=4, odd="unrotated"),
    "cohere2": Traits(
        attention_bias="all", layout="beside", norm="layer_wide", norm_names=("input_layernorm",),
        rotation="interleaved",
        odd_every=4, odd="unrotated", windows=True, scaled_logits=True,
    ),
    "phi3": Traits(fused_qkv=True, fused_gate_up=True),
    "phi": Traits("phi", norm="layer", layout="beside", norm_names=("input_layernorm",)),
    "gpt_neox": Traits("gpt_neox", norm="layer"),
    "gpt2": Traits("gpt2", norm="layer", norm_names=("ln_1", "ln_2")),
}  # fmt: skip


ARCHITECTURES = tuple(sorted(TRAITS))
"""What `model.architecture` may be for a model that is planned: `model_type` in transformers."""
