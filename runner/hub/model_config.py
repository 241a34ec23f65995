"""Facts of a model that its `config.json` states, and the `config.json` of a model's facts.

Defaults of keys that a config leaves out are those of the config classes in transformers 5.23.0,
`models/<model_type>/configuration_<model_type>.py`; a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from runner.errors import Problem, RequestError
from runner.hub.config_json import local_config
from runner.plan.architectures import ARCHITECTURES, TRAITS
from runner.plan.model_shape import shape_of
from runner.spec import ModelSpec
from runner.spec.model import MOST_LAYERS

LARGEST_SIZE = 1 << 40
"""Above every size of a model, and far below what a float cannot hold."""
# Fact of ModelSpec → the keys it may stand under, in the order in which they count.
_KEYS = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "context_length": ("max_position_embeddings",),
}
_EXPERT_KEYS = {"num_experts": ("num_local_experts", "num_experts"), "experts_per_token": ("num_experts_per_tok",)}
_LINEAR_DEFAULTS = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
"""Of Qwen3_5TextConfig and Qwen3_5MoeTextConfig."""
_LATENT_DEFAULTS = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
"""Of DeepseekV2Config and DeepseekV3Config."""
_DEEPSEEK_KEYS = {
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "intermediate_size": ("moe_intermediate_size",),
    "dense_intermediate_size": ("intermediate_size",),
    "head_dim": (),
    **{key: (key,) for key in _LATENT_DEFAULTS},
}
_OWN_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": _EXPERT_KEYS,
    "qwen3_moe": {**_EXPERT_KEYS, "intermediate_size": ("moe_intermediate_size",)},
    "glm4_moe": {
        "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
        "experts_per_token": ("num_experts_per_tok",),
        "intermediate_size": ("moe_intermediate_size",),
        "dense_intermediate_size": ("intermediate_size",),
    },
    "deepseek_v2": _DEEPSEEK_KEYS,
    "deepseek_v3": _DEEPSEEK_KEYS,
    "gpt_oss": _EXPERT_KEYS,
    "qwen3_5_text": {key: (key,) for key in _LINEAR_DEFAULTS},
    "qwen3_5_moe_text": {
        "num_experts": ("num_experts",),
        "experts_per_token": ("num_experts_per_tok",),
        "intermediate_size": ("moe_intermediate_size",),
        "shared_intermediate_size": ("shared_expert_intermediate_size",),
        **{key: (key,) for key in _LINEAR_DEFAULTS},
    },
    "gpt_neox": {"num_kv_heads": (), "head_dim": ()},
    "gpt2": {
        "hidden_size": ("n_embd", "hidden_size"),
        "intermediate_size": ("n_inner",),
        "num_layers": ("n_layer", "num_hidden_layers"),
        "num_heads": ("n_head", "num_attention_heads"),
        "context_length": ("n_positions", "max_position_embeddings"),
        "num_kv_heads": (),
        "head_dim": (),
    },
}

# hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary, context, tied; None: from the other sizes.
_DEFAULTS: dict[str, tuple[int | bool | None, ...]] = {
    "llama": (4096, 11008, 32, 32, None, None, 32000, 2048, False),
    "mistral": (4096, 14336, 32, 32, 8, None, 32000, 131072, False),
    "mixtral": (4096, 14336, 32, 32, 8, None, 32000, 131072, False),
    "qwen2": (4096, 22016, 32, 32, 32, None, 151936, 32768, False),
    "qwen3": (4096, 22016, 32, 32, 32, 128, 151936, 32768, False),
    "qwen3_moe": (2048, 768, 24, 32, 4, None, 151936, 32768, False),
    "glm4_moe": (4096, 1408, 46, 96, 8, None, 151552, 131072, False),
    "gpt_oss": (2880, 2880, 36, 64, 8, 64, 201088, 131072, False),
    "deepseek_v2": (4096, 1407, 32, 32, None, None, 102400, 2048, False),
    "deepseek_v3": (7168, 2048, 61, 128, 128, None, 129280, 4096, False),
    "qwen3_5_moe_text": (2048, 512, 40, 16, 2, 256, 248320, 32768, False),
    "qwen3_5_text": (4096, 12288, 32, 16, 4, 256, 248320, 32768, False),
    "gemma": (3072, 24576, 28, 16, 16, 256, 256000, 8192, True),
    "gemma2": (2304, 9216, 26, 8, 4, 256, 256000, 8192, True),
    "gemma3_text": (2304, 9216, 26, 8, 4, 256, 262208, 131072, True),
    "ministral3": (4096, 14336, 34, 32, 8, 128, 131072, 262144, False),
    "olmo2": (4096, 11008, 32, 32, None, None, 50304, 2048, False),
    "olmo3": (4096, 11008, 32, 32, None, None, 50304, 2048, False),
    "granite": (4096, 11008, 32, 32, None, None, 32000, 2048, False),
    "glm4": (4096, 13696, 40, 32, 2, 128, 151552, 131072, False),
    "smollm3": (2048, 11008, 36, 16, 4, None, 128256, 32768, True),
    "cohere2": (8192, 22528, 40, 64, None, None, 256000, 8192, True),
    "phi3": (3072, 8192, 32, 32, None, None, 32064, 4096, False),
    "phi": (2048, 8192, 24, 32, None, None, 51200, 2048, False),
    "gpt_neox": (6144, 24576, 44, 64, None, None, 50432, 2048, False),
    "gpt2": (768, None, 12, 12, None, None, 50257, 1024, True),
}
_EXPERT_DEFAULTS = {
    "mixtral": (8, 2),
    "qwen3_moe": (128, 8),
    "glm4_moe": (128, 8),
    "gpt_oss": (128, 4),
    "deepseek_v2": (64, None),
    "deepseek_v3": (256, 8),
    "qwen3_5_moe_text": (256, 8),
}  # experts, and those of one token
_SHARED_DEFAULTS = {"glm4_moe": (10944, 1, 1), "deepseek_v2": (11008, 0, 2), "deepseek_v3": (18432, 3, 1)}
"""intermediate_size, first_k_dense_replace and n_shared_experts."""

# Keys that change matrices, norms or what is kept for the backward pass, and the one value whose shape is known.
_ONLY: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "granite": {"mlp_bias": False},
    "smollm3": {"mlp_bias": False, "no_rope_layer_interval": 4},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_5_text": {"linear_conv_kernel_dim": 4, "full_attention_interval": 4},
    "qwen3_5_moe_text": {"linear_conv_kernel_dim": 4, "full_attention_interval": 4},
    "deepseek_v2": {"mlp_bias": False, "topk_method": "greedy"},
    "deepseek_v3": {"rope_interleave": True, "norm_topk_prob": True},
    "phi": {"qk_layernorm": False},
    "gpt_neox": {"attention_bias": True, "use_parallel_residual": True},
    "gpt2": {"add_cross_attention": False},
}


class UnknownShapeError(RequestError):
    """The arithmetic does not know the layers that a config describes."""


class NotCausalError(RequestError):
    """The config is of another kind of model than those that this runner trains."""


def check_causal(config: Mapping[str, object], source: str | None = None) -> None:
    """NotCausalError for an encoder-decoder model and for an encoder, as far as a `config.json` says so."""
    names = config.get("architectures")
    masked = isinstance(names, list) and any(str(name).endswith("ForMaskedLM") for name in names)
    if config.get("is_encoder_decoder") is True:
        raise not_causal(config.get("model_type"), "an encoder-decoder model", source)
    if masked and config.get("is_decoder") is not True:
        raise not_causal(config.get("model_type"), "an encoder, in which a token sees those that follow", source)


def not_causal(kind: object, what: str, source: str | None = None) -> NotCausalError:
    """The sentence about a model of that kind."""
    told = f"{kind} is {what}; this runner trains decoder-only causal LMs"
    return NotCausalError(Problem(told, source, "name one: python -m runner list model shows some"))


def check_sizes(config: Mapping[str, object], source: str | None = None) -> None:
    """RequestError for sizes that no model can have, under the names that most types of models share."""
    inner = _language_model(config)
    problems = []
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        value, most = inner.get(name), MOST_LAYERS if name == "num_hidden_layers" else LARGEST_SIZE
        if isinstance(value, (int, float, str)) and not _is_size(value, False, most):  # some types list one per layer
            what = f"{name}={json.dumps(value)}: expected a whole number from 1 to {most:,}"
            problems.append(Problem(what, source, f"correct {name} in it"))
    if problems:
        raise RequestError(*problems)


def facts_from_config(config: Mapping[str, object], source: str | None = None) -> dict[str, object]:
    """Return the ModelSpec fields in a `config.json`: architecture, sizes and the number of parameters.

    Of a model with several parts (`text_config`), the language model alone: its parameters do not count
    an image encoder. `source` is named in errors. Raises RequestError for a `model_type` that is none of
    `ARCHITECTURES` and for a variant whose shape is not known (UnknownShapeError), and for values that cannot be.
    """
    config = _language_model(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        kind = UnknownShapeError if isinstance(model_type, str) and model_type else RequestError
        what = f"model_type {model_type} is not known" if model_type else "the config has no model_type"
        raise kind(Problem(what, source, f"known are {', '.join(ARCHITECTURES)}"))
    if problems := [*_variants(model_type, config, source), *_unusual_layers(model_type, config, source)]:
        raise UnknownShapeError(*problems)
    facts: dict[str, Any] = {"architecture": model_type, **_sizes(model_type, config, source)}
    facts |= _shared_experts(facts, config, source) if TRAITS[model_type].shared else {}
    facts |= _bias(model_type, config, source)
    try:
        model = ModelSpec.model_validate({"id": "config.json", **facts})
        return facts | {"num_parameters": shape_of(model).num_parameters}
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RequestError(*(Problem(str(d["msg"]).removeprefix("Value error, "), source) for d in details)) from None
    except RequestError as error:
        raise RequestError(*(Problem(p.what, p.source or source, p.remedy) for p in error.problems)) from None


def config_of(model: ModelSpec) -> dict[str, Any]:
    """The keys of a `config.json` that make transformers build a model of these facts: the way back."""
    config = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim or (model.hidden_size or 0) // (model.num_heads or 1) or None,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context_length,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.attention_bias,
        "num_experts_per_tok": model.experts_per_token,
    }
    own = _OWN_KEYS.get(model.architecture or "", {})
    config |= dict.fromkeys(own.get("intermediate_size", ()), model.intermediate_size)
    config[own.get("num_experts", ("num_local_experts",))[0]] = model.num_experts
    if model.shared_intermediate_size and model.intermediate_size and model.dense_layers is not None:
        config["intermediate_size"] = model.dense_intermediate_size
        config["first_k_dense_replace"] = model.dense_layers
        config["n_shared_experts"] = model.shared_intermediate_size // model.intermediate_size
        config |= {} if model.kv_lora_rank else {"use_qk_norm": bool(model.qk_norm)}
    if model.architecture == "qwen3_5_moe_text":
        config["shared_expert_intermediate_size"] = model.shared_intermediate_size
    config |= {key: getattr(model, key) for key in (*_LINEAR_DEFAULTS, *_LATENT_DEFAULTS)}
    config |= {"head_dim": None} if model.kv_lora_rank else {}
    found = {key: value for key, value in config.items() if value is not None}
    return found | ({"q_lora_rank": model.q_lora_rank} if model.kv_lora_rank else {})  # null: queries have one matrix


def local_facts(model_id: str, revision: str | None = None) -> dict[str, object] | None:
    """`facts_from_config` of what `local_config` finds; None where it finds none. Raises RequestError as both do."""
    found = local_config(model_id, revision)
    return facts_from_config(*found) if found else None


def _language_model(config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a config that describes the language model; whether embeddings are tied may stand outside it."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    outside = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**outside, **inner}


def _variants(model_type: str, config: Mapping[str, object], source: str | None) -> list[Problem]:
    """Keys whose value makes other layers than those that are known."""
    return [
        Problem(
            f"{key}={json.dumps(config[key])}: the shape of {model_type} is known with {json.dumps(wanted)} only",
            source,
            "plan a model of the same sizes without it",
        )
        for key, wanted in _ONLY.get(model_type, {}).items()
        if config.get(key) is not None and config[key] != wanted
    ]


def _unusual_layers(model_type: str, config: Mapping[str, object], source: str | None) -> Iterator[Problem]:
    """Lists of one entry per layer that say which have positions, and which see a window: other ones than the usual."""
    traits = TRAITS[model_type]
    every = traits.odd_every if traits.odd != "own_table" else 0
    key, without = ("no_rope_layers", 0) if model_type == "smollm3" else ("layer_types", "full_attention")
    listed = config.get(key)
    if not every or not isinstance(listed, list):
        return
    usual = [(i + 1) % every == 0 for i in range(len(listed))]
    if [one == without for one in listed] != usual:
        how = "without positions" if traits.odd == "unrotated" else "with attention"
        what = f"{key}: the shape of {model_type} is known with every {every}th layer {how} only"
        yield Problem(what, source, "plan a model of the same sizes without it")


def _bias(model_type: str, config: Mapping[str, object], source: str | None) -> dict[str, object]:
    """`attention_bias`, where a config says another than the usual one."""
    given = config.get("attention_bias")
    traits = TRAITS[model_type]
    if given is None or not traits.attention_bias or given == traits.qkv_bias:
        return {}
    if not isinstance(given, bool):
        raise RequestError(Problem(f"attention_bias={json.dumps(given)}: expected true or false", source))
    return {"attention_bias": given}


def _shared_experts(facts: Mapping[str, Any], config: Mapping[str, object], source: str | None) -> dict[str, object]:
    """Dense layers and shared experts of a mixture, and whether queries and keys are normalised."""
    _, first, number = _SHARED_DEFAULTS[facts["architecture"]]
    dense, shared = config.get("first_k_dense_replace", first), config.get("n_shared_experts", number)
    normed = config.get("use_qk_norm", False) if not TRAITS[facts["architecture"]].latent else False
    problems = []
    if not (_is_size(dense, False, MOST_LAYERS) or (dense == 0 and not isinstance(dense, bool))):
        problems.append(f"first_k_dense_replace={json.dumps(dense)}: expected a whole number from 0")
    if not _is_size(shared, False, MOST_LAYERS):
        problems.append(f"n_shared_experts={json.dumps(shared)}: expected a whole number from 1")
    if not isinstance(normed, bool):
        problems.append(f"use_qk_norm={json.dumps(normed)}: expected true or false")
    if problems:
        raise RequestError(*(Problem(what, source) for what in problems))
    width = int(str(shared)) * facts["intermediate_size"]
    return {"dense_layers": dense, "shared_intermediate_size": width} | ({"qk_norm": True} if normed else {})


def _sizes(model_type: str, config: Mapping[str, object], source: str | None) -> dict[str, object]:
    """Every size of ModelSpec, from the config or the default of its class."""
    keys = {**_KEYS, **_OWN_KEYS.get(model_type, {})}
    facts: dict[str, Any] = dict(zip((*_KEYS, "tie_embeddings"), _DEFAULTS[model_type], strict=True))
    facts |= dict(zip(_EXPERT_KEYS, _EXPERT_DEFAULTS.get(model_type, ()), strict=False))
    facts |= {"dense_intermediate_size": _SHARED_DEFAULTS[model_type][0]} if TRAITS[model_type].shared else {}
    facts |= {"shared_intermediate_size": 512} if TRAITS[model_type].gated_expert else {}  # Qwen3_5MoeTextConfig
    facts |= _LINEAR_DEFAULTS if TRAITS[model_type].odd == "attends" else {}
    facts |= _LATENT_DEFAULTS if TRAITS[model_type].latent else {}
    problems = []
    for fact, names in keys.items():
        for name in reversed(names):
            if name in config:
                facts[fact] = config[name]
                optional = fact in ("num_kv_heads", "head_dim", "q_lora_rank", "experts_per_token") or name == "n_inner"
                largest = MOST_LAYERS if fact == "num_layers" else LARGEST_SIZE
                if not _is_size(config[name], optional, largest):
                    what = f"{name}={json.dumps(config[name])}: expected a whole number from 1 to {largest:,}"
                    problems.append(Problem(what, source))
    tied = config.get("tie_word_embeddings", facts["tie_embeddings"])
    if not isinstance(tied, bool):
        problems.append(Problem(f"tie_word_embeddings={json.dumps(tied)}: expected true or false", source))
    if problems:
        raise RequestError(*problems)
    facts["tie_embeddings"] = tied
    if facts["num_kv_heads"] is None:
        facts["num_kv_heads"] = facts["num_heads"]
    own_width = TRAITS[model_type].shared or facts["hidden_size"] % facts["num_heads"] == 0
    if facts["head_dim"] is None and own_width and not TRAITS[model_type].latent:
        facts["head_dim"] = facts["hidden_size"] // facts["num_heads"]
    if facts["intermediate_size"] is None:  # GPT2Block: n_inner, or 4 × the hidden size
        facts["intermediate_size"] = 4 * facts["hidden_size"]
    return {fact: value for fact, value in facts.items() if value is not None}


def _is_size(value: object, optional: bool, largest: int) -> bool:
    if value is None:
        return optional
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest
