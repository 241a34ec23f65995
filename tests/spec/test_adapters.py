"""The table of adapter types agrees with the installed PEFT: arguments, defaults and parameter counts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from runner.plan.model_shape import shape_of
from runner.plan.trainable import saved_projections, training_of
from runner.spec import Method, ModelSpec, Peft
from runner.spec.adapters import ON_ALL_LAYERS, TYPES, UNCOUNTED, UNUSABLE, Layer, evaluate
from runner.train import adapter_config, trainable_weights
from tests.conftest import spec_of

METHOD: TypeAdapter[Method] = TypeAdapter(Method)
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 176, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "odd": {"hidden_size": 60, "intermediate_size": 122, "num_heads": 6, "num_kv_heads": 1, "head_dim": 10},
    "tied": {"hidden_size": 96, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32},
}
OTHERS = {
    "OFT": [{"r": 4, "oft_block_size": 0}, {"oft_block_size": 16, "block_share": True}, {"oft_block_size": 7}],
    "VERA": [{"r": 8}],
    "IA3": [{"feedforward_modules": ["down_proj"]}],
    "LOHA": [{"r": 3}],
    "LOKR": [
        {"r": 2}, {"r": 64}, {"r": 2, "decompose_both": True}, {"r": 2, "decompose_factor": 4}, {"decompose_factor": 7},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_arguments_and_defaults_are_pefts(name: str) -> None:
    known = {field.name: field.default for field in fields(_config(name)) if isinstance(field.default, object)}
    for argument, default in TYPES[name].arguments.items():
        assert argument in known
        if argument != "feedforward_modules":  # PEFT's default is a table by model; here it is none
            assert known[argument] == default, argument


CASES = [(name, arguments) for name in TYPES for arguments in ({}, *OTHERS[name])]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:Invalid `")
def test_the_plan_counts_what_trains(name: str, arguments: dict[str, Any], shape: str) -> None:
    model, facts = _model(shape)
    method = METHOD.validate_python({"name": "x", "peft_type": name, "arguments": arguments})
    assert isinstance(method, Peft)
    spec = spec_of("method=full").model_copy(update={"method": method})
    adapted = get_peft_model(model, adapter_config.adapter_config(spec, model))
    training = training_of(shape_of(facts), method, "bf16", deepspeed=False)
    trainable, _, _ = trainable_weights.describe_trainable(adapted)
    assert training.trainable == trainable > 0
    buffers = sum(b.numel() for n, b in adapted.named_buffers() if "vera_" in n)
    own = sum(p.numel() for n, p in adapted.named_parameters() if not p.requires_grad) + buffers
    frozen = training.shape.num_parameters * training.width + buffers * training.adapter_width
    assert own == training.shape.num_parameters + buffers and training.frozen_bytes == frozen


@pytest.mark.parametrize("words", [{"layers": "last:1"}, {"target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_chosen_layers_and_targets_count(words: dict[str, Any]) -> None:
    model, facts = _model("llama")
    method = METHOD.validate_python({"name": "x", "peft_type": "LOHA", **words})
    spec = spec_of("method=full").model_copy(update={"method": method})
    adapted = get_peft_model(model, adapter_config.adapter_config(spec, model))
    expected = training_of(shape_of(facts), method, "bf16", deepspeed=False).trainable
    assert trainable_weights.describe_trainable(adapted)[0] == expected


@pytest.mark.parametrize("saved", ["mlp", "self_attn", "k_proj", "input_layernorm", "lm_head"])
def test_modules_to_save_count_inside_the_layers_too(saved: str) -> None:
    model, facts = _model("llama")
    method = METHOD.validate_python({"name": "lora", "target_modules": ["q_proj"], "modules_to_save": [saved]})
    if saved == "self_attn":  # the adapter would be in the module that is copied
        method = method.model_copy(update={"target_modules": ["down_proj"]})
    spec = spec_of("method=full").model_copy(update={"method": method})
    adapted = get_peft_model(model, adapter_config.adapter_config(spec, model))
    expected = training_of(shape_of(facts), method, "bf16", deepspeed=False).trainable
    assert trainable_weights.describe_trainable(adapted)[0] == expected


UNEVEN = {
    "BOFT": ({"boft_block_size": 5}, "boft_block_size=5 does not divide the 64 inputs of q_proj; write", "=4"),
    "C3A": ({"block_size": 24}, "block_size=24 does not divide the 64 inputs of q_proj; write", "=16"),
    "ROAD": ({"group_size": 48}, "group_size=48 does not divide the 64 outputs of q_proj; write", "=16"),
    "GRALORA": ({"r": 30, "gralora_k": 3}, "gralora_k=3 does not divide the 64 inputs of q_proj; write", "=2"),
    "VBLORA": ({"vector_length": 48}, "vector_length=48 does not divide the 64 inputs of q_proj; write", "=16"),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_a_block_that_does_not_divide_a_layer_is_told_by_the_facts(name: str) -> None:
    arguments, said, instead = UNEVEN[name]
    model, facts = _model("llama")
    layers = [Layer(m.name, m.inputs, m.outputs) for m in shape_of(facts).matrices if m.linear]

    def made(values: dict[str, Any]) -> Peft:
        content = {"name": "x", "peft_type": name, "arguments": values, "trainable": "inputs"}
        found = METHOD.validate_python(content)
        assert isinstance(found, Peft)
        return found

    told = made(arguments).adapter.uneven(layers)
    assert told is not None and said in told and told.endswith(instead)
    spec = spec_of("method=full").model_copy(update={"method": made(arguments)})
    with pytest.raises(ValueError, match=r"(?i)divi|factor of"):  # PEFT's own, after the model is loaded
        get_peft_model(model, adapter_config.adapter_config(spec, model))
    good = made({**arguments, list(arguments)[-1]: int(instead.removeprefix("="))})
    assert good.adapter.uneven(layers) is None
    spec = spec.model_copy(update={"method": good})
    get_peft_model(_model("llama")[0], adapter_config.adapter_config(spec, model))


@pytest.mark.parametrize("saves", [True, False])
def test_veras_projections_are_in_its_file(saves: bool, tmp_path: Path) -> None:
    model, facts = _model("llama")
    arguments = {"r": 64, "save_projection": saves}
    method = METHOD.validate_python({"name": "x", "peft_type": "VERA", "arguments": arguments})
    spec = spec_of("method=full").model_copy(update={"method": method})
    get_peft_model(model, adapter_config.adapter_config(spec, model)).save_pretrained(tmp_path)
    training = training_of(shape_of(facts), method, "bf16", deepspeed=False)
    planned = 4 * (training.trainable + saved_projections(training))
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert planned <= size < planned + 10_000  # the names of the tensors


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "HRA"}, """such as method.trainable='"r * (inputs + outputs)"'"""),
        ({"peft_type": "HRA", "trainable": "r * inputs"}, "r is no number of method.arguments"),
        ({"peft_type": "HRA", "trainable": "inputs ** 9"}, "a formula has numbers, + - * //, min and max"),
        ({"peft_type": "HRA", "trainable": "__import__('os')"}, "a formula has numbers"),
        ({"peft_type": "HRA", "trainable": "inputs // 0"}, "divides by 0"),
        ({"peft_type": "OFT", "trainable": "inputs"}, "counted without it; leave it out"),
        ({"peft_type": "LORA"}, "write method=lora"),
        ({"peft_type": "PROMPT_TUNING"}, "learns a prompt"),
        ({"peft_type": "OFT", "arguments": {"r": 4}}, "write method.arguments.oft_block_size=0 beside r"),
        ({"peft_type": "OFT", "arguments": {"r": 0, "oft_block_size": 0}}, "write method.arguments.oft_block_size=32"),
        ({"peft_type": "OFT", "arguments": {"oft_block_size": 1}}, "write method.arguments.oft_block_size=2, or more"),
        (
            {"peft_type": "OFT", "arguments": {"oft_block_size": -4}},
            "size=32, PEFT's default",
        ),
        ({"peft_type": "OFT", "arguments": {"module_dropout": 2}}, "expected at least 0 and less than 1"),
        ({"peft_type": "OFT", "arguments": {"eps": float("nan")}}, "expected a finite number"),
        ({"peft_type": "OFT", "arguments": {"num_cayley_neumann_terms": 1}}, "expected at least 2"),
        ({"peft_type": "LOHA", "arguments": {"r": 0}}, "write method.arguments.r=1, or more"),
        ({"peft_type": "VERA", "arguments": {"r": -1}}, "write method.arguments.r=1, or more"),
        ({"peft_type": "LOKR", "arguments": {"r": -2}}, "write method.arguments.r=1, or more"),
        (
            {"peft_type": "LOKR", "arguments": {"rank_pattern": {"q_proj": 3}}},
            "or a list of names; leave rank_pattern out",
        ),
        ({"peft_type": "OFT", "arguments": {"rank": 4}}, "OFT has r, oft_block_size"),
        ({"peft_type": "FOURIERTF", "trainable": "inputs"}, "did you mean FOURIERFT?"),
        ({"peft_type": "oft"}, "did you mean OFT?"),
        ({"peft_type": "POLY", "trainable": "inputs"}, "needs the number of a task with each row; write method=lora"),
        ({"peft_type": "HRA", "trainable": "inputs", "arguments": {"apply_gs": True}}, "method.arguments.apply_GS?"),
        ({"peft_type": "HRA", "trainable": "inputs", "arguments": {"r": "eight"}}, "write one like 8"),
        ({"peft_type": "HRA", "trainable": "inputs", "arguments": {"r": -8}}, "write method.arguments.r=1, or more"),
        ({"peft_type": "OFT", "arguments": {"coft": 1}}, "write one like False"),
        ({"peft_type": "LOHA", "arguments": {"target_modules": ["q_proj"]}}, "write method.target_modules"),
        ({"peft_type": "IA3", "layers": "last:1"}, "PEFT puts IA3 on all layers"),
        (
            {"peft_type": "IA3", "target_modules": ["k_proj"], "arguments": {"feedforward_modules": ["down_proj"]}},
            "write method.arguments.feedforward_modules=[]",
        ),
        (
            {
                "peft_type": "IA3",
                "target_modules": ["k_proj", "fc2"],
                "arguments": {"feedforward_modules": ["down_proj"]},
            },
            "write method.arguments.feedforward_modules=[fc2]",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        METHOD.validate_python({"name": "x"} | values)
    assert said in str(caught.value)


def test_every_type_of_peft_is_known() -> None:
    installed = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    placed = {name for name in (*TYPES, *UNCOUNTED) if "layers_to_transform" in {f.name for f in fields(_config(name))}}
    assert {*TYPES, *UNCOUNTED} - placed == set(ON_ALL_LAYERS)
    assert {*TYPES, *UNCOUNTED, *UNUSABLE} == installed and len(TYPES) + len(UNCOUNTED) + len(UNUSABLE) == len(
        installed
    )


@pytest.mark.parametrize("name", UNCOUNTED)
def test_uncounted_types_have_pefts_arguments(name: str) -> None:
    theirs = {field.name: field.default for field in fields(_config(name))}
    assert "target_modules" in theirs
    assert {key: theirs[key] for key in UNCOUNTED[name]} == UNCOUNTED[name]


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_peft_type_under_the_name_of_another_method_is_refused(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        METHOD.validate_python({"name": name, "peft_type": "OFT"})
    assert caught.value.errors()[0]["loc"] == (name, "peft_type")


def test_a_formula_is_arithmetic() -> None:
    assert evaluate("2 * r * (inputs + outputs) - min(r, 3)", {"r": 4, "inputs": 10, "outputs": 6}) == 125


def _config(name: str) -> Any:
    return next(config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == name)


def _model(shape: str) -> tuple[Any, ModelSpec]:
    sizes = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama", vocab_size=50, num_hidden_layers=2, hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"], num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"], head_dim=sizes["head_dim"], tie_word_embeddings=shape == "tied",
    )  # fmt: skip
    facts = {"id": "x/y", "name": "x", "architecture": "llama", "num_layers": 2, "vocab_size": 50}
    spec = ModelSpec.model_validate({**facts, **sizes, "context_length": 64, "tie_embeddings": shape == "tied"})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), spec
