"""A key that changes nothing is refused or said."""

from __future__ import annotations

import json

import pytest

from runner.cli.options import request_of
from runner.resolve.steps import resolved
from tests.support.front import here, laptop, runner

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")


def fitted(*words: str) -> list[dict[str, object]]:
    result = runner("fit", "model=llama3_8b", *words, "--json")
    assert result.exit_code == 0, result.output
    rows: list[dict[str, object]] = json.loads(result.stdout)
    return rows


def test_fit_takes_a_key_of_an_open_group_for_every_candidate() -> None:
    same = ("hw=h100", "train.gradient_checkpointing=true", "train.micro_batch_size=1")
    rows = fitted("method.rank=512", *same)
    assert {row["method"] for row in rows} == {"lora", "qlora4", "qlora8"}  # those that have a rank
    before = {row["method"]: row["peak_gib"] for row in fitted(*same)}
    assert all(row["peak_gib"] > before[row["method"]] for row in rows)
    rows = fitted("method=lora", "hw.num_gpus=2")
    assert {row["num_gpus"] for row in rows} == {2} and len({row["hw"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    "word",
    ["model=phi2", "method=full", "hw=h100", "train.seed=3", "recipe=smollm2_quick", "data=gsm8k", "deepspeed=zero2",
     "where=runpod", "track=wandb", "run.name=x", "eval.num_prompts=3"],
)  # fmt: skip
def test_table_refuses_what_it_does_not_read(word: str) -> None:
    result = runner("table", word)
    assert result.exit_code == 2 and "changes with train.max_length alone" in " ".join(result.stderr.split())
    assert runner("table", "train.max_length=512").stdout != runner("table").stdout


DPO = "objective=dpo data.path=x.jsonl"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("track.project=x", "track.project"),
        ("track=tensorboard track.entity=x", "track.entity"),
        ("train.spike_factor=2", "train.spike_factor"),
        (f"{DPO} eval.num_prompts=3", "eval.num_prompts"),
        (f"{DPO} eval.max_new_tokens=3", "eval.max_new_tokens"),
        ("eval.num_prompts=0 eval.max_new_tokens=3", "eval.max_new_tokens"),
        ("hw.rendezvous=a:29500", "hw.rendezvous"),
        ("hw.node_address=a", "hw.node_address"),
        ("where=runpod hw=l4 where.pod=x where.country=US", "where.country"),
        ("where=runpod hw=l4 where.pod=x where.image=axolotl", "where.image"),
        ("model.revision=abc", "model.revision"),
        ("objective=pretrain data=python_docs objective.take=3", "objective.take"),
        (f"{DPO} objective.simpo_margin=2", "objective.simpo_margin"),
        (f"{DPO} objective.chosen_weight=2", "objective.chosen_weight"),
        ("objective=grpo train.batch_size=8 objective.reward_length=3", "objective.reward_length"),
    ],
)
def test_a_key_without_effect_beside_the_others_is_noted(words: str, key: str) -> None:
    _, notes = resolved(request_of(tuple(words.split()), ()))
    assert [note for note in notes if note.startswith(f"{key} has no effect: ")]


def test_nothing_is_noted_of_the_main_job_and_of_keys_that_count() -> None:
    for words in ((), ("track=wandb", "track.project=x"), ("train.on_loss_spike=skip", "train.spike_factor=2")):
        _, notes = resolved(request_of(words, ()))
        assert not [note for note in notes if "has no effect" in note]
