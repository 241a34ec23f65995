"""Model facts from a Hugging Face `config.json`: in a folder, in the local cache, or from the Hub over HTTP.

Not part of the pure plan: `local_facts` reads files and the variables HF_HOME and HF_HUB_CACHE. It imports
neither transformers nor huggingface_hub. Defaults of keys that a config leaves out are those of the config
classes in transformers 5.23.0, `models/<model_type>/configuration_<model_type>.py`; a test compares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from runner.config import credentials, json_text
from runner.errors import Problem, RequestError
from runner.hub.bounded import bounded
from runner.paths import cache_dir
from runner.plan.model_shape import ARCHITECTURES, TRAITS, shape_of
from runner.rundir.directory import write_atomically
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
_OWN_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "mixtral": _EXPERT_KEYS,
    "qwen3_moe": {**_EXPERT_KEYS, "intermediate_size": ("moe_intermediate_size",)},
    "glm4_moe": {
        "num_experts": ("n_routed_experts", "num_local_experts", "num_experts"),
        "experts_per_token": ("num_experts_per_tok",),
        "intermediate_size": ("moe_intermediate_size",),
        "dense_intermediate_size": ("intermediate_size",),
    },
    "gpt_oss": _EXPERT_KEYS,
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
}  # experts, and those of one token
_DENSE_DEFAULT = 10944  # intermediate_size of Glm4MoeConfig

# Keys that change matrices, norms or what is kept for the backward pass, and the one value whose shape is known.
_ONLY: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "granite": {"mlp_bias": False},
    "smollm3": {"mlp_bias": False, "no_rope_layer_interval": 4},
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "phi": {"qk_layernorm": False},
    "gpt_neox": {"attention_bias": True, "use_parallel_residual": True},
    "gpt2": {"add_cross_attention": False},
}


class UnknownShapeError(RequestError):
    """The arithmetic does not know the layers that a config describes."""


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
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.experts_per_token,
    }
    own = _OWN_KEYS.get(model.architecture or "", {}).get("intermediate_size", ())
    config |= dict.fromkeys(own, model.intermediate_size)
    if model.shared_intermediate_size and model.intermediate_size:
        config["intermediate_size"] = model.dense_intermediate_size
        config["first_k_dense_replace"] = model.dense_layers
        config["n_shared_experts"] = model.shared_intermediate_size // model.intermediate_size
        config["use_qk_norm"] = bool(model.qk_norm)
    return {key: value for key, value in config.items() if value is not None}


def local_facts(model_id: str, revision: str | None = None) -> dict[str, object] | None:
    """`facts_from_config` of a model folder, or of a Hub id in the local Hugging Face cache; None if not at hand.

    In the cache, the snapshot that `revision` (default `main`) points to; without such a reference, the
    newest snapshot. Raises RequestError, naming the file, for one that cannot be read or is not JSON, and
    what `facts_from_config` raises.
    """
    found = local_config(model_id, revision)
    return facts_from_config(*found) if found else None


def local_config(model_id: str, revision: str | None = None) -> tuple[dict[str, object], str] | None:
    """The config.json that `local_facts` reads, and its path."""
    file = _config_file(model_id, revision)
    return (_read(file), str(file)) if file else None


def is_cached(model_id: str) -> bool:
    """Weights of this Hub id are in the local cache."""
    repo = _repo(model_id)
    return any(any(repo.glob(f"snapshots/*/*.{ending}")) for ending in ("safetensors", "bin", "gguf"))


def _repo(model_id: str) -> Path:
    # repo_folder_name, huggingface_hub/file_download.py
    return cache_folder() / "--".join(("models", *model_id.split("/")))


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
    every = traits.odd_every if traits.odd == "unrotated" else 0
    key, without = ("no_rope_layers", 0) if model_type == "smollm3" else ("layer_types", "full_attention")
    listed = config.get(key)
    if not every or not isinstance(listed, list):
        return
    usual = [(i + 1) % every == 0 for i in range(len(listed))]
    if [one == without for one in listed] != usual:
        what = f"{key}: the shape of {model_type} is known with every {every}th layer without positions only"
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
    dense, shared = config.get("first_k_dense_replace", 1), config.get("n_shared_experts", 1)
    normed = config.get("use_qk_norm", False)
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
    facts |= {"dense_intermediate_size": _DENSE_DEFAULT} if TRAITS[model_type].shared else {}
    problems = []
    for fact, names in keys.items():
        for name in reversed(names):
            if name in config:
                facts[fact] = config[name]
                optional = fact in ("num_kv_heads", "head_dim") or name == "n_inner"
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
    if facts["head_dim"] is None and (TRAITS[model_type].shared or facts["hidden_size"] % facts["num_heads"] == 0):
        facts["head_dim"] = facts["hidden_size"] // facts["num_heads"]
    if facts["intermediate_size"] is None:  # GPT2Block: n_inner, or 4 × the hidden size
        facts["intermediate_size"] = 4 * facts["hidden_size"]
    return {fact: value for fact, value in facts.items() if value is not None}


def _is_size(value: object, optional: bool, largest: int) -> bool:
    if value is None:
        return optional
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def _config_file(model_id: str, revision: str | None) -> Path | None:
    folder = Path(model_id)
    if os.path.isdir(folder):
        file = folder / "config.json"
        return file if os.path.isfile(file) else None
    repo = _repo(model_id)
    wanted = revision or "main"
    reference = repo / "refs" / wanted
    commit = reference.read_text("utf-8").strip() if os.path.isfile(reference) else wanted
    file = repo / "snapshots" / commit / "config.json"
    if os.path.isfile(file):
        return file
    snapshots = [] if revision else [f for f in repo.glob("snapshots/*/config.json") if os.path.isfile(f)]
    return max(snapshots, key=lambda f: f.parent.stat().st_mtime_ns, default=None)


def instead_of(folder: Path) -> str | None:
    """What to write for a folder that is no model, but holds an adapter or a GGUF file; None for any other."""
    if os.path.isfile(adapter := folder / "adapter_config.json"):
        if os.path.isfile(folder.parent / "spec.json"):
            run = quote(str(folder.parent))
            return f"it holds an adapter: python -m runner merge {run}, and write model.id={run}/merged"
        base = json_text.object_of(adapter.read_text("utf-8", "replace")).get("base_model_name_or_path")
        return f"it holds an adapter; name its base model: model.id={base or 'org/name'}"
    gguf = min((file.name for file in folder.glob("*.gguf")), default=None)
    return f"write model.gguf_file={gguf}" if gguf else None


def cache_folder() -> Path:
    """The Hub's local cache, by the rules of `huggingface_hub/constants.py` (2.x)."""
    home = os.getenv("HF_HOME") or os.path.join(os.getenv("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.getenv("HF_HUB_CACHE") or os.getenv("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def _read(file: Path) -> dict[str, object]:
    try:
        config = json_text.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RequestError(Problem(f"cannot be read: {error.strerror}", str(file))) from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError
        raise RequestError(Problem(f"not JSON: {error}", str(file), "download the model again")) from None
    if not isinstance(config, dict):
        raise RequestError(Problem("not a config: expected a JSON object", str(file), "download the model again"))
    return config


if TYPE_CHECKING:
    from urllib.error import HTTPError

TIMEOUT_S = 5.0  # between two bytes
TOTAL_S = 15.0  # to the last one
_unreachable: dict[str, str] = {}
"""Hubs that this process did not reach, and why: nobody waits for one twice."""
LARGEST_ANSWER = 1_000_000  # bytes; a config.json has a few thousand


class UnreachableError(RequestError):
    """The Hub said nothing about the model: no network, no answer in time, or an error of its own."""


def fetch(model_id: str, revision: str | None = None) -> dict[str, object]:
    """The parsed config.json; kept in the cache. RequestError says what stands in the way, and what to do."""
    found = fetched_before(model_id, revision)
    if found is not None:
        return found
    text = _get(model_id, revision or "main")
    content = _parsed(text, model_id)
    file = _file(model_id, revision)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    return content


def fetched_before(model_id: str, revision: str | None = None) -> dict[str, object] | None:
    """Return the cached result of an earlier `fetch`; None without one."""
    file = _file(model_id, revision)
    return _parsed(file.read_text("utf-8"), model_id) if file.is_file() else None


def _file(model_id: str, revision: str | None) -> Path:
    name = "--".join([*model_id.split("/"), (revision or "main").replace("/", "--")])
    return cache_dir() / "configs" / f"{name}.json"


def gated_remedy(model_id: str) -> str:
    """Return the remedy for a gated model."""
    return f"accept its licence at https://huggingface.co/{model_id}, then export HF_TOKEN=…"


def check_dataset(dataset_id: str) -> None:
    """RequestError for a data set that is not there, or closed; UnreachableError where nobody says so."""
    import urllib.error
    import urllib.parse

    remedy = "check the network, or bring the rows in a file: data=file data.path=…"
    try:
        _asked(f"api/datasets/{urllib.parse.quote(dataset_id)}", dataset_id, dataset_id, remedy)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403, 404):
            raise UnreachableError(Problem(f"the Hub answered {error.code} for {dataset_id}", None, remedy)) from None
        spelling = "check the spelling (org/name); for a private data set set HF_TOKEN"
        what = f"{dataset_id} is not on the Hugging Face Hub, or private"
        raise RequestError(Problem(what, "data.id", spelling)) from None


def _get(model_id: str, revision: str) -> str:
    import urllib.error  # 24 ms with what it imports, once per model
    import urllib.parse

    folder = f"name a folder that has its config.json (hf download {model_id} config.json --local-dir .): model.id=."
    path = f"{urllib.parse.quote(model_id)}/resolve/{urllib.parse.quote(revision)}/config.json"
    try:
        return _asked(path, f"config.json of {model_id}", model_id, folder)
    except urllib.error.HTTPError as error:
        kind = UnreachableError if error.code >= 500 or error.code == 429 else RequestError
        raise kind(_refused(model_id, error)) from None


def _asked(path: str, wanted: str, name: str, remedy: str) -> str:
    """What the Hub answers; UnreachableError where it does not, HTTPError where it refuses."""
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UnreachableError(Problem(f"HF_HUB_OFFLINE is set: {wanted} is not here", None, remedy))
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if base in _unreachable:
        raise UnreachableError(Problem(f"the Hub cannot be reached for {name}: {_unreachable[base]}", None, remedy))
    request = urllib.request.Request(f"{base.rstrip('/')}/{path}")
    if (secret := credentials.hub_token()) is not None:
        # Unredirected: a redirect to a storage host must not get the token.
        request.add_unredirected_header("Authorization", f"Bearer {secret}")

    def read() -> bytes:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(LARGEST_ANSWER)
            return content

    try:
        return bounded(read, TOTAL_S).decode("utf-8")
    except urllib.error.HTTPError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", error)
        if isinstance(error, HTTPException):
            why = "the server there does not speak HTTP"
        _unreachable[base] = str(why)
        raise UnreachableError(Problem(f"the Hub cannot be reached for {name}: {why}", None, remedy)) from None


def _refused(model_id: str, error: HTTPError) -> Problem:
    if error.code in (401, 403):
        what = f"{model_id} is gated or private on the Hugging Face Hub, or does not exist"
        return Problem(what, None, gated_remedy(model_id))
    if error.code == 404:
        return Problem(f"the Hub has no config.json for {model_id}", None, "check model.id and model.revision")
    return Problem(f"the Hub answered {error.code} for {model_id}", None, "try again, or name a local folder")


def _parsed(text: str, model_id: str) -> dict[str, object]:
    try:
        content = json_text.loads(text)
    except ValueError as error:
        raise RequestError(Problem(f"config.json of {model_id} is not JSON: {error}")) from None
    if not isinstance(content, dict):
        raise RequestError(Problem(f"config.json of {model_id} is not a JSON object"))
    return content
