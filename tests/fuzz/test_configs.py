"""Config files of others: `config.json`, hostfiles, DeepSpeed JSON, recipes, overrides, other trainers' YAML, specs."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import yaml

from runner.cli.options import request_of
from runner.config import conf_files, other_trainers, recipe_checks
from runner.config.compose import compose
from runner.config.deepspeed_json import read_deepspeed_json
from runner.errors import RequestError
from runner.hub import config_json
from runner.hub.model_config import facts_from_config, local_facts
from runner.hub.weight_files import damage_of
from runner.machine.hostfile import read_hostfile
from runner.paths import DEEPSPEED_CONFIGS, RECIPES
from runner.rundir.directory import RunDir
from tests.conftest import spec_of
from tests.fuzz import mutate
from tests.fuzz.fuzzing import Target, fuzz

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16", "attention_bias": False,
}  # fmt: skip
MODELS = [
    LLAMA, {"model_type": "gpt2"}, {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma"}}, {"model_type": "qwen3_moe", "mlp_only_layers": []},
    {"model_type": "gpt_neox"}, {"model_type": "phi3", "head_dim": None},
]  # fmt: skip
DEEPSPEED = [json.loads(file.read_text("utf-8")) for file in sorted(DEEPSPEED_CONFIGS.glob("*.json"))]
RECIPE_TEXTS = [file.read_text("utf-8") for file in sorted(RECIPES.glob("*.yaml"))]
FOREIGN = [
    {"base_model": "x", "adapter": "lora", "datasets": [{"path": "a", "type": "alpaca"}], "sequence_len": 1, "micro_batch_size": 2},
    {"stage": "sft", "finetuning_type": "lora", "template": "llama3", "cutoff_len": 10, "dataset": "a,b"},
    {"model": {"_component_": "torchtune.models.x"}, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4}},
    {"model_name_or_path": "a", "dataset_name": "b", "use_peft": True, "lora_r": 8},
]  # fmt: skip
ALIASES = ("a: &a [x, *a]\n", "a: &a {b: *a}\nc: *a\n", "a: &a [1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9)),
           "l0: &l0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 9)),
           "? [a, b]\n: c\n", "!!python/object/apply:os.system ['true']\n", "a: !!binary x\n", "a: 2001-99-99\n", "<<: *x\n", "- " * 3000,
           "{" * 3000, "a: 0o99999\n", "a: 1:99:99\n", "%YAML 9.9\n---\n", "a: \"\\ud800\"\n", "defaults: 5\n", "defaults: [{a: {b: c}}]\n",
           "defaults: [_self_, _self_]\n", "train: ${train}\n", "train: ${oc.env:X}\n", "a: ${oc.decode:'[[['}\n", "model: ${model}\n")  # fmt: skip
WORDS = (
    "model=mistral7b", "method=lora", "hw=rtx4090", "train.max_steps=5", "deepspeed=zero2", "data.path=x.jsonl", "objective=dpo",
    "train.learning_rate=1e-4", "method.targets=[q_proj]", "run.name=x", "hw.num_gpus=2", "where=runpod", "where.max_usd=5",
    "+x=1", "~train", "++train.seed=${oc.env:HOME}", "data.sources=[{path: a.jsonl}]", "hw.env={A: b}", "recipe=phi2_lora_rtx6000adax5",
)  # fmt: skip


def config(rng: Random) -> str:
    return mutate.json_text(rng, rng.choice(MODELS))


def hostfile(rng: Random) -> str:
    text = "\n".join(
        f"worker-{i} slots={rng.choice((4, 4, 0, '٤', '²', '1' * 5000, -1))}" for i in range(rng.randrange(4))
    )
    return mutate.broken(rng, text + " # x\n")


def deepspeed(rng: Random) -> str:
    return mutate.json_text(rng, rng.choice(DEEPSPEED))


def recipe(rng: Random) -> str:
    """YAML: a recipe that was changed as text or as values, or an odd document in it."""
    text = rng.choice(RECIPE_TEXTS)
    match rng.randrange(5):
        case 0:
            return mutate.broken(rng, text)
        case 1:
            return text + rng.choice(ALIASES)
        case 2:
            return rng.choice(ALIASES) + mutate.broken(rng, text)
        case 3:
            return mutate.json_text(rng, rng.choice(FOREIGN))
        case _:
            content = yaml.safe_load(text)
            return mutate.text_of(mutate.mutated(rng, content))


def words(rng: Random) -> tuple[str, ...]:
    found = []
    for _ in range(rng.choice((1, 2))):
        word = rng.choice(WORDS)
        name = word.partition("=")[0]
        match rng.randrange(4):
            case 0:
                word = f"{name}={mutate.scalar_text(rng)[:3000]}"
            case 1:
                word = mutate.broken(rng, word)[:3000]
            case 2:
                word = f"{name}={mutate.text_of(mutate.value(rng, 2))[:3000]}"
        found.append(word.replace("\0", ""))  # no argument of a process can hold one
    return tuple(found)


def _written(file: Path, text: str) -> Path:
    file.write_text(text, "utf-8", "surrogatepass")
    return file


def test_a_models_config_is_read_or_refused(tmp_path: Path) -> None:
    def read(text: str) -> None:
        _written(tmp_path / "config.json", text)
        local_facts(str(tmp_path))

    def of_hub(text: str) -> None:
        facts_from_config(config_json._parsed(text, "org/name"), "config.json")

    fuzz(Target("config.json", config, read))
    fuzz(Target("config.json of the Hub", config, of_hub))


def test_weights_are_judged_by_their_header(tmp_path: Path) -> None:
    one = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
    header = {"__metadata__": {"format": "pt"}, "a": one, "b": one | {"data_offsets": [8, 16]}}

    def given(rng: Random) -> bytes:
        text = mutate.json_text(rng, header).encode("utf-8", "surrogatepass")
        data = len(text).to_bytes(8, "little") + text + bytes(16)
        return mutate.garbled(rng, data) if rng.random() < 0.4 else data

    def read(data: bytes) -> None:
        (file := tmp_path / "model.safetensors").write_bytes(data)
        if (problem := damage_of(file)) is not None:
            raise RequestError(problem)

    fuzz(Target("safetensors headers", given, read))


def test_a_hostfile_is_read_or_refused(tmp_path: Path) -> None:
    fuzz(Target("hostfiles", hostfile, lambda text: read_hostfile(str(_written(tmp_path / "hosts", text)))))


def test_a_deepspeed_json_is_read_or_refused(tmp_path: Path) -> None:
    fuzz(
        Target("DeepSpeed JSON", deepspeed, lambda text: read_deepspeed_json(str(_written(tmp_path / "ds.json", text))))
    )


def test_a_recipe_is_read_or_refused(tmp_path: Path) -> None:
    def read(text: str) -> None:
        file = _written(tmp_path / "mine.yaml", text)
        conf_files._read.cache_clear()
        conf_files.read_file(file)
        other_trainers.problems_in(file)
        recipe_checks.recipe_problems(file, ())
        recipe_checks.choices_and_keys(file)

    def composed(text: str) -> None:
        conf_files._read.cache_clear()
        compose(request_of((str(_written(tmp_path / "mine.yaml", text)),), ()))

    fuzz(Target("recipes", recipe, read))
    fuzz(Target("recipes composed", recipe, composed))


def test_words_of_a_command_line_are_read_or_refused() -> None:
    fuzz(Target("overrides", words, lambda given: compose(request_of(given, ()))))


def test_a_spec_file_is_read_or_refused(tmp_path: Path) -> None:
    spec = spec_of("model=mistral7b", "method=lora", "hw=h100x3").model_dump(mode="json")

    def read(text: str) -> None:
        _written(tmp_path / "spec.json", text)
        run = RunDir(tmp_path)
        assert run.spec

    def repeated(text: str) -> None:
        compose(request_of((str(_written(tmp_path / "spec.json", text)),), ()))

    def given(rng: Random) -> str:
        return mutate.json_text(rng, spec)

    fuzz(Target("spec.json", given, read))
    fuzz(Target("spec.json repeated", given, repeated))
