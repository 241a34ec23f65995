"""`model/README.md` is this project's own card, of this run, for every objective and method, without a path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from runner.hub.model_card import card_text
from runner.rundir.directory import RunDir
from tests.conftest import run_cli
from tests.support.front import spec_of, write
from tests.support.processes import only_run, tiny_model, words

TRAIN = {
    "loss_first": 4.5,
    "loss_last": 0.5,
    "steps": 1234,
    "tokens": 69512,
    "trainable_parameters": 48,
    "examples": 77,
}
FINGERPRINTS = {"data_fingerprint": "ab12" * 16, "packages": {"torch": "2.13.0", "trl": "1.16", "deepspeed": None}}
MEASURED = {
    "sft": ({"loss": 4.7, "num_exact": 0, "exact_match": 0.0}, {"loss": 0.25, "num_exact": 40, "exact_match": 1.0}),
    "pretrain": ({"loss": 4.7, "perplexity": 110.0}, {"loss": 0.25, "perplexity": 1.28}),
    "dpo": ({"loss": 0.69, "reward_margin": 0.0}, {"loss": 0.3, "reward_margin": 1.5}),
    "kto": ({"loss": 0.5, "kl": 0.0}, {"loss": 0.3, "kl": 0.1}),
    "orpo": ({"loss": 4.7, "nll_loss": 4.0}, {"loss": 0.25, "nll_loss": 1.0}),
    "reward": ({"reward_accuracy": 0.5}, {"reward_accuracy": 0.75}),
    "grpo": ({}, {"reward": 0.5}),
}


def made(here: Path, objective: str, method: str, *more: str) -> tuple[str, str]:
    """The card of a run of `./my base`, with `rows.jsonl`, in a folder; and the path that must not be in it."""
    write(here / "base" / "config.json", "{}")
    write(here / "rows.jsonl", "{}\n")
    spec = spec_of(
        "model=hub", f"model.id={here}/base", f"method={method}", f"objective={objective}", "data=file",
        f"data.path={here}/rows.jsonl", "train.batch_size=8", "train.micro_batch_size=8", *more,
    )  # fmt: skip
    run = RunDir(here / "run-1")
    run.path.mkdir(exist_ok=True)
    before, after = MEASURED[objective]
    run.write("summary.json", {"train": TRAIN, "eval": {"num_prompts": 40, "before": before, "after": after}})
    run.write("environment.json", FINGERPRINTS)
    return card_text(spec, run, adapter="lora" in method), str(here)


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "qlora4", "qlora8"])
@pytest.mark.parametrize("objective", sorted(MEASURED))
def test_the_card_has_the_facts_and_no_path(here: Path, objective: str, method: str) -> None:
    text, path = made(here, objective, method)
    assert path not in text and "More Information" not in text and "/tmp" not in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert objective in metadata["tags"] and method in metadata["tags"] and "base_model" not in metadata
    assert metadata["library_name"] == ("peft" if "lora" in method else "transformers")
    assert "# run-1" in text and "`base`" in text and "`rows.jsonl`" in text
    facts = (
        "training loss, first and last step | 4.5000 | 0.5000",
        "1,234 steps",
        "| train.seed | 42 |",
        "torch 2.13.0",
    )
    for fact in (*facts, "| training rows | 77 |", "ab12ab12", f"| method | {method} |", "| train.learning_rate |"):
        assert fact in text, fact
    kind = "SequenceClassification" if objective == "reward" else "CausalLM"
    assert f"AutoModelFor{kind}.from_pretrained" in text
    assert ('PeftModel.from_pretrained(base, "path/to/this/folder")' in text) == ("lora" in method)


def test_the_card_names_a_folder_of_rows_without_its_place(here: Path) -> None:
    write(here / "rows" / "train.jsonl", "{}\n")
    text, path = made(here, "sft", "lora", "data=hub", "data.path=null", f"data.id={here}/rows")
    assert path not in text and "on `rows`." in text and "datasets" not in yaml.safe_load(text.split("---")[1])


@pytest.mark.parametrize(("objective", "task"), [("sft", "text-generation"), ("reward", "text-classification")])
def test_the_card_says_what_the_model_is_for(here: Path, objective: str, task: str) -> None:
    text, _ = made(here, objective, "full")
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == task


def test_what_was_measured_is_in_the_card(here: Path) -> None:
    assert "| held-out prompts answered exactly | 0 of 40 | 40 |" in made(here, "sft", "lora")[0]
    assert "| held-out reward margin | 0.0000 | 1.5000 |" in made(here, "dpo", "lora")[0]
    assert "| held-out reward accuracy | 0.5000 | 0.7500 |" in made(here, "reward", "full")[0]


def test_files_of_ones_own_are_called_by_their_names(here: Path) -> None:
    write(here / "mine" / "reward.py", "def score(**_): ...")
    text, path = made(here, "grpo", "lora", f"objective.rewards=[{here}/mine/reward.py:score]")
    assert path not in text and "| objective.rewards | reward.py:score |" in text


@pytest.mark.slow
def test_a_relative_model_works_from_any_folder_and_every_folder_of_weights_has_its_card(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    tiny_model(home / "tiny")
    rows = "".join(json.dumps({"prompt": f"{n}", "completion": f"{n}"}) + "\n" for n in range(40))
    write(home / "rows.jsonl", rows)
    typed = [word for word in words(home, home / "runs") if not word.startswith(("model.id", "train.max_steps"))]
    more = ("model.id=./tiny", "data=file", "data.path=rows.jsonl", "train.max_steps=2")
    done = run_cli(*typed, *more, code=0, cwd=home, OMP_NUM_THREADS="1")
    run = only_run(home / "runs")
    assert run is not None
    config = json.loads((run / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "tiny")
    for verb, folder in (
        (("chat", str(run), "--prompt", "1", "--max-new-tokens", "2"), None),
        (("merge", str(run)), "merged"),
        (("eval", str(run)), None),
        (("export", str(run)), "export-2"),
        (("resume", str(run), "train.max_steps=3"), "model"),
    ):
        done = run_cli(*verb, cwd=away, OMP_NUM_THREADS="1")
        assert done.returncode == 0, (verb, done.stderr)
        if folder:
            text = (run / folder / "README.md").read_text("utf-8")
            assert str(tmp_path) not in text and "`tiny`" in text and "`rows.jsonl`" in text, text
            assert ("steps, " in text) == (folder != "export-2") and "| train.learning_rate | 0.001 |" in text
    shutil.rmtree(tmp_path)
