"""`plan` of a model that no arithmetic knows: simulated in a process of its own, kept, or refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from runner.resolve import simulator
from tests.support.front import runner

UNKNOWN = {
    "model_type": "starcoder2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 2048,
    "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 1, "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    simulator.simulated_shape.cache_clear()
    simulator._process.cache_clear()
    return tmp_path


def written(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return f"model.id={folder}"


def plan(*words: str) -> Result:
    return runner("plan", "model=hub", "hw=rtx4090", *words)


def test_it_is_simulated_once_and_said_to_be(here: Path) -> None:
    words = (
        written(here / "odd", UNKNOWN),
        "method=lora",
        "train.gradient_checkpointing=true",
        "train.micro_batch_size=2",
    )
    first = json.loads(plan(*words, "--json").stdout)
    assert first["fits"] and first["trainable_parameters"] > 0 and first["step_seconds"] > 0
    seen = first["simulated"]
    assert seen["model_type"] == "starcoder2" and seen["steps"] > 0 and seen["seconds"] > 0 and not seen["cached"]
    assert "memory and operations of starcoder2 are simulated, not calculated" in first["notes"][0]
    simulator.simulated_shape.cache_clear()
    simulator._process.cache_clear()
    second = json.loads(plan(*words, "--json").stdout)
    assert second["simulated"]["cached"] and second["phases"] == first["phases"]
    assert "simulated, not calculated" in plan(*words).stdout.replace("\n", " ")


def test_several_gpus_share_what_was_simulated(here: Path) -> None:
    words = "hw=h100x3", "method=full", "train.gradient_checkpointing=true", "train.micro_batch_size=1"
    words = written(here / "odd", UNKNOWN), *words, "train.batch_size=3"
    alone, shared = (json.loads(plan(*words, f"deepspeed={stage}", "--json").stdout) for stage in ("none", "zero3"))
    assert shared["zero_stage"] == "zero3" and shared["simulated"]["steps"] > 0
    assert shared["phases"]["step"]["optimizer"] <= alone["phases"]["step"]["optimizer"]


def test_a_type_that_transformers_does_not_know_is_refused(here: Path) -> None:
    result = plan(written(here / "odd", {**UNKNOWN, "model_type": "nobodys"}))
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert (
        "model_type nobodys is not known, and cannot be simulated" in said and "plan a model of about its sizes" in said
    )


def test_a_config_that_builds_no_model_is_refused_once_and_for_all(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = written(here / "odd", {**UNKNOWN, "hidden_act": "nothing"})
    first = plan(model)
    assert first.exit_code == 2
    said = " ".join(first.output.split())
    assert "model_type starcoder2 is not known, and cannot be simulated" in said
    assert said.count("cannot be simulated") == 1
    simulator.simulated_shape.cache_clear()
    simulator._process.cache_clear()
    monkeypatch.setattr(simulator.Process, "_start", lambda process: pytest.fail("started again"))
    assert first.output.endswith(plan(model).output)  # but for the lines about its progress


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "bert is an encoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder model"),
    ],
)
def test_a_model_that_predicts_no_next_tokens_is_refused_without_torch(
    here: Path, config: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "_version", lambda name: None)
    result = plan(written(here / "other", {"hidden_size": 64, **config}))
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and what in said and "this runner trains decoder-only causal LMs" in said
    assert "simulate" not in said


def test_what_transformers_knows_of_a_model_is_asked_where_its_config_says_nothing(here: Path) -> None:
    for kind, what in (("bert", "an encoder"), ("t5", "an encoder-decoder model"), ("vit", "no causal LM")):
        result = plan(written(here / kind, {"model_type": kind}))
        said = " ".join(result.output.split())
        assert result.exit_code == 2 and f"{kind} is {what}" in said and "cannot be simulated" not in said


def test_sizes_that_cannot_be_are_named(here: Path) -> None:
    result = plan(written(here / "odd", {**UNKNOWN, "num_hidden_layers": 0, "num_attention_heads": "many"}))
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "simulate" not in said
    assert "num_hidden_layers=0: expected a whole number from 1" in said
    assert 'num_attention_heads="many": expected a whole number from 1' in said


def test_without_torch_it_is_said_what_to_install(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "_version", lambda name: None if name == "torch" else "1")
    result = plan(written(here / "odd", UNKNOWN))
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "torch to simulate it is not here" in said and "pip install torch: then" in said


def test_a_kept_answer_that_is_damaged_is_made_again(here: Path) -> None:
    model = written(here / "odd", UNKNOWN)
    said = json.loads(plan(model, "--json").stdout)
    for number, file in enumerate(sorted((here / "cache" / "simulations").iterdir())):
        damaged = ["{}", "[]", "null", '{"seconds": 1}', file.read_text("utf-8").replace("1", "2")]
        file.write_text(damaged[number % len(damaged)], "utf-8")
    simulator.simulated_shape.cache_clear()
    simulator._process.cache_clear()
    again = json.loads(plan(model, "--json").stdout)
    assert again["phases"] == said["phases"] and not again["simulated"]["cached"]


def test_a_torch_that_cannot_be_imported_is_said(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "broken").mkdir()
    (here / "broken" / "torch.py").write_text("raise ImportError('libcudart.so is missing')")
    monkeypatch.setenv("PYTHONPATH", str(here / "broken"))
    result = plan(written(here / "odd", UNKNOWN))
    assert result.exit_code == 2 and "libcudart.so is missing" in " ".join(result.output.split())


def test_a_simulation_is_told_while_it_runs_and_has_a_limit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "SAID_AFTER_S", 0.1)
    monkeypatch.setattr(simulator, "LIMIT_S", 0.6)  # the import of torch takes longer
    model = written(here / "odd", UNKNOWN)
    result = plan(model)
    assert result.exit_code == 2 and "Simulating starcoder2 for the plan … " in result.stderr
    assert "it takes longer than" in " ".join(result.stderr.split())
    assert not list((here / "cache").glob("simulations/*"))  # another time it may not
