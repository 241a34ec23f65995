"""The arithmetic's idea of a model is transformers' own: same matrices, same parameters, for every architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runner.config import conf_files
from runner.errors import RequestError
from runner.hub.model_config import config_of, facts_from_config, local_facts
from runner.plan.architectures import ARCHITECTURES
from runner.plan.model_shape import LayerShape, shape_of
from runner.plan.trainable import modules_around, modules_of
from runner.spec import ModelSpec

KNOWN = [name for name in conf_files.options("model") if conf_files.load_choice("model", name).get("architecture")]

# Sizes that no two of are alike, and that are no family's default: a mixed-up pair shows.
COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 112,
    "max_position_embeddings": 40,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXTURE = {"num_experts": 5, "num_experts_per_tok": 3}
SHARED = {"n_routed_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "n_shared_experts": 2}
UNGROUPED = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 40, "vocab_size": 112}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 10, "linear_value_head_dim": 14,
}  # fmt: skip
LATENT = {
    **COMMON, **SHARED, "num_key_value_heads": 6, "q_lora_rank": 26, "kv_lora_rank": 18, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4, "v_head_dim": 12, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
TINY: list[tuple[str, dict[str, Any]]] = [
    ("llama", COMMON),
    ("llama", {**UNGROUPED, "tie_word_embeddings": True, "head_dim": 20}),
    ("mistral", {**COMMON, "head_dim": 20}),
    ("mixtral", {**COMMON, "num_local_experts": 5, "num_experts_per_tok": 3}),
    ("qwen2", {**COMMON, "tie_word_embeddings": True}),
    ("qwen3", {**COMMON, "head_dim": 20}),
    ("qwen3_moe", {**COMMON, **MIXTURE, "moe_intermediate_size": 28, "head_dim": 20}),
    ("glm4_moe", {**COMMON, **SHARED, "head_dim": 20}),
    ("glm4_moe", {**COMMON, **SHARED, "first_k_dense_replace": 0, "use_qk_norm": True, "attention_bias": True}),
    ("gpt_oss", {**COMMON, "num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 20}),
    ("qwen3_5_text", {**COMMON, **LINEAR, "num_hidden_layers": 4, "head_dim": 20, "attention_bias": True}),
    (
        "qwen3_5_moe_text",
        {
            **COMMON,
            **MIXTURE,
            **LINEAR,
            "num_hidden_layers": 4,
            "head_dim": 20,
            "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 36,
        },
    ),
    ("deepseek_v2", LATENT),
    ("deepseek_v2", {**LATENT, "q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", LATENT),
    ("deepseek_v3", {**LATENT, "q_lora_rank": None, "tie_word_embeddings": True}),
    ("gemma", {**COMMON, "head_dim": 20}),
    ("gemma2", {**COMMON, "head_dim": 20}),
    ("gemma3_text", {**COMMON, "head_dim": 20}),
    ("ministral3", {**COMMON, "head_dim": 20}),
    ("olmo2", COMMON),
    ("olmo3", {**COMMON, "tie_word_embeddings": True}),
    ("granite", {**COMMON, "attention_bias": True}),
    ("glm4", {**COMMON, "head_dim": 20}),
    ("glm4", {**COMMON, "head_dim": 20, "attention_bias": False}),
    ("smollm3", COMMON),
    ("cohere2", COMMON),
    ("phi3", {**COMMON, "tie_word_embeddings": True}),
    ("phi", {**COMMON, "partial_rotary_factor": 0.5}),
    ("phi", {**UNGROUPED, "tie_word_embeddings": True}),
    ("gpt_neox", UNGROUPED),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 80, "tie_word_embeddings": False}),
]


SMALL = ("norm", "ln_", "sinks", "conv1d", "A_log", "dt_bias")
"""Parts of the names of parameters that are no matrices."""
UNSAID = {"deepseek_v2": {"num_experts_per_tok": 6}}
"""Keys without a default in the class."""


def catalogued(name: str, **changes: Any) -> ModelSpec:
    return ModelSpec.model_validate(conf_files.load_choice("model", name) | changes)


def remedies(error: RequestError) -> str:
    return "; ".join(p.remedy or "" for p in error.problems)


@pytest.mark.parametrize("name", KNOWN)
def test_every_catalogued_model_has_its_exact_number_of_parameters(name: str) -> None:
    model = catalogued(name)
    assert shape_of(model).num_parameters == model.num_parameters


def test_every_architecture_is_compared_with_transformers() -> None:
    assert {architecture for architecture, _ in TINY} == set(ARCHITECTURES)


@pytest.mark.parametrize(("architecture", "config"), TINY, ids=[f"{a}-{i}" for i, (a, _) in enumerate(TINY)])
def test_the_shape_is_that_of_the_real_model(architecture: str, config: dict[str, Any]) -> None:
    model, whole = built(architecture, config)
    facts = facts_from_config(whole)
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **facts}))

    total = sum(p.numel() for p in model.parameters())  # torch counts a tied matrix once
    assert facts["num_parameters"] == shape.num_parameters == total
    for mine, layer in zip(shape.layers, decoder_layers(model), strict=True):
        assert mine.parameters == sum(p.numel() for p in layer.parameters())
        assert mine.norm_parameters == sum(
            p.numel() for n, p in layer.named_parameters() if any(small in n for small in SMALL)
        )
        assert described(mine) == Counter(matrices(layer))
    assert shape.tie_embeddings is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert shape.head_bias is (model.get_output_embeddings().bias is not None)
    layers = config.get("num_hidden_layers", 3)
    assert (shape.num_layers, shape.num_heads, shape.context_length) == (layers, 6, 40)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bitsandbytes_quantises_the_linear_matrices_and_no_others(architecture: str) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    model, whole = built(architecture, dict(TINY)[architecture])
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    replace_with_bnb_linear(model, [head], BitsAndBytesConfig(load_in_4bit=True))
    layers = decoder_layers(model)
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **facts_from_config(whole)}))
    for mine, layer in zip(shape.layers, layers, strict=True):
        quantised = [n for n, m in layer.named_modules() if type(m).__name__ == "Linear4bit"]
        assert Counter(n.rpartition(".")[2] for n in quantised) == Counter(m.name for m in mine.matrices if m.linear)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_modules_that_a_method_may_name_are_those_of_the_real_model(architecture: str) -> None:
    model, whole = built(architecture, dict(TINY)[architecture])
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **facts_from_config(whole)}))
    modules = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters())}
    names = {last for name in modules if not (last := name.rpartition(".")[2]).isdigit()}
    assert modules_of(shape) == names - {"", model.base_model_prefix}
    layers = next(name for name in modules if name.endswith((".layers", ".h")))
    outside = {name.rpartition(".")[2] for name in modules if not f"{name}.".startswith(f"{layers}.")}
    assert set(modules_around(shape)) == outside - {"", model.base_model_prefix}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_adapters_are_as_large_as_pefts(architecture: str) -> None:
    from peft import LoraConfig, get_peft_model

    model, whole = built(architecture, dict(TINY)[architecture])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of patterns for mixtures, and of GPT-2's transposed weights
        adapted = get_peft_model(model, LoraConfig(r=7, target_modules="all-linear", task_type="CAUSAL_LM"))
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **facts_from_config(whole)}))
    expected = shape.over_layers(lambda one: sum(m.adapter_parameters(7) for m in one.matrices if m.adapted(None)))
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == expected


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["gate_proj", "up_proj"], ["gate", "o_proj"]])
def test_names_of_an_mlp_are_those_of_the_experts_in_a_mixture_with_shared_ones(targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    model, whole = built("glm4_moe", dict(TINY)["glm4_moe"])
    adapted = get_peft_model(model, LoraConfig(r=7, target_modules=targets, task_type="CAUSAL_LM"))
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **facts_from_config(whole)}))
    named = [m for layer in shape.layers for m in layer.matrices if m.adapted(frozenset(targets))]
    expected = sum(m.adapter_parameters(7) for m in named)
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == expected


@pytest.mark.parametrize(("architecture", "config"), TINY, ids=[f"{a}-{i}" for i, (a, _) in enumerate(TINY)])
def test_facts_and_config_are_each_others_way_back(architecture: str, config: dict[str, Any]) -> None:
    from transformers import AutoConfig

    whole = json.loads(json.dumps(AutoConfig.for_model(architecture, **config).to_dict()))
    facts = facts_from_config(whole)
    again = AutoConfig.for_model(architecture, **config_of(ModelSpec.model_validate({"id": "org/name", **facts})))
    assert facts_from_config(json.loads(json.dumps(again.to_dict()))) == facts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_left_out_of_a_config_have_the_defaults_of_its_class(architecture: str) -> None:
    from transformers import AutoConfig

    unsaid = UNSAID.get(architecture, {})
    whole = json.loads(json.dumps(AutoConfig.for_model(architecture, **unsaid).to_dict()))
    assert facts_from_config({"model_type": architecture, **unsaid}) == facts_from_config(whole)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_head_rotates_as_many_features_as_in_the_class(architecture: str) -> None:
    from transformers import AutoConfig

    config = {"model_type": architecture, **UNSAID.get(architecture, {})}
    shape = shape_of(ModelSpec.model_validate({"id": "org/name", **facts_from_config(config)}))
    rope = getattr(AutoConfig.for_model(architecture), "rope_parameters", None)  # GPT-2 has none
    share = rope.get("partial_rotary_factor", 1.0) if rope else 0.0
    width = shape.latent.rotated if shape.latent else shape.head_dim
    assert shape.rotary_dim == int(width * share)


@pytest.mark.parametrize(
    ("name", "rotated"), [("phi2", 32), ("llama3_8b", 128), ("phi3_mini", 96), ("qwen3_0_6b", 128)]
)
def test_rotary_features_of_a_head(name: str, rotated: int) -> None:
    assert shape_of(catalogued(name)).rotary_dim == rotated


def test_the_same_sizes_are_worked_out_once() -> None:
    assert shape_of(catalogued("mistral7b")) is shape_of(catalogued("mistral7b", title="another name"))


def test_missing_facts_are_all_named_with_what_to_write() -> None:
    with pytest.raises(RequestError) as caught:
        shape_of(catalogued("llama3_8b", num_layers=None, vocab_size=None))
    assert "model.num_layers, model.vocab_size missing" in str(caught.value)
    assert "write model.num_layers=… model.vocab_size=…, or model=hub model.id=FOLDER" in remedies(caught.value)


def test_a_model_without_facts_asks_for_the_architecture_first() -> None:
    with pytest.raises(RequestError) as caught:
        shape_of(ModelSpec(id="org/name"))
    assert remedies(caught.value).startswith("write model.architecture=… model.hidden_size=…")


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("llama3_8b", {"architecture": "mamba"}, "model.architecture=mamba"),
        ("mixtral_8x7b", {"num_experts": None}, "model.num_experts missing"),
        ("mixtral_8x7b", {"experts_per_token": 9}, "model.experts_per_token=9 of model.num_experts=8"),
        ("llama3_8b", {"num_experts": 8}, "model.architecture=llama has no experts"),
        ("llama3_8b", {"num_heads": 24}, "model.hidden_size=4096 is not a multiple of model.num_heads=24"),
        ("phi2", {"architecture": "gpt_neox", "num_kv_heads": 8}, "gpt_neox has no grouped key/value heads"),
        ("mistral7b", {"attention_bias": True}, "model.attention_bias: mistral leaves no choice of it"),
        ("phi2", {"architecture": "gpt2", "head_dim": 64}, "model.head_dim=64: in gpt2"),
    ],
)
def test_what_cannot_be_is_an_error_and_not_a_guess(name: str, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(RequestError) as caught:
        shape_of(catalogued(name, **changes))
    assert what in str(caught.value)
    assert all(problem.remedy for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "the config has no model_type"),
        ({"model_type": "mamba2"}, "model_type mamba2 is not known"),
        ({"model_type": "llava", "text_config": {"model_type": "opt"}}, "model_type opt is not known"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=true"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 0]}, "every 4th layer without positions"),
        ({"model_type": "llama", "attention_bias": 1.5}, "attention_bias=1.5"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
        ({"model_type": "gpt_neox", "use_parallel_residual": False}, "use_parallel_residual=false"),
        ({"model_type": "llama", "hidden_size": "4096"}, 'hidden_size="4096": expected a whole number from 1'),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"model_type": "smollm3", "num_hidden_layers": 1 << 31}, "expected a whole number from 1 to 10,000"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "must be a multiple of model.num_kv_heads=5"),
        ({"model_type": "gpt2", "n_head": 7}, "model.hidden_size=768 is not a multiple of model.num_heads=7"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(config: dict[str, Any], what: str) -> None:
    with pytest.raises(RequestError) as caught:
        facts_from_config(config, "somewhere/config.json")
    assert what in str(caught.value)
    assert all(problem.source == "somewhere/config.json" for problem in caught.value.problems)


def test_a_context_of_a_million_tokens_is_a_size() -> None:
    """Qwen2.5-7B-Instruct-1M has 1,010,000."""
    facts = facts_from_config({"model_type": "qwen2", "max_position_embeddings": 1_010_000})
    assert facts["context_length"] == 1_010_000


def test_of_a_model_with_several_parts_the_language_model_counts() -> None:
    inner = {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "vocab_size": 131072}
    config = {"model_type": "mistral3", "text_config": inner, "tie_word_embeddings": True}
    assert facts_from_config(config) == facts_from_config(inner | {"tie_word_embeddings": True})


def write_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    return folder


def test_a_folder_gives_its_facts(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "mine", num_hidden_layers=7)
    facts = local_facts(str(folder))
    assert facts is not None and facts["num_layers"] == 7
    assert shape_of(ModelSpec.model_validate({"id": str(folder), **facts})).num_parameters == facts["num_parameters"]


def test_a_folder_without_a_config_and_a_model_that_was_never_downloaded_give_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert local_facts(str(tmp_path)) is None
    assert local_facts("org/name") is None


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_the_local_cache_gives_what_main_points_to(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    repo = (tmp_path if variable == "HF_HUB_CACHE" else tmp_path / "hub") / "models--org--name"
    old = write_config(repo / "snapshots/aaa", num_hidden_layers=5)
    new = write_config(repo / "snapshots/bbb", num_hidden_layers=6)
    os.utime(old, (1, 1))
    assert new.is_dir() and (local_facts("org/name") or {})["num_layers"] == 6  # no refs/main: the newest
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("aaa")
    assert (local_facts("org/name") or {})["num_layers"] == 5
    assert (local_facts("org/name", "bbb") or {})["num_layers"] == 6
    assert local_facts("org/name", "ccc") is None


@pytest.mark.parametrize(("text", "what"), [("{", "not JSON"), ("[]", "expected a JSON object"), ("\x00", "not JSON")])
def test_a_broken_file_is_named(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError) as caught:
        local_facts(str(tmp_path))
    assert what in str(caught.value)
    assert caught.value.problems[0].source == str(tmp_path / "config.json")


def test_neither_module_loads_transformers() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'numpy'}"
    code = f"import sys, runner.hub.model_config; print({heavy} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def built(architecture: str, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The real model without memory, and its config as config.json would have it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(architecture, **config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made), json.loads(json.dumps(made.to_dict()))


def decoder_layers(model: Any) -> Any:
    import torch

    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def matrices(layer: Any) -> list[tuple[str, int, int, bool, int, bool]]:
    """Name, inputs, outputs, bias, count and linear-ness of everything in a layer that multiplies."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found = []
    for path, parameter in layer.named_parameters():
        if parameter.ndim < 2 or path.endswith("_proj_bias") or "conv1d" in path:
            continue
        owner, _, leaf = path.rpartition(".")
        module = layer.get_submodule(owner)
        linear = isinstance(module, (torch.nn.Linear, Conv1D))
        name = owner.rpartition(".")[2] if leaf == "weight" else leaf
        count = parameter.shape[0] if parameter.ndim == 3 else 1
        outputs, inputs = parameter.shape[-2:]
        if isinstance(module, Conv1D) or getattr(
            module, "is_transposed", False
        ):  # GPT-2 and gpt-oss store the transpose
            outputs, inputs = inputs, outputs
        found.append(
            (
                name,
                inputs,
                outputs,
                getattr(module, "bias", getattr(module, f"{leaf}_bias", None)) is not None,
                count,
                linear,
            )
        )
    return found


def described(layer: LayerShape) -> Counter[tuple[str, int, int, bool, int, bool]]:
    """The same of a layer's shape."""
    return Counter((m.name, m.inputs, m.outputs, m.bias, m.count, m.linear) for m in layer.matrices)
