"""PEFT's other adapters train, resume, export, merge and answer like LoRA's; what cannot work is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from runner.cloud.runpod.serverless import DeployOptions, _source
from runner.errors import RequestError
from runner.report.progress import Progress
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import chat, open_model
from runner.train.export import export
from runner.train.merge import adapter as merging
from runner.train.merge import proof
from tests.conftest import train_here
from tests.support import tiny_llama
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures

PROMPTS = [[5, 9, 13, 2, 6], [7, 8]]
METHODS = {
    "oft": ["method.arguments.oft_block_size=16"],
    "vera": ["method.arguments.r=16", "train.learning_rate=1e-1"],
    "ia3": ["train.learning_rate=1e-1"],
    "loha": ["train.learning_rate=1e-1"],
    "lokr": ["method.modules_to_save=[norm]"],
}


def spec_of(run: RunDir) -> RunSpec:
    return RunSpec.model_validate(run.read("spec.json"))


def exact(model: Any) -> list[torch.Tensor]:
    with proof.computing_in_fp32(model):
        return proof.logits(model, PROMPTS)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_lives_as_long_as_loras(method: str, train: Callable[..., Any], tmp_path: Path) -> None:
    words = [*tiny_llama.words(tmp_path), "train.attention=sdpa", "train.save_every_steps=3", *METHODS[method]]
    finished, run = train(*words, f"method={method}", "eval.num_prompts=2")
    summary = json.loads((run.path / "summary.json").read_text("utf-8"))
    assert summary["eval"]["after"]["loss"] < summary["eval"]["before"]["loss"]
    assert summary["train"]["trainable_parameters"] == sum(
        p.numel() for p in finished.model.parameters() if p.requires_grad
    )
    spec, base = spec_of(run), tmp_path / "base"

    again = RunDir.create(spec)  # the same run, from its third step
    (again.path / "checkpoints").mkdir(exist_ok=True)
    checkpoints.folder(run, 3).rename(checkpoints.folder(again, 3))
    resumed, _ = train_here(spec, again)
    before, after = finished.model.state_dict(), resumed.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    expected = exact(finished.model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run.path / "model"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(exact(loaded), expected, strict=True))

    export(spec, run, 5, tmp_path / "exported", lambda line: None)
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "exported"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(exact(exported), expected, strict=True))

    facts = merging.merge(spec, run, tmp_path / "merged", lambda line: None)
    assert facts["typical_difference"] <= facts["typical_bound"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    untouched = AutoModelForCausalLM.from_pretrained(base)
    moved = proof.agreement(expected, exact(untouched)).typical_difference
    assert proof.agreement(expected, exact(merged)).typical_difference < moved / 4

    opened = open_model.local_spec(spec)
    model, tokenizer = open_model.load_finished(opened, run)
    assert isinstance(chat.answer(opened, model, tokenizer, [{"role": "user", "content": "w5 w9"}], 3), str)


def test_lora_plus_has_two_learning_rates(train: Callable[..., Any], tmp_path: Path) -> None:
    words = [*tiny_llama.words(tmp_path), "eval.num_prompts=0", "train.learning_rate=1e-3"]
    plus, run = train(*words, "method=loraplus", "train.save_every_steps=5")
    groups = torch.load(checkpoints.folder(run, 5) / "optimizer.pt", weights_only=True)["param_groups"]
    assert len(groups) == 2 and groups[1]["initial_lr"] == pytest.approx(16 * groups[0]["initial_lr"])
    assert len(groups[0]["params"]) == len(groups[1]["params"])
    plain, _ = train(*words, "method=lora")

    def moved(model: Any, part: str) -> float:
        return float(sum(p.float().abs().sum() for name, p in model.named_parameters() if f".{part}." in name))

    assert moved(plus.model, "lora_B") > 5 * moved(plain.model, "lora_B")  # B starts at 0
    assert moved(plus.model, "lora_A") == pytest.approx(moved(plain.model, "lora_A"), rel=0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.peft_type=NOPE", "method.trainable=inputs"], "PEFT has no such type for linear layers"),
        (
            ["method.peft_type=HRA", "method.trainable=inputs", "method.arguments.rank=3"],
            "HRA has r, apply_GS",
        ),
        (
            ["method.peft_type=BOFT", "method.trainable=inputs", "method.arguments.boft_block_size=7"],
            "boft_block_size=7 does not divide the 64 inputs of q_proj",
        ),
    ],
)
def test_what_peft_does_not_have_is_said(
    words: list[str], said: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        train(*tiny_llama.words(tmp_path), "method=oft", "~method.arguments", "method.trainable=inputs", *words)
    assert said in str(caught.value)


@pytest.mark.parametrize(("formula", "wrong"), [("4 * inputs", False), ("inputs", True)])
def test_a_wrong_formula_is_said_in_the_run(
    formula: str, wrong: bool, train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: said.append(text))
    words = ["method=oft", "method.peft_type=HRA", "~method.arguments", "method.arguments.r=4"]
    given = [*words, f'method.trainable="{formula}"', "train.max_steps=1", "eval.num_prompts=0"]
    finished, _ = train(*tiny_llama.words(tmp_path), *given)
    real = sum(p.numel() for p in finished.model.parameters() if p.requires_grad)
    line = f"the plan counted {real // 4:,} parameters of the adapter, and it has {real:,}"
    assert any(f"method.trainable={formula} is wrong: {line}" in text for text in said) is wrong


def test_a_worker_for_chats_serves_adapters_of_lora_alone(train: Callable[..., Any], tmp_path: Path) -> None:
    _, run = train(*tiny_llama.words(tmp_path), "method=ia3", "train.max_steps=1", "eval.num_prompts=0")
    with pytest.raises(RequestError) as caught:
        _source(run, spec_of(run), DeployOptions())
    assert "deploy --merged" in str(caught.value.problems[0].remedy)


@pytest.mark.usefixtures("here")
def test_zero3_is_refused_and_auto_takes_another_stage() -> None:
    words = ["plan", "model=llama3_8b", "method=loha", "hw=h100", "hw.num_gpus=2"]
    refused = runner(*words, "deepspeed=zero3")
    assert refused.exit_code == 2 and "write deepspeed=zero2, or method=lora" in " ".join(refused.stderr.split())
    assert runner(*words).exit_code == 0
