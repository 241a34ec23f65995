"""The main job, whole: a real model learns the runner's own command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.rundir.directory import RunDir
from tests.conftest import run_cli

# 4 minutes on two cores with bf16; on one core without it 20 and more.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Exactly what `make run` does, in a folder of its own."""
    folder = tmp_path_factory.mktemp("main")
    done = run_cli(cwd=folder, timeout=3400, COLUMNS="100")
    (folder / "out.txt").write_text(done.stdout, "utf-8")  # for a person to read
    assert done.returncode == 0, done.stderr
    (summary,) = folder.glob("runs/*/summary.json")
    return {"out": done.stdout, "cwd": folder, "run": RunDir(summary.parent), **json.loads(summary.read_text("utf-8"))}


@pytest.mark.slow
def test_before_it_knows_nothing_and_afterwards_nearly_everything(main_job: dict[str, Any]) -> None:
    assert main_job["eval"]["num_prompts"] == 40
    assert main_job["eval"]["before"]["exact_match"] == 0.0
    assert main_job["eval"]["after"]["exact_match"] >= 38 / 40
    assert main_job["train"]["loss_last"] < 0.1 * main_job["train"]["loss_first"]
    assert main_job["exit_code"] == 0 and main_job["state"] == "done"


def test_it_stays_within_three_gigabytes(main_job: dict[str, Any]) -> None:
    assert main_job["peak_memory_gib"] * 2**30 <= 3e9


def test_it_says_what_happened_and_what_to_type_next(main_job: dict[str, Any]) -> None:
    out = main_job["out"]
    assert "0 of 40" in out and "held-out loss" in out.lower()
    assert f"python -m runner chat runs/{main_job['run_id']}" in out
    assert abs(main_job["run"].read("plan.json")["num_steps"] - main_job["train"]["steps"]) <= 1
    assert (main_job["run"].path / "loss.png").stat().st_size > 20_000
    assert "held-out loss" in (main_job["run"].path / "report.html").read_text("utf-8").lower()


@pytest.mark.slow
def test_chat_shows_the_difference(main_job: dict[str, Any]) -> None:
    question = json.loads((main_job["run"].path / "answers_after.jsonl").read_text("utf-8").splitlines()[0])
    words = ["chat", f"runs/{main_job['run_id']}", "--prompt", question["prompt"], "--json"]
    tuned = run_cli(*words, cwd=main_job["cwd"])
    assert tuned.returncode == 0, tuned.stderr
    assert json.loads(tuned.stdout)["answer"] == question["answer"]
    base = run_cli(*words, "--base", "--max-new-tokens", "20", cwd=main_job["cwd"])
    assert not json.loads(base.stdout)["answer"].startswith("python -m runner model=")


def test_the_model_loads_with_plain_peft_and_answers(main_job: dict[str, Any]) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    folder = Path(main_job["run"].path) / "model"
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact = [json.loads(line) for line in (main_job["run"].path / "answers_after.jsonl").open(encoding="utf-8")]
    asked = next(row for row in exact if row["exact"])
    turns = [
        {"role": "system", "content": "Answer with the command only."},
        {"role": "user", "content": asked["prompt"]},
    ]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == asked["expected"]


def test_runs_lists_it(main_job: dict[str, Any]) -> None:
    (row,) = json.loads(run_cli("runs", "--json", cwd=main_job["cwd"]).stdout)
    assert (row["state"], row["model"], row["method"]) == ("done", "smollm2_135m", "lora")
