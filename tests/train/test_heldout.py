"""A held-out loss is one number per model and data; a step's loss is one however it is split into micro batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import run_cli, spec_of, train_here
from tests.support import preferences, tiny_llama
from tests.support.processes import tiny_model

ASKED = ("train.max_steps=1", "eval.num_prompts=0", "train.precision=fp32", "hw=cpu", "hw.num_cpus=1")
PREFERENCES = {
    "dpo": (), "dpo objective.loss=ipo": (), "dpo objective.loss=cpo": (), "dpo objective.loss=simpo": (), "orpo": (),
    "dpo objective.precompute_reference=true": (), "kto": (), "kto objective.precompute_reference=true": (),
    "reward": ("objective.center=0.1",),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


def uneven(folder: Path, pretrain: bool = False) -> list[str]:
    """Rows of very different lengths; 7 are held out, which no batch of 2 or 4 divides."""
    lines = []
    for i in range(21):
        words = [f"w{4 + (i * 5 + k) % 50}" for k in range(1 + (i * i) % 23)]
        said = " ".join(words)
        lines.append({"text": said} if pretrain else {"prompt": words[0], "completion": said})
    for name, some in (("train", lines[:14]), ("held", lines[14:])):
        preferences.write(folder / f"{name}.jsonl", some)
    return [
        "model=hub", f"model.id={tiny_llama.base(folder / 'base')}", "data=file", f"data.path={folder / 'train.jsonl'}",
        f"data.eval_path={folder / 'held.jsonl'}", "train.max_length=32", f"run.output_dir={folder / 'runs'}",
        "method=full", *ASKED,
    ]  # fmt: skip


def losses(*words: str) -> tuple[float, float]:
    """Held-out before, and the first step's."""
    finished, run = train_here(spec_of(*words))
    return finished.summary["eval"]["before"], next(iter(run.metrics()))["loss"]


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_the_loss_is_the_mean_over_the_tokens(objective: str, tmp_path: Path) -> None:
    words = [*uneven(tmp_path, objective == "pretrain"), f"objective={objective}"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    total, count = 0.0, 0
    for line in (tmp_path / "held.jsonl").read_text().splitlines():
        row = json.loads(line)
        if objective == "pretrain":
            ids, begin = [*tokenizer(row["text"])["input_ids"], 1], 1
        else:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            ids = tokenizer.apply_chat_template(turns)["input_ids"]
            begin = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"])
        logits = model(torch.tensor([ids])).logits[0]
        total += float(functional.cross_entropy(logits[begin - 1 : -1], torch.tensor(ids[begin:]), reduction="sum"))
        count += len(ids) - begin
    for more in (
        ("packing=false", 4, 1),
        ("packing=false", 4, 2),
        ("packing=false", 4, 4),
        ("packing=true", 2, 1),
        ("packing=true", 2, 2),
    ):
        found = losses(*words, f"train.{more[0]}", f"train.batch_size={more[1]}", f"train.micro_batch_size={more[2]}")[
            0
        ]
        assert found["loss"] == pytest.approx(total / count, rel=2e-6), more


def marked(base: Path, folder: Path, objective: str) -> list[str]:
    """Seven held-out preferences, and eight to learn."""
    lines = list((preferences.judged if objective.startswith("kto") else preferences.pairs)(13))
    preferences.write(folder / "train.jsonl", lines[:8])
    preferences.write(folder / "held.jsonl", lines[6:13])
    return [
        "model=hub", f"model.id={base}", "data=file", f"data.path={folder / 'train.jsonl'}", "method=full",
        f"data.eval_path={folder / 'held.jsonl'}", "train.max_length=96", "train.packing=false", "train.batch_size=4",
        f"run.output_dir={folder / 'runs'}", *ASKED, *f"objective={objective}".split(), *PREFERENCES[objective],
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("objective", PREFERENCES)
def test_preferences_are_measured_alike_whatever_the_batch(objective: str, base: Path, tmp_path: Path) -> None:
    words = marked(base, tmp_path, objective)
    once, first = losses(*words, "train.micro_batch_size=4")
    twice, second = losses(*words, "train.micro_batch_size=2")
    assert once == pytest.approx(twice, rel=1e-5, abs=1e-6)
    if not objective.startswith("kto"):  # whose divergence is one of a micro batch
        assert first == pytest.approx(second, rel=1e-5)


def test_a_step_that_is_not_full_has_one_loss_however_it_is_split(base: Path, tmp_path: Path) -> None:
    """Three rows in micro batches of two: one of two rows, one of one."""
    words = [*marked(base, tmp_path, "orpo"), "data.max_examples=3", "train.max_steps=1"]
    found = [losses(*words, f"train.micro_batch_size={size}")[1] for size in (4, 2, 1)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_rows_that_fill_up_the_last_batch_of_two_processes_do_not_count(
    objective: str, base: Path, tmp_path: Path
) -> None:
    words = uneven(tmp_path) if objective == "sft" else marked(base, tmp_path, objective)
    words = [*words, "train.packing=false", "train.batch_size=4", "train.micro_batch_size=2"]
    alone = losses(*words)[0]
    done = run_cli(*words, "hw.num_processes=2", "hw.num_cpus=2", f"run.output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("two/*/before.json")
    assert json.loads(file.read_text()) == pytest.approx(alone, rel=1e-5, abs=1e-6)
