"""Preferences are learned: on pairs that were held out the margin grows, with every loss and every method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.objectives import pairs
from runner.data import commands_dataset
from runner.errors import RequestError
from runner.train import model_loading
from runner.train.objectives import objective_of
from runner.train.tokens.token_cache import describe_rows
from tests.conftest import spec_of, train_here
from tests.support import preferences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tiny model and its rows, for all tests here."""
    return tmp_path_factory.mktemp("preferences")


def grown(finished: Any, name: str = "reward_margin") -> float:
    """How much a held-out measure rose."""
    return float(finished.summary["eval"]["after"][name] - finished.summary["eval"]["before"][name])


@pytest.mark.parametrize(
    "words",
    [
        ("objective=dpo", "method=freeze", "objective.loss=hinge"),
        ("objective=dpo", "method=qlora4", "objective.loss=ipo"),
        ("objective=dpo", "method=full", "objective.precompute_reference=true"),
        ("objective=dpo", "method=qlora8", "objective.label_smoothing=0.1"),
        ("objective=dpo", "method=lora", "objective.loss=simpo"),
        ("objective=dpo", "method=full", "objective.loss=cpo"),
        ("objective=kto", "method=full"),
        ("objective=orpo", "method=qlora4"),
        ("objective=reward", "method=full"),
        ("objective=reward", "method=qlora4"),
    ],
    ids=" ".join,
)
def test_the_margin_grows_on_held_out_rows(words: tuple[str, ...], folder: Path) -> None:
    finished, run = preferences.train(folder, *words)
    assert grown(finished) > 0
    if "objective=kto" not in words:  # whose answers are no pairs
        assert finished.summary["eval"]["after"]["reward_accuracy"] == 1.0
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all("reward_margin" in line for line in lines)
    assert finished.summary["eval"]["after"]["loss"] < finished.summary["eval"]["before"]["loss"]
    held = list(run.evals())
    assert held[-1]["reward_margin"] == finished.summary["eval"]["after"]["reward_margin"]
    assert (run.path / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_a_real_model_with_lora_prefers_right_commands_it_has_not_seen(tmp_path: Path) -> None:
    """SmolLM2, six steps; `python -m benchmarks objectives` takes thirty, and the other objectives."""
    train, held = commands_dataset.examples(count_eval=8)
    for name, rows in (("train", train), ("held", held)):
        preferences.write(tmp_path / f"{name}.jsonl", pairs(rows, seed=1))
    spec = spec_of(
        "objective=dpo", "model=smollm2_135m", "method=lora", "hw=cpu", "data=file", "train.max_length=128",
        f"data.path={tmp_path / 'train.jsonl'}", f"data.eval_path={tmp_path / 'held.jsonl'}", "eval.num_prompts=0",
        "data.system_prompt='Answer with the command only.'", "train.max_steps=6", "train.batch_size=4",
        "train.micro_batch_size=4", "train.learning_rate=5e-4", f"run.output_dir={tmp_path / 'runs'}",
    )  # fmt: skip
    finished, _ = train_here(spec)
    after = finished.summary["eval"]["after"]
    assert grown(finished) > 0.1 and after["reward_accuracy"] >= 0.75
    assert after["loss"] < finished.summary["eval"]["before"]["loss"]


def test_a_reward_model_is_loaded_by_plain_transformers_and_ranks_held_out_answers(folder: Path) -> None:
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    _, run = preferences.train(folder, "objective=reward", "method=lora", "train.max_steps=12")
    model = AutoPeftModelForSequenceClassification.from_pretrained(run.path / "model", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    for row in preferences.pairs(8, seed=1):
        rewards = []
        for name in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.inference_mode():
                rewards.append(model(input_ids=ids).logits.item())
        assert rewards[0] > rewards[1]


def test_a_resumed_run_takes_the_steps_that_nobody_stopped(folder: Path) -> None:
    """With a reference of its own, which must be the model as it was before the first step, not after the third."""
    words = ("objective=dpo", "method=full", "train.save_every_steps=3", "train.max_steps=6")
    _, run = preferences.train(folder, *words)
    whole = list(run.metrics())
    shutil.rmtree(run.path / "checkpoints" / "checkpoint-6")  # as if it had been killed after step 3
    train_here(spec_of(*preferences.words(folder, *words)), run)
    again = list(run.metrics())
    assert [line["time"] for line in again[:3]] == [line["time"] for line in whole[:3]]
    assert again[3]["time"] > whole[-1]["time"]  # taken once more
    keys = ("loss", "reward_margin", "grad_norm")
    assert [[line[k] for k in keys] for line in again] == [[line[k] for k in keys] for line in whole]


def test_what_is_cut_and_dropped_is_said(folder: Path, tmp_path: Path) -> None:
    long = {"prompt": "Say " + "red " * 80, "chosen": "red", "rejected": "blue"}
    file = preferences.write(tmp_path / "rows.jsonl", [*preferences.pairs(20), long])
    spec = spec_of(*preferences.words(folder, "objective=dpo", f"data.path={file}", "train.max_length=70"))
    examples = objective_of(spec).read()
    tokenizer = model_loading.load_tokenizer(spec, spec.model.id)
    train, held = objective_of(spec).tokenise_all(examples, tokenizer)
    dropped = train.num_dropped + (held.num_dropped if held else 0)
    assert dropped == 1 and train.num_truncated > 0
    assert "cut to the longest length" in describe_rows(train, len(examples.held))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("objective=dpo", "data=commands", "data.path=null"), "objective=dpo needs preferences"),
        (("objective=kto", "train.micro_batch_size=1"), "train.micro_batch_size=1: objective=kto"),
        (("objective=dpo", "method.init=pissa"), "method.init=pissa moves a part of the model into the adapter"),
        (("objective=dpo", "train.packing=true"), "train.packing=true: objective=dpo"),
        (("objective=dpo", "method.target_modules=[q_proj,lm_head]"), "an adapter on lm_head would never train"),
        (("objective=sft", "method.target_modules=[q_proj,lm_head]"), "an adapter on lm_head would never train"),
        (("objective=dpo", "objective.loss=simpo", "objective.precompute_reference=true"), "has no reference"),
        (("objective=dpo", "objective.loss=ipo", "objective.label_smoothing=0.1"), "objective.label_smoothing"),
        (("objective=kto", "objective.loss=ipo"), "objective=kto has no loss"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(words: tuple[str, ...], what: str, folder: Path) -> None:
    with pytest.raises(RequestError) as caught:
        spec_of(*preferences.words(folder, "train.micro_batch_size=2", *words))
    (problem,) = [problem for problem in caught.value.problems if what in problem.what]
    assert problem.remedy


def test_rows_of_another_kind_are_named_before_training(folder: Path) -> None:
    spec = spec_of(*preferences.words(folder, "objective=dpo", f"data.path={folder / 'judged.jsonl'}"))
    with pytest.raises(RequestError) as caught:
        objective_of(spec).read()
    assert "a chosen and a rejected answer" in str(caught.value)
    assert json.loads((folder / "judged.jsonl").read_text("utf-8").splitlines()[0])["label"] is True
