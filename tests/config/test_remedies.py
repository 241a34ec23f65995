"""A remedy works when it is typed as it is printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runner.config.schema_keys import as_typed
from runner.paths import ASSETS
from tests.support.front import here, laptop, only_problem, problems_of, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

ODD = (
    "it's", '"', "'\"'", "a\\", 'a\\"', "\\'", "$HOME", "${model.id}", "${", "`id`", "[<|x|>]", "{a: 1}", "a,b", "a, b",
    "(x)", "a=b", "é ü 漢", "~/rows", "!x", "*", "#x", "a;b|c&d", " spaced ", "-x", "2024", "true", "null", "1e3",
    "\\\\",    "say \"it's ${x}\" \\ now", "%s", "<|im_start|>",
)  # fmt: skip


def shell(word: str) -> list[str]:
    """The words that bash makes of a line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {word}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("value", ODD)
def test_a_text_is_quoted_for_shell_and_hydra(value: str) -> None:
    (word,) = shell(as_typed("data.system_prompt", value))
    assert spec_of(word).data.system_prompt == value


@pytest.mark.parametrize("value", ["it's", "[<|x|>]", "${", "a, b: {", "(x", "~rows"])
def test_what_cannot_be_read_is_told_in_a_way_that_can(value: str) -> None:
    remedy = only_problem(f"data.system_prompt={value}").remedy or ""
    (word,) = shell(remedy.removeprefix("quote values with special characters: "))
    assert spec_of(word).data.system_prompt == value


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("run.name=123", "run.name", "123"),
        ("data.subset=2024", "data.subset", "2024"),
        ("data.system_prompt=1e3", "data.system_prompt", "1e3"),
        ("run.name=1.10", "run.name", "1.10"),
        ("data.subset=1_000", "data.subset", "1_000"),
        ("data.system_prompt=True", "data.system_prompt", "True"),
        ("data.system_prompt=true", "data.system_prompt", "true"),
        ("data.system_prompt=a,b", "data.system_prompt", "a,b"),
        ("data.add_tokens=[<|x|>]", "data.add_tokens", ["<|x|>"]),
        ("data.add_tokens=[<|x|>,<|y|>]", "data.add_tokens", ["<|x|>", "<|y|>"]),
        ("method.target_modules=q_proj,v_proj", "method.target_modules", ["q_proj", "v_proj"]),
        ("data.add_tokens=[1]", "data.add_tokens", ["1"]),
        ("data.add_tokens=[1.10,a,010,TRUE]", "data.add_tokens", ["1.10", "a", "010", "TRUE"]),
    ],
)
def test_the_printed_remedy_is_typed(word: str, key: str, value: object) -> None:
    more = ("data=hub", "data.id=a/b") if word.startswith("data.") else ()
    remedy = only_problem(*more, word).remedy or ""
    (fixed,) = shell(remedy[remedy.rindex(key) - (remedy[remedy.rindex(key) - 1] == "'") :])
    content: object = spec_of(*more, fixed).model_dump()
    for step in key.split("."):
        assert isinstance(content, dict)
        content = content[step]
    assert content == value


def test_an_obvious_meaning_is_said() -> None:
    for word, meant in {
        "model=org/name": "model=hub model.id=org/name",
        "model=meta-llama/llama-3.1-8b": "model=llama3_1_8b",
        "model=./tiny": "model=hub model.id=./tiny",
        "data=my.jsonl": "data=file data.path=my.jsonl",
        "data=rows/a.parquet": "data=file data.path=rows/a.parquet",
        "data=org/name": "data=hub data.id=org/name",
        "deepspeed=3": "deepspeed=zero3",
        "deepspeed=stage2": "deepspeed=zero2",
        "deepspeed=0": "deepspeed=none",
        "deepspeed=./mine.json": "deepspeed=auto deepspeed.config=./mine.json",
        "hw=h100x4x": "hw=h100 hw.num_gpus=4",
        "hw=H100:8": "hw=h100x8",
        "hw=a100x8gpus": "hw=a100x8",
    }.items():
        assert only_problem(word).remedy == f"write {meant}"


def test_yaml_that_means_something_else_is_told(here: Path) -> None:
    write(here / "mine.yaml", "defaults: [config, _self_]\nrun: {name: no}\nmethod: qlora4\ntrain.max_steps: 5\n")
    found = problems_of("mine.yaml")
    assert {p.source: p.remedy for p in found.values()} == {
        "mine.yaml:2": 'quote it: name: "no", since yes, no, on, off, true and false are no texts in YAML',
        "mine.yaml:3": "write it into the defaults list: - override /method: qlora4",
        "mine.yaml:4": "write train: {max_steps: …}",
    }
    write(here / "run.yaml", "defaults: [config, _self_]\nrun: {name: 123}\n")
    assert only_problem("run.yaml").remedy == 'quote it: name: "123"'


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("run: {name: 1.10}", 'name: "1.10"'),
        ("run: {name: 010}", 'name: "010"'),
        ("run: {name: 1_000}", 'name: "1_000"'),
        ("data: {system_prompt: 12:30}", 'system_prompt: "12:30"'),
        ("data: {system_prompt: 1e3}", 'system_prompt: "1e3"'),
        ("data: {add_tokens: [010, yes, a]}", 'add_tokens: ["010", "yes", "a"]'),
        ("data:\n  add_tokens:\n  - 1.10\n", 'add_tokens: ["1.10"]'),
        ("run: {name: '${train.seed}'}", 'name: "42"'),
    ],
)
def test_the_text_in_the_remedy_is_the_one_in_the_file(here: Path, line: str, remedy: str) -> None:
    head = "defaults: [config, _self_]\n"
    write(here / "mine.yaml", head + line)
    told = only_problem("mine.yaml").remedy or ""
    assert told.startswith(f"quote it: {remedy}")
    group, leaf = line.partition(":")[0], remedy.partition(":")[0]
    write(here / "mine.yaml", f"{head}{group}: {{{remedy}}}")
    assert getattr(getattr(spec_of("mine.yaml"), group), leaf) == yaml.safe_load(remedy)[leaf]


def test_a_text_within_a_typed_mapping_is_not_guessed() -> None:
    for word in ("run={name:1.10}", "data.add_tokens=[1.10,'a']"):
        assert (only_problem(word).remedy or "").endswith("as you wrote it, in quotes")
    assert only_problem("method.target_modules=[1.10]").remedy == "quote it: method.target_modules='[\"1.10\"]'"
    pod = ("where=runpod", "hw=l4")
    for version in ("12.8", "12.10"):
        remedy = only_problem(*pod, f"where.cuda_versions=[{version}]").remedy or ""
        (word,) = shell(remedy.removeprefix("quote it: "))
        assert spec_of(*pod, word).where.model_dump()["cuda_versions"] == [version]


def test_a_name_longer_than_a_file_may_have_is_refused() -> None:
    assert only_problem(f"recipe={'a,' * 300}.yaml").remedy
    assert only_problem(f"run.name={'a' * 300}").what.endswith("at most 150 characters, and this has 300")


def test_errors_are_spelt_for_a_terminal_without_unicode_and_a_deleted_folder_is_told(tmp_path: Path) -> None:
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ASSETS)}
    done = subprocess.run([sys.executable, "-m", "runner", "show", "model=xx"], capture_output=True, env=ascii_only)
    assert done.returncode == 2 and b"  * there is no model 'xx'" in done.stderr and b"\\u" not in done.stderr
    gone = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir ../gone && exec {sys.executable} -m runner show"
    done = subprocess.run(["bash", "-c", gone], capture_output=True, env=ascii_only)
    assert done.returncode == 2 and done.stderr == b"The working directory has been deleted: cd to another one.\n"


@pytest.mark.parametrize(
    ("word", "more"),
    [
        ("data.tokens_per_row=-5", ("data=hub", "data.id=a/b")),
        ("train.learning_rate=0", ()),
        ("train.warmup_ratio=2", ()),
        ("train.batch_size=many", ()),
        ("train.num_epochs=yes", ()),
        ("train.spike_factor=1", ()),
        ("hw.memory_gib=0", ("hw=a100",)),
        ("where.max_usd=-1", ("where=runpod", "hw=l4")),
    ],
)
def test_the_number_in_a_remedy_can_be_typed(word: str, more: tuple[str, ...]) -> None:
    key = word.partition("=")[0]
    remedy = only_problem(*more, word).remedy or ""
    assert remedy.startswith(f"write {key}=") and remedy.endswith(", for example")
    spec_of(*more, remedy.removeprefix("write ").removesuffix(", for example"))
