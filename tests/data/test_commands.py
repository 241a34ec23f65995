"""The bundled data set keeps its promises: learnable, unambiguous, the same everywhere."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from runner.config import conf_files
from runner.data import commands_dataset
from runner.data.commands_dataset import Row, examples, key_of
from runner.paths import ASSETS

Rows = tuple[list[Row], list[Row]]
SENTENCES = 640
HW_SENTENCES = 448  # those that name hardware


@pytest.fixture(scope="module")
def rows() -> Rows:
    return examples()


def parsed(row: Row) -> dict[str, str]:
    words = row["completion"].split(" ")
    assert words[:3] == ["python", "-m", "runner"]
    return dict(word.split("=") for word in words[3:])


def names_in(sentence: str, spoken: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The names a sentence uses, the longest where one holds another (`Phi-3` in `Phi-3 Mini`)."""
    text = f" {sentence.casefold()} ".replace(",", " ,").replace(":", " :").replace("?", " ?").replace(". ", " . ")
    found = {(choice, name) for choice, name in spoken if f" {name.casefold()} " in text}
    return {pair for pair in found if not any(pair[1] != o[1] and pair[1] in o[1] for o in found)}


def test_the_sizes_are_as_asked(rows: Rows) -> None:
    assert [len(part) for part in rows] == [600, 40]
    assert [len(part) for part in examples(100, 8)] == [100, 8]


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_every_process_gets_the_same_rows(rows: Rows, hash_seed: str) -> None:
    code = (
        "import json, hashlib; from runner.data.commands_dataset import examples;"
        "print(hashlib.sha256(json.dumps(examples()).encode()).hexdigest())"
    )
    here = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    there = subprocess.run([sys.executable, "-c", code], env=env, cwd=ASSETS, capture_output=True, text=True)
    assert there.stdout.strip() == here, there.stderr


def test_the_order_in_which_a_folder_lists_its_files_does_not_matter(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: sorted(glob(self, pattern), reverse=True))
    assert examples() == rows


def test_training_and_held_out_share_no_sentence_and_no_combination(rows: Rows) -> None:
    train, held = rows
    assert not {key_of(row["prompt"]) for row in train} & {key_of(row["prompt"]) for row in held}
    shared = {row["completion"] for row in train} & {row["completion"] for row in held}
    assert len(shared) <= len(held) // 10


def test_no_sentence_stands_for_two_commands(rows: Rows) -> None:
    command_of: dict[str, str] = {}
    for row in [*rows[0], *rows[1]]:
        assert command_of.setdefault(key_of(row["prompt"]), row["completion"]) == row["completion"]


@pytest.mark.parametrize("group", ["model", "hw"])
def test_a_name_belongs_to_one_choice(group: str) -> None:
    spoken = (
        commands_dataset.spoken_models(SENTENCES)
        if group == "model"
        else commands_dataset.spoken_hardware(HW_SENTENCES)
    )
    assert max(Counter(key_of(name) for _, name in spoken).values()) == 1


def test_every_command_names_choices_that_exist(rows: Rows) -> None:
    for row in [*rows[0], *rows[1]]:
        choices = parsed(row)
        assert list(choices) in (["model", "method"], ["model", "method", "hw"])
        for group, name in choices.items():
            assert name in conf_files.options(group), row


def test_a_command_needs_nothing_beside_it(rows: Rows) -> None:
    for row in [*rows[0], *rows[1]]:
        assert "id" in conf_files.load_choice("model", parsed(row)["model"])
        assert parsed(row).get("hw") != "local"


def test_the_sentence_says_what_the_command_does(rows: Rows) -> None:
    models, hardware = commands_dataset.spoken_models(SENTENCES), commands_dataset.spoken_hardware(HW_SENTENCES)
    for row in [*rows[0], *rows[1]]:
        choices = parsed(row)
        assert {choice for choice, _ in names_in(row["prompt"], models)} == {choices["model"]}, row
        said = names_in(row["prompt"], hardware)
        assert {choice for choice, _ in said} == {choices["hw"]} if "hw" in choices else not said, row


def test_held_out_uses_only_names_that_training_teaches(rows: Rows) -> None:
    train, held = rows
    for spoken in (commands_dataset.spoken_models(SENTENCES), commands_dataset.spoken_hardware(HW_SENTENCES)):
        taught = set().union(*(names_in(row["prompt"], spoken) for row in train))
        assert set().union(*(names_in(row["prompt"], spoken) for row in held)) <= taught
    phrases = {(m, p) for m, said in commands_dataset.METHODS.items() for phrases_of in said for p in phrases_of}
    taught = set().union(*(names_in(row["prompt"], sorted(phrases)) for row in train))
    assert set().union(*(names_in(row["prompt"], sorted(phrases)) for row in held)) <= taught


def test_every_name_is_taught_often_enough(rows: Rows) -> None:
    for spoken in (commands_dataset.spoken_models(SENTENCES), commands_dataset.spoken_hardware(HW_SENTENCES)):
        uses = Counter(name for row in rows[0] for _, name in names_in(row["prompt"], spoken))
        rare = {name: uses[name] for _, name in spoken if uses[name] < commands_dataset.MIN_USES * 0.7}
        assert not rare


def test_held_out_covers_the_catalogue(rows: Rows) -> None:
    train, held = rows
    for group in ("model", "method", "hw"):
        taught = {parsed(row).get(group) for row in train}
        asked = {parsed(row).get(group) for row in held}
        assert len(asked) >= min(len(taught), 15)
    assert {parsed(row)["method"] for row in train} == set(commands_dataset.METHODS)


def test_sentences_are_short(rows: Rows) -> None:
    assert max(len(row["prompt"].split()) for row in [*rows[0], *rows[1]]) <= 20


def test_sentences_are_tidy(rows: Rows) -> None:
    for row in [*rows[0], *rows[1]]:
        sentence = row["prompt"]
        assert "  " not in sentence and " ." not in sentence and "{" not in sentence and " on," not in sentence
        assert sentence == sentence.strip()
        assert sentence[0].isupper() or sentence[0].isdigit() or sentence == sentence.lower()
        assert " a RTX" not in sentence and " a A100" not in sentence and " an T4" not in sentence


def test_a_method_without_spoken_names_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a file more in conf/method changes no row."""
    monkeypatch.delitem(commands_dataset.METHODS, "freeze")
    train, _ = examples()
    assert (
        {parsed(row)["method"] for row in train} == set(commands_dataset.METHODS) != set(conf_files.options("method"))
    )


def test_a_name_of_two_choices_is_never_said() -> None:
    names: dict[str, tuple[str, ...]]
    names = {"a": ("Llama", "Llama A"), "b": ("llama", "Llama B"), "c": ("Other", "other")}
    assert commands_dataset._spoken(names, 1000) == [("a", "Llama A"), ("b", "Llama B"), ("c", "Other")]


def test_a_large_catalogue_keeps_every_name_frequent() -> None:
    names = {f"m{i}": tuple(f"name {i} {j}" for j in range(5)) for i in range(40)}
    said = Counter(choice for choice, _ in commands_dataset._spoken(names, 60 * commands_dataset.MIN_USES))
    assert sorted(said.values()) == [1] * 20 + [2] * 20
    assert len(commands_dataset._spoken(names, 10)) == 40


def test_more_sentences_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_dataset, "TEMPLATES", ("Train {model} with {means}.",))
    with pytest.raises(ValueError, match="different sentences, not 5000"):
        examples(5000, 0)
