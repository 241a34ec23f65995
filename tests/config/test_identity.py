"""What runs is what was named: no fact of a choice survives under another identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.cli.options import request_of
from runner.resolve.steps import resolved
from tests.support.front import here, laptop, only_problem, problems_of, runner, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def tiny(folder: Path) -> Path:
    return write(folder / "tiny/config.json", json.dumps(TINY)).parent


def test_an_id_alone_means_a_model_of_the_hub_or_of_a_folder(here: Path) -> None:
    tiny(here)
    model = spec_of("model.id=./tiny", "train.max_length=256").model
    assert (model.name, model.id, model.package, model.hidden_size, model.num_layers) == ("hub", "./tiny", None, 64, 2)
    write(here / "mine.yaml", "defaults: [config, _self_]\nmodel: {id: ./tiny}\n")
    assert spec_of("mine.yaml").model == model
    assert spec_of("recipe=mistral7b_qlora4_h100x3", "model.id=./tiny", "train.max_length=256").model == model
    assert spec_of("model.id=org/name").model.architecture is None


def test_a_data_set_or_file_alone_means_its_choice(here: Path) -> None:
    for words, name in (
        ("data.id=org/rows", "hub"),
        ("data.path=x.jsonl", "file"),
        ("data.sources=[{path: a}]", "file"),
    ):
        data = spec_of(words).data
        assert (data.name, data.source, data.system_prompt) == (name, name, None)  # nothing of data=commands
    write(here / "mine.yaml", "defaults: [config, _self_]\ndata: {path: x.jsonl}\n")
    assert spec_of("mine.yaml").data.name == "file"
    write(here / "own/data/mine.yaml", "name: mine\nsource: file\npath: x.jsonl\nprompt_field: q\n")
    write(here / "own/try.yaml", "defaults: [config, override /data: mine, _self_]\n")
    data = spec_of("own/try.yaml", "data.path=y.jsonl").data  # its own fields are meant for such a file
    assert (data.name, data.path, data.prompt_field) == ("mine", "y.jsonl", "q")


@pytest.mark.parametrize(
    ("words", "key", "remedy"),
    [
        ("model=mistral7b model.id=Qwen/Qwen2.5-72B", "model.id", "write model=hub model.id=Qwen/Qwen2.5-72B"),
        ("model.name=llama2_70b", "model.name", "write model=llama2_70b"),
        ("model=hub model.id=a/b model.name=llama2_70b", "model.name", "write model=llama2_70b"),
        ("model=mistral7b model.name=my_mistral", "model.name", "write model=mistral7b"),
        ("model.package=other", "model.package", "write model=hub model.id=… model.package=other"),
        ("model=phi2 model.gguf_file=x.gguf", "model.gguf_file", "write model=hub model.id=…"),
        ("model=phi2 model.num_layers=3", "model.num_layers", "leave it out"),
        ("model=phi2 model.num_parameters=3", "model.num_parameters", "leave it out"),
        ("hw.name=h100", "hw.name", "write hw=h100"),
        ("hw=rtx4090 hw.gpu=H100", "hw.gpu", "write hw=h100;"),
        ("hw.gpu='A100'", "hw.gpu", "write hw=a100;"),
        ("hw=h100 hw.runpod_gpu_id=x", "hw.runpod_gpu_id", "python -m runner list hw shows all"),
        ("data=gsm8k data.id=org/x", "data.id", "write data=hub data.id=org/x"),
        ("data.source=pydoc", "data.source", "write data=python_docs"),
        ("data.name=gsm8k", "data.name", "write data=gsm8k"),
        ("method.name=qlora4", "method.name", "write method=qlora4"),
        ("method.name=full", "method.name", "write method=full"),
        ("deepspeed=zero2 deepspeed.name=zero3", "deepspeed.name", "write deepspeed=zero3"),
        ("objective.name=dpo", "objective.name", "write objective=dpo"),
        ("where.name=runpod", "where.name", "write where=runpod"),
        ("track.name=wandb", "track.name", "write track=wandb"),
    ],
)
def test_a_key_that_names_another_thing_is_refused(words: str, key: str, remedy: str) -> None:
    problem = only_problem(*words.split())
    assert problem.what.startswith(f"{key}=") and problem.source == "command line"
    assert (problem.remedy or "").startswith(remedy)


def test_a_recipe_that_chooses_one_model_and_names_another_is_refused_with_its_line(here: Path) -> None:
    write(here / "mine.yaml", "defaults: [config, override /model: phi2, _self_]\nmodel:\n  id: me/other\n")
    problem = only_problem("mine.yaml")
    remedy = "write it into the defaults list: - override /model: hub, and below it model: {id: me/other}"
    assert (problem.source, problem.remedy) == ("mine.yaml:3", remedy)


def test_what_changes_no_identity_is_taken() -> None:
    spec = spec_of("model=hub", "model.id=a/b", "model.name=mine", "model.num_layers=4")
    assert (spec.model.name, spec.model.num_layers) == ("mine", 4)
    spec = spec_of("model.package=null", "model.gguf_file=null")
    assert (spec.model.name, spec.model.id) == ("smollm2_135m", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert spec_of("model=phi2", "model.id=microsoft/phi-2", "model.revision=abc").model.revision == "abc"
    own = ("hw.accelerator=cuda", "hw.gpu=RTX 3080", "hw.memory_gib=10", "hw.num_gpus=1", "hw.name=mybox")
    assert spec_of(*own).hw.name == "mybox"
    assert spec_of("model=scratch_22m", "method=full", "objective=pretrain", "objective.experiment=x",
                   "model.num_layers=4", "train.max_length=256", "data=python_docs").model.num_layers == 4  # fmt: skip


def test_facts_that_a_folder_contradicts_are_refused(here: Path) -> None:
    tiny(here)
    problem = only_problem("model.id=./tiny", "model.num_layers=9", "train.max_length=256")
    assert problem.what == "model.id=./tiny: its config.json has num_layers 2 and not 9"
    write(here / "own/model/mine.yaml", "defaults: [mistral7b, _self_]\nname: mine\nid: ./tiny\n")
    problem = only_problem("model=mine", config_dirs=(here / "own",))
    assert problem.what.startswith("model.id=./tiny: its config.json has architecture llama and not mistral, ")


def test_a_spec_json_keeps_its_identity(here: Path) -> None:
    write(here / "spec.json", runner("show", "--json", "model=phi2").stdout)
    found = problems_of("spec.json", "model.id=org/other", "hw.gpu=H100", "method.name=full", "train.seed=3")
    assert set(found) == {
        "model.id=org/other is another model than microsoft/phi-2 in the spec.json",
        "hw.gpu=H100 is another GPU than None in the spec.json",
        "method.name=full is another method than lora in the spec.json",
    }
    assert only_problem("spec.json", "track.name=wandb").remedy == "write track=wandb"
    assert spec_of("spec.json", "track=wandb").track.name == "wandb"
    assert resolved(request_of(("spec.json", "model.id=microsoft/phi-2"), ()))[0].model.name == "phi2"
