"""A first recipe that is not yet one is answered with the lines to write, and another trainer's file is recognised."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config.other_trainers_keys import NONE, PEERS, TORCHTUNE
from runner.config.schema_keys import known_keys
from tests.support.front import here, laptop, only_problem, problems_of, runner, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

TO_LIST = "write it into the defaults list: "


def mended(text: str, remedies: list[str]) -> str:
    """The file with what the remedies say, and without the lines of choices that they move."""
    block = next((r.removeprefix("begin it with:\n") for r in remedies if r.startswith("begin it with:")), "")
    values = [r.partition(", and below it ")[2] for r in remedies if ", and below it " in r]
    kept = [line for line in text.splitlines() if "{" in line]
    return "\n".join([block, *values, *kept]) + "\n"


def test_choices_at_the_top_of_a_file_are_all_told_with_the_lines_to_write(here: Path) -> None:
    text = "model: qwen3_0_6b\ndata: file\nmethod: qlora\ntrain: {max_steps: 5}\n"
    found = problems_of(str(write(here / "mine.yaml", text)))
    assert [(p.source, p.remedy) for p in found.values()] == [
        (None, "begin it with:\ndefaults:\n  - config\n  - override /model: qwen3_0_6b\n  - override /data: file\n"
               "  - override /method: qlora4\n  - _self_"),
        ("mine.yaml:1", f"{TO_LIST}- override /model: qwen3_0_6b"),
        ("mine.yaml:2", f"{TO_LIST}- override /data: file"),
        ("mine.yaml:3", f"{TO_LIST}- override /method: qlora4"),
    ]  # fmt: skip
    write(here / "x.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    write(here / "mine.yaml", mended(text, [p.remedy or "" for p in found.values()]) + "data: {path: x.jsonl}\n")
    spec = spec_of("mine.yaml")
    assert (spec.model.name, spec.method.name, spec.data.source, spec.train.max_steps) == (
        "qwen3_0_6b", "qlora4", "file", 5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "entry", "value"),
    [
        ("model: ./tiny", "- override /model: hub", "model: {id: ./tiny}"),
        ("data: rows/a.jsonl", "- override /data: file", "data: {path: rows/a.jsonl}"),
        ("data: org/name", "- override /data: hub", "data: {id: org/name}"),
        ("hw: 2", "- override /hw: local", "hw: {num_gpus: 2}"),
        ("deepspeed: 3", "- override /deepspeed: zero3", ""),
        ("deepspeed: my.json", "- override /deepspeed: auto", "deepspeed: {config: my.json}"),
    ],
)
@pytest.mark.parametrize("start", ["", "defaults: [config, _self_]\n"])
def test_a_choice_that_is_no_name_is_told_with_its_value(
    here: Path, start: str, line: str, entry: str, value: str
) -> None:
    write(here / "mine.yaml", f"{start}{line}\n")
    found = [p for p in problems_of("mine.yaml").values() if p.source]
    assert [p.remedy for p in found] == [TO_LIST + entry + (f", and below it {value}" if value else "")]


@pytest.mark.parametrize(
    "defaults",
    [
        "defaults: {model: qwen3_0_6b}",
        "defaults: [{model: qwen3_0_6b}, _self_]",
        "defaults: [override /model: qwen3_0_6b]",
    ],
)
def test_a_defaults_list_without_config_keeps_its_choices(here: Path, defaults: str) -> None:
    write(here / "mine.yaml", f"{defaults}\n")
    remedy = only_problem("mine.yaml").remedy or ""
    write(here / "mine.yaml", remedy.removeprefix("begin it with:\n") + "\n")
    assert spec_of("mine.yaml").model.name == "qwen3_0_6b"


def test_what_a_file_names_otherwise_is_corrected_as_it_stands_in_a_file(here: Path) -> None:
    write(here / "mine.yaml", "defaults: [config, override /model: org/name, _self_]\n")
    assert only_problem("mine.yaml").remedy == f"{TO_LIST}- override /model: hub, and below it model: {{id: org/name}}"
    write(here / "mine.yaml", "defaults: [config, _self_]\nmodel: {name: mistral7b}\n")
    assert only_problem("mine.yaml").remedy == f"{TO_LIST}- override /model: mistral7b"


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
micro_batch_size: 2
num_epochs: 1
learning_rate: 0.0002
logging_steps: 1
tf32: false
mystery: 1
"""
FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
dataset: identity
template: qwen3
cutoff_len: 2048
output_dir: saves/qwen
per_device_train_batch_size: 1
"""
TRL = "model_name_or_path: Qwen/Qwen2-0.5B\ndataset_name: trl-lib/Capybara\nuse_peft: true\nlora_r: 32\n"
ARGUMENTS = "output_dir: out\nper_device_train_batch_size: 4\nnum_train_epochs: 3\nlearning_rate: 5.0e-5\n"
TORCHTUNE_FILE = """
output_dir: /tmp/torchtune/llama3_1_8B/lora_single_device
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  lora_rank: 8
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: null
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
batch_size: 2
epochs: 1
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
compile: False
"""
ACCELERATE = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\n"


@pytest.mark.parametrize(
    ("text", "whose", "here_called"),
    [
        (
            AXOLOTL, "an Axolotl config",
            ["base_model → model: {id: …}", "adapter → - override /method: …, in the defaults list",
             "sequence_len → train: {max_length: …}", "micro_batch_size → train: {micro_batch_size: …}",
             "logging_steps → leave it out: every step is written to metrics.jsonl", "without a key here: mystery"],
        ),
        (FACTORY, "a LLaMA-Factory config",
         ["stage → - override /objective: …, in the defaults list", "cutoff_len → train: {max_length: …}"]),
        (TRL, "a TRL config", ["dataset_name → data: {id: …}"]),
        (ARGUMENTS, "a file of transformers' TrainingArguments", ["num_train_epochs → train: {num_epochs: …}"]),
        (TORCHTUNE_FILE, "a torchtune config",
         ["model.lora_rank → method: {rank: …}", "model.lora_attn_modules → method: {target_modules: …}",
          "batch_size → train: {micro_batch_size: …}", "optimizer.lr → train: {learning_rate: …}",
          "output_dir → run: {output_dir: …}", "without a key here: compile"]),
        (ACCELERATE, "an Accelerate config", ["num_processes → hw: {num_processes: …}"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", ["yaml", "yml"])
def test_a_file_of_another_trainer_is_recognised(
    here: Path, text: str, whose: str, here_called: list[str], ending: str
) -> None:
    write(here / f"theirs.{ending}", text)
    found = only_problem(f"theirs.{ending}")
    assert found.what == f"theirs.{ending} is {whose}, and this runner has keys of its own"
    assert set(here_called) <= {line.strip() for line in (found.remedy or "").splitlines()}


def test_the_keys_of_torchtune_are_called_what_the_schema_calls_them() -> None:
    assert set(TORCHTUNE.values()) <= set(known_keys())


def test_words_of_other_trainers_without_a_key_here_are_told_so() -> None:
    assert not NONE.keys() & (PEERS.keys() | {key.rpartition(".")[2] for key in known_keys()})
    for word in ("logging_steps", "trust_remote_code", "dataloader_num_workers"):
        assert only_problem(f"train.{word}=1").remedy == f"leave it out: {NONE[word]}"


@pytest.mark.parametrize("name", ["lr=1e-4,r=8.yaml", "a,b.yaml", "folder=x/mine.yaml"])
def test_a_recipe_may_be_called_as_a_file_may(here: Path, name: str) -> None:
    write(here / name, "defaults: [config, _self_]\ntrain: {max_steps: 7}\n")
    assert spec_of(name).train.max_steps == spec_of(f"recipe={name}").train.max_steps == 7


def test_a_title_of_ones_own_is_in_the_heading_of_a_plan(here: Path) -> None:
    write(here / "own/model/mine.yaml", "defaults: [mistral7b]\ntitle: My Mistral\nname: mine\n")
    write(here / "own/hw/box.yaml", "defaults: [h100]\ntitle: The box\nname: box\n")
    result = runner("plan", "--config-dir", "own", "model=mine", "method=qlora4", "hw=box")
    assert result.stdout.startswith("My Mistral, qlora4, The box\n"), result.output


def test_a_relative_folder_is_another_one_in_another_working_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, title in (("a", "One"), ("b", "Two")):
        write(here / name / "own/model/mine.yaml", f"defaults: [mistral7b]\ntitle: {title}\nname: mine\n")
        monkeypatch.chdir(here / name)
        assert runner("plan", "--config-dir", "own", "model=mine", "hw=h100").stdout.startswith(f"{title}, ")
