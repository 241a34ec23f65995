"""Whatever people type, the nearest right spelling is found."""

from __future__ import annotations

import pytest

from runner.config import conf_files
from runner.config.did_you_mean import nearest, nearest_choice, nearest_key
from runner.config.other_trainers_keys import PEERS
from runner.config.schema_keys import allowed_words, choices_with, known_keys
from runner.spec import RunSpec


@pytest.mark.parametrize(("theirs", "ours"), PEERS.items())
def test_names_of_other_trainers_lead_to_ours(theirs: str, ours: str) -> None:
    assert ours in known_keys()  # which holds groups, too
    assert theirs not in known_keys()
    assert nearest_key(theirs) == ours
    assert nearest_key(f"train.{theirs}") == ours


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("trian.x", "train"),
        ("learning_rate", "train.learning_rate"),
        ("model.learning_rate", "train.learning_rate"),
        ("batch_size", "train.batch_size"),  # not eval's
        ("evl.batch_size", "eval.batch_size"),
        ("name", "run.name"),
        ("layers", "method.layers"),
        ("model.nme", "model.name"),
        ("metod", "method"),
        ("hw.gpus", "hw.num_gpus"),
        ("Train.Max_Steps", "train.max_steps"),
        ("train.lrr", "train.learning_rate"),  # as `lr`, a name of other trainers
        ("lr_schedulr", "train.schedule"),
        ("quite.another.thing", None),
        ("zzz", None),
    ],
)
def test_the_nearest_key(typed: str, meant: str | None) -> None:
    assert nearest_key(typed) == meant


@pytest.mark.parametrize(
    ("group", "typed", "meant"),
    [
        ("model", "mistral", "mistral7b"),
        ("model", "Mistral-7B", "mistral7b"),
        ("model", "llama3-8b", "llama3_8b"),
        ("model", "Phi 2", "phi2"),
        ("hw", "H100", "h100"),
        ("hw", "3x H100", "h100x3"),
        ("hw", "4090", "rtx4090"),
        ("method", "qlora", "qlora4"),
        ("deepspeed", "zero-3", "zero3"),
        ("data", "ultrachat", "ultrachat_200k"),
    ],
)
def test_the_nearest_choice(group: str, typed: str, meant: str | None) -> None:
    assert nearest_choice(group, typed, conf_files.options(group)) == meant


@pytest.mark.parametrize("group", ["model", "hw"])
def test_a_choice_is_nearest_to_itself(group: str) -> None:
    for name in conf_files.options(group):
        assert nearest_choice(group, name, conf_files.options(group)) == name


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert nearest("xyz", ["abc", "def"]) is None
    assert nearest("xyz", []) is None


def test_every_key_of_every_variant_is_known() -> None:
    assert {"method", "method.rank", "method.layers", "objective.loss_on", "hw.env", "train.seed"} <= set(known_keys())
    assert set(RunSpec.model_fields) <= set(known_keys())


def test_whose_key_it_is() -> None:
    assert choices_with("method.rank") == ["lora", "qlora4", "qlora8"]
    assert choices_with("method.extra_modules") == ["freeze"]
    assert choices_with("method.name") == choices_with("train.seed") == choices_with("no.such") == []


def test_what_may_be_written_after_a_key() -> None:
    assert allowed_words("train.schedule") == ["cosine", "linear", "constant", "wsd"]
    assert allowed_words("train.gradient_checkpointing") == ["true", "false", "auto"]
    assert allowed_words("train.seed") == allowed_words("nope") == []
