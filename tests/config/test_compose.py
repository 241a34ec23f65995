"""Choices, recipes and values compose into one checked run, and every mistake is told at once."""

from __future__ import annotations

import io
import json
import threading
import time
from _thread import interrupt_main
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.types import RunMode
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader

from runner.config import conf_files, spec_json, yaml_files
from runner.config.command_line import Checked, Request, check_request
from runner.config.compose import compose, origins_of_key
from runner.config.hydra_compose import hydra_over, merge_config, primary_of
from runner.config.sweep_points import read_sweep
from runner.errors import RequestError
from runner.paths import CONF, RECIPES
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from tests.support.front import here, laptop, only_problem, problems_of, runner, spec_of, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

RECIPE = """\
defaults:
  - config
  - override /model: phi2
  - override /method: qlora4
  - override /hw: a100
  - _self_
train:
  batch_size: 24
  learning_rate: 3e-5
method: {rank: 64}
"""


# ── what composes ──────────────────────────────────────────────────────────────────────────────


def test_four_choices_make_a_run() -> None:
    spec = spec_of("model=mistral7b", "method=qlora4", "hw=h100x3", "deepspeed=zero2")
    assert (spec.model.id, spec.method.name, spec.hw.num_gpus) == ("mistralai/Mistral-7B-v0.1", "qlora4", 3)
    assert spec.deepspeed.name == "zero2"
    assert spec.train.learning_rate == spec.model.learning_rate_adapter


def test_the_learning_rate_follows_model_and_method() -> None:
    assert spec_of("model=phi2", "method=full").train.learning_rate == 2e-5
    assert spec_of("model=phi2", "method=lora").train.learning_rate == 2e-4


def test_a_profile_can_be_changed_by_one_value() -> None:
    spec = spec_of("hw=h100", "hw.num_gpus=2")
    assert (spec.hw.name, spec.hw.num_gpus, spec.hw.memory_gib) == ("h100", 2, 79.65)


def test_any_model_of_the_hub_needs_only_its_id() -> None:
    assert spec_of("model=hub", "model.id=org/name").model.id == "org/name"


@pytest.mark.parametrize(
    ("typed", "key", "value"),
    [
        ("train.learning_rate=2e-5", "train.learning_rate", 2e-5),
        ("train.learning_rate=1E-4", "train.learning_rate", 1e-4),
        ("train.packing=false", "train.packing", False),
        ("train.max_steps=null", "train.max_steps", None),
        ("method.target_modules=[q_proj,v_proj]", "method.target_modules", ["q_proj", "v_proj"]),
        ("method.layers=last:2", "method.layers", "last:2"),
        ("method.layers=[0,2,5-7]", "method.layers", [0, 2, "5-7"]),
        ("hw.env.OMP_NUM_THREADS=4", "hw.env", {"OMP_NUM_THREADS": "4"}),
        ("data.system_prompt='Be brief, please.'", "data.system_prompt", "Be brief, please."),
    ],
)
def test_values_on_the_command_line_have_types(typed: str, key: str, value: object) -> None:
    content: object = spec_of(typed).model_dump()
    for step in key.split("."):
        assert isinstance(content, dict)
        content = content[step]
    assert content == value and type(content) is type(value)


def test_values_in_yaml_have_types(here: Path) -> None:
    file = write(
        here / "mine.yaml",
        "defaults: [config, _self_]\n"
        "train: {learning_rate: 2e-5, packing: false, max_steps: null, num_epochs: 2}\n"
        "method: {target_modules: [q_proj, v_proj]}\n",
    )
    spec = spec_of(str(file))
    assert (spec.train.learning_rate, spec.train.packing, spec.train.max_steps) == (2e-5, False, None)
    assert (spec.train.num_epochs, spec.method.target_modules) == (2.0, ["q_proj", "v_proj"])


def test_a_variable_of_a_profile_can_be_taken_away() -> None:
    assert set(spec_of("hw=rtx4090x2", "hw.env.NCCL_IB_DISABLE=null").hw.env) == {"NCCL_P2P_DISABLE"}


# ── recipes and folders of one's own ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("named", ["mine.yaml", "./mine.yaml", "recipe=mine.yaml", "ABSOLUTE"])
def test_a_recipe_of_ones_own_may_lie_anywhere(here: Path, named: str) -> None:
    file = write(here / "mine.yaml", RECIPE)
    spec = spec_of(str(file) if named == "ABSOLUTE" else named)
    assert (spec.model.name, spec.method.name, spec.hw.name) == ("phi2", "qlora4", "a100")
    assert (spec.train.batch_size, spec.train.learning_rate) == (24, 3e-5)


def test_command_line_beats_recipe_beats_choice(here: Path) -> None:
    write(here / "mine.yaml", RECIPE)
    assert spec_of("model=phi2", "method=qlora4").train.learning_rate == 2e-4  # the choices'
    assert spec_of("mine.yaml").train.learning_rate == 3e-5  # the recipe's
    spec = spec_of("mine.yaml", "train.learning_rate=7e-5", "method=lora", "method.rank=4")
    assert (spec.train.learning_rate, spec.method.name) == (7e-5, "lora")
    assert spec.method.rank == 4


def test_the_last_of_two_equal_keys_counts() -> None:
    assert spec_of("train.seed=1", "train.seed=2").train.seed == 2


def test_a_folder_of_ones_own_adds_choices_and_replaces_them(here: Path) -> None:
    write(here / "own/model/mine.yaml", "name: mine\nid: me/mine\n")
    write(here / "own/model/phi2.yaml", "name: phi2\nid: me/better-phi2\n")
    own = (here / "own",)
    assert spec_of("model=mine", "method=full", "train.learning_rate=1e-4", config_dirs=own).model.id == "me/mine"
    assert spec_of("model=phi2", "train.learning_rate=1e-4", config_dirs=own).model.id == "me/better-phi2"
    assert spec_of("model=phi2").model.id == "microsoft/phi-2"
    assert runner("show", "--config-dir", "own", "model=mine", "train.learning_rate=1e-4").exit_code == 0


def test_a_recipe_in_a_folder_of_ones_own_is_found_by_name(here: Path) -> None:
    write(here / "own/try.yaml", "defaults: [config, override /model: phi2, _self_]\n")
    assert spec_of("recipe=try", config_dirs=(here / "own",)).model.name == "phi2"
    write(here / "own/model/mine.yaml", "name: mine\nid: me/mine\narchitecture: llama\n")
    result = runner("list", "models", "--config-dir", "own", "--json")
    assert "mine" in [row["name"] for row in json.loads(result.stdout)]
    write(here / "own/config.yaml", "defaults: [model: phi2]\n")
    assert "holds a config.yaml" in only_problem("model=phi2", config_dirs=(here / "own",)).what


def test_a_shipped_recipe_is_extended_by_name(here: Path) -> None:
    write(here / "mine.yaml", "defaults: [mistral7b_qlora4_h100x3, _self_]\ntrain: {seed: 7}\n")
    spec, base = spec_of("mine.yaml"), spec_of("recipe=mistral7b_qlora4_h100x3")
    assert spec.train.seed == 7 and base.train.seed == 42
    assert spec.model_copy(update={"train": spec.train.model_copy(update={"seed": 42})}) == base


def test_choices_beside_a_recipe_are_found(here: Path) -> None:
    write(here / "own/model/mine.yaml", "name: mine\nid: me/mine\nlearning_rate_adapter: 1e-4\n")
    write(here / "own/try.yaml", "defaults: [config, override /model: mine, _self_]\n")
    assert spec_of("own/try.yaml").model.id == "me/mine"


# ── a spec.json again ──────────────────────────────────────────────────────────────────────────


def test_a_spec_json_repeats_the_run_exactly(here: Path) -> None:
    words = ("model=mistral7b", "method=qlora4", "hw=h100x3", "train.max_steps=7")
    write(here / "run/spec.json", runner("show", "--json", *words).stdout)
    assert spec_of("run/spec.json") == spec_of("run") == spec_of(*words)


def test_single_values_of_a_spec_json_can_be_changed(here: Path) -> None:
    before = spec_of("model=phi2")
    write(here / "spec.json", json.dumps(before.model_dump(mode="json")))
    after = spec_of("spec.json", "train.learning_rate=2e-5", "method.target_modules=[q_proj]", "hw.env.A=1")
    expected = before.model_dump()
    expected["train"]["learning_rate"], expected["method"]["target_modules"] = 2e-5, ["q_proj"]
    expected["hw"]["env"] = {"A": "1"}
    assert after == RunSpec.model_validate(expected)


def test_a_ctrl_c_in_the_middle_is_no_mistake_in_the_config() -> None:
    """Of 60, three or so leave an OmegaConf node half set, over which its clean-up fails."""
    begun = time.monotonic()
    compose(Request())
    took = time.monotonic() - begun
    for part in range(60):
        timer = threading.Timer(took * (part + 0.5) / 60, interrupt_main)
        with suppress(KeyboardInterrupt):  # on a busy machine the first ones come before `start` is back
            timer.start()
            while timer.is_alive():
                compose(Request())
            compose(Request())


def test_a_choice_cannot_be_exchanged_in_a_spec_json(here: Path) -> None:
    write(here / "spec.json", json.dumps(spec_of().model_dump(mode="json")))
    found = problems_of("spec.json", "method=full", "train.sed=3", "train.seed.x=3")
    assert set(found) == {
        "method=full: spec.json is resolved, so a whole choice cannot be exchanged in it",
        "unknown key train.sed",
        "train.seed={'x': 3}: expected a whole number",
    }
    assert {problem.source for problem in found.values()} == {"command line"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read spec.json: No such file or directory"),
        ("{", "spec.json is not JSON"),
        ("[]", "spec.json is not a spec.json"),
    ],
)
def test_a_spec_json_that_is_none_is_refused(here: Path, content: str | None, says: str) -> None:
    if content is not None:
        write(here / "spec.json", content)
    assert only_problem("spec.json").what.startswith(says)


def test_a_spec_json_with_an_unknown_key_names_the_file(here: Path) -> None:
    content = spec_of().model_dump(mode="json")
    content["train"]["lr"] = 1
    write(here / "spec.json", json.dumps(content))
    problem = only_problem("spec.json")
    assert (problem.what, problem.source) == ("unknown key train.lr", "spec.json")


# ── every mistake at once ──────────────────────────────────────────────────────────────────────


def test_every_mistake_of_a_command_line_is_told_at_once() -> None:
    found = problems_of(
        "modle=phi2", "method=lorra", "hw=h1000x3", "train.lerning_rate=1e-4", "trian.batch_size=4", "lr=1e-4",
        "train.batch_size=many", "train.warmup_ratio=1.5", "train.schedule=cosin", "train.packing=perhaps",
        "run.name='a b'", "train.seed=[", "train.seed=1,2", "train.weight_decay=${zzz}", "shwo",
    )  # fmt: skip
    expected = {
        "unknown key modle": "did you mean model?",
        "there is no method 'lorra'": "did you mean method=lora?",
        "there is no hw 'h1000x3'": "did you mean hw=h100x3?",
        "unknown key train.lerning_rate": "did you mean train.learning_rate?",
        "unknown key trian.batch_size": "did you mean train.batch_size?",
        "unknown key lr": "did you mean train.learning_rate?",
        "train.batch_size=many: expected a whole number": "write train.batch_size=16, for example",
        "train.warmup_ratio=1.5: expected less than 1": "write train.warmup_ratio=0.03, for example",
        "train.schedule=cosin: expected one of cosine, linear, constant, wsd": "did you mean cosine?",
        "train.packing=perhaps: expected true or false": "write train.packing=true or train.packing=false",
        "run.name=a b: a name is made of letters, digits, dots, dashes and underscores, "
        "beginning with a letter or digit": "write run.name=a-b",
        "cannot read 'train.seed=['": "quote values with special characters: train.seed='\"[\"'",
        "train.seed=1,2: several values make a sweep": "add -m to run once per value",
        "train.weight_decay: interpolation key 'zzz' not found": "write the value itself: no file of this run "
        "sets what it refers to",
        "'shwo' is neither a verb nor a choice": "did you mean show?",
    }
    assert {what: problem.remedy for what, problem in found.items()} == expected
    assert {problem.source for problem in found.values()} == {"command line"}


def test_every_mistake_of_a_recipe_is_told_with_its_line(here: Path) -> None:
    write(
        here / "mine.yaml",
        "defaults: [config, override /method: full, _self_]\n"
        "train:\n"
        "  batch_size: many\n"
        "  lr: 3e-4\n"
        "  weight_decay: ${nowhere.x}\n"
        "method:\n"
        "  rank: 8\n"
        "lora: {r: 16}\n",
    )
    found = problems_of("mine.yaml", "train.seed=x")
    assert {what: problem.source for what, problem in found.items()} == {
        "train.batch_size=many: expected a whole number": "mine.yaml:3",
        "unknown key train.lr": "mine.yaml:4",
        "train.weight_decay: interpolation key 'nowhere.x' not found": "mine.yaml:5",
        "method=full has no rank": "mine.yaml:7",
        "unknown key lora.r": "mine.yaml:8",
        "train.seed=x: expected a whole number": "command line",
    }


@pytest.mark.parametrize(
    ("words", "what", "remedy"),
    [
        (
            ("method=full", "method.rank=8"),
            "method=full has no rank",
            "method=lora, method=qlora4 and method=qlora8 have it",
        ),
        (
            ("method=lora", "method.peft_type=OFT"),
            "method=lora has no peft_type",
            "method=ia3, method=loha, method=lokr, method=oft and method=vera have it",
        ),
        (("objective=dpo", "objective.loss_on=all"), "objective=dpo has no loss_on", "objective=sft has it"),
        (
            ("objective=pretrain", "objective.experiment=-x"),
            "objective.experiment=-x: expected letters, digits and . _ -, with a letter or digit first",
            "write objective.experiment=x",
        ),
        (
            ("objective.code=objs:Fine",),
            "objective.code=objs:Fine: expected FILE.py:NAME, a Python file and a name in it",
            "write objective.code=objs.py:Fine",
        ),
        (("model=hub",), "model.id is missing", "write model.id=…"),
        (("data=file",), "data.path is missing", "name a file, such as data.path=my.jsonl"),
        (
            ("model=hub", "model.id=a/b", "model.num_heads=7", "model.num_kv_heads=2"),
            "model.num_heads=7 must be a multiple of",
            None,
        ),
        (("train.learning_rate=0",), "train.learning_rate=0: expected greater than 0", None),
        (("train.micro_batch_size=x",), "train.micro_batch_size=x: expected a whole number or auto", None),
        (("train.micro_batch_size=0",), "train.micro_batch_size=0: must be a whole number of at least 1", None),
        (("train.seed.x=1",), "train.seed={'x': 1}: expected a whole number", None),
        (("train=3",), "train=3: expected a mapping of keys", None),
        (("train.max_length=9999",), "train.max_length=9999 is beyond", "write train.max_length=8192 or less"),
        (
            ("eval.early_stopping_patience=2",),
            "eval.early_stopping_patience needs measurements",
            "add eval.every_steps=50, say",
        ),
        (("hw=cpu", "train.precision=fp16"), "train.precision=fp16 needs a GPU", "write train.precision=bf16, fp32"),
        (("train.precision=fp16",), "train.precision=fp16 needs a GPU", "write train.precision=bf16, fp32"),
        (("train.attention=flash_attention_2",), "train.attention=flash_attention_2 does not run on local", "write"),
        (("train.optimizer=paged_adamw", "hw=cpu"), "train.optimizer=paged_adamw needs a GPU", "write"),
        (("hw=cpu", "train.tf32=true"), "train.tf32=true needs a GPU", "write train.tf32=false"),
        (("hw=t4", "train.precision=fp32", "train.tf32=true"), "train.tf32=true: t4 has no TF32", "write train.tf32=f"),
        (("hw=h100", "train.tf32=true"), "train.tf32=true rounds products of fp32", "write train.precision=fp32"),
        (("hw=t4", "train.precision=bf16"), "train.precision=bf16: t4 has no bfloat16", "write train.precision=fp16"),
        (("method=freeze", "method.layers=last:31"), "method.layers=last:31: the model has 30 layers", "write last:2"),
        (("method=freeze", "method.layers=some"), "method.layers=some: 'some' names no layers", "write last:2"),
        (("method.init=pissa", "method.use_dora=true"), "method.init=pissa cannot be combined with", "set one"),
        (("hw=cpu", "hw.num_gpus=1"), "hw.num_gpus must be 0 where hw.accelerator is cpu", "choose hw=local"),
        (("~model",), "~model: a run has one model", "write model=NAME"),
        (("model@x=phi2",), "model@x=phi2: a run has one model", "write model=NAME"),
        (("~train.nope",), "unknown key train.nope", None),
        (("=3",), "cannot read '=3'", "write key=value"),
        (("train..seed=3",), "cannot read 'train..seed=3'", "write key=value"),
        (("data.path=~rows",), "cannot read 'data.path=~rows'", "quote values with special"),
        (("train.seed=${model.sede}",), "train.seed: interpolation key 'model.sede' not found", None),
        (
            ("train.learning_rate=${model.learning_rate_ful}",),
            "train.learning_rate: interpolation key",
            "did you mean ${model.learning_rate_full}?",
        ),
        (("hydra/launcher=joblib",), "hydra/launcher=joblib: it has no effect on a single run", "add -m to sweep"),
        (("hydra.run.dir=x",), "hydra.run.dir=x: this runner decides it itself", "leave it out"),
        (("data.subset=x",), "data.subset=x is of a data set on the Hub, and data=commands is none", "write data=hub"),
        (("data=file", "data.path=x", "data.id=a/b"), "data.id=a/b is of a data set on the Hub", "write data=hub"),
        (("data=gsm8k", "data.eval_path=x"), "data.eval_path=x is for data=file", "write data.eval_split=test"),
        (("data.revision=x",), "data.revision=x is of a data set on the Hub", "write data=hub"),
        (("data.split=x",), "data.split=x is of a data set on the Hub", "write data=hub"),
        (("data.eval_split=x",), "data.eval_split=x is of a data set on the Hub", "write data=hub"),
        (
            ("hydra.sweeper.params.x=1",),
            "hydra.sweeper.params.x=1: it has no effect on a single run",
            "add -m to sweep",
        ),
        (("data.eval_path=x",), "data.eval_path=x is for data=file", "write data.eval_fraction=0.1"),
        (("data.mix=weights",), "data.mix=weights mixes data.sources, and there are none", "leave it out"),
        (("recipe=smollm_quick",), "there is no recipe 'smollm_quick'", "did you mean recipe=smollm2_quick?"),
        (("recipes/smollm2_quik.yaml",), "there is no recipe", "did you mean recipe=smollm2_quick?"),
        (("nowhere.yaml",), "there is no recipe 'nowhere.yaml'", "python -m runner list recipes"),
        (("recipe=a,b",), "recipe=a,b: a sweep cannot go over recipes", "sweep over choices and values"),
        (("a.yaml", "recipe=b"), "a.yaml and b: a run starts from one file", "name one of them"),
        (("model=phi2", "show"), "'show' is not the first word", "python -m runner show"),
        (("mistral7b",), "'mistral7b' is neither a verb nor a choice", "did you mean model=mistral7b?"),
        (("smollm2_quick",), "'smollm2_quick' is neither", "did you mean recipe=smollm2_quick?"),
        (("train.seed",), "'train.seed' is neither", "did you mean train.seed=…?"),
    ],
)
def test_a_mistake_says_what_is_wrong_and_what_to_write(words: tuple[str, ...], what: str, remedy: str | None) -> None:
    problem = only_problem(*words)
    assert problem.what.startswith(what)
    if remedy:
        assert problem.remedy and problem.remedy.startswith(remedy)
    if not problem.what.endswith("is missing"):  # that nobody wrote
        assert problem.source == "command line"


@pytest.mark.parametrize(
    ("text", "what", "place", "remedy"),
    [
        ("defaults: [config, _self_]\ntrain:\n  seed: [1\n  x: 2\n", "broken YAML", "mine.yaml:4", None),
        ("defaults:\n  - config\n\t- x\n", "broken YAML", "mine.yaml:3", "indent with spaces: YAML takes no tabs"),
        (
            "defaults: [config]\ntrain:\n  seed: 1\n  seed: 2\n",
            "broken YAML: found duplicate key seed",
            "mine.yaml:4",
            None,
        ),
        (
            "defaults:\n  - config\n  - override /model: mistrl7b\n  - override /hw: h1000\n",
            "there is no model 'mistrl7b'",
            "mine.yaml:3",
            "did you mean model=mistral7b?",
        ),
        (
            "defaults:\n  - config\n  - override /modl: phi2\n",
            "there is no group 'modl'",
            "mine.yaml:3",
            "did you mean override /model?",
        ),
        (
            "defaults:\n  - config\n  - model: phi2\n",
            "model is chosen twice: in config and here",
            "mine.yaml:3",
            "write override /model: phi2",
        ),
        ("train: {seed: 3}\n", "mine.yaml builds on nothing", None, "begin it with: defaults: [config, _self_]"),
        ("", "mine.yaml is not a recipe", None, "begin it with: defaults: [config, _self_]"),
        ("- a\n", "mine.yaml is not a recipe", None, "begin it with: defaults: [config, _self_]"),
        ("defaults: [config]\ntrain:\n  seed: ${x\n", "train.seed: no viable alternative", "mine.yaml:3", None),
        (
            "defaults: [config, override /model: hub]\nmodel:\n  id: ???\n",
            "model.id is missing",
            "mine.yaml:3",
            "write model.id=…",
        ),
        ("defaults: [config, nope]\n", "there is no nope", "mine.yaml", None),
    ],
)
def test_a_recipe_that_cannot_be_read_names_its_line(
    here: Path, text: str, what: str, place: str | None, remedy: str | None
) -> None:
    write(here / "mine.yaml", text)
    first, *others = problems_of("mine.yaml", "lr=1").values()
    assert first.what.startswith(what)
    assert (first.source, first.remedy) == (place, remedy)
    assert others[-1].what == "unknown key lr"  # what was typed is judged all the same


@pytest.mark.parametrize("name", ["config.yaml", "mine.yml"])
def test_a_recipe_with_a_name_hydra_cannot_find_is_refused(here: Path, name: str) -> None:
    write(here / name, RECIPE)
    assert only_problem(name).what == f"a recipe cannot be called {name}"


def test_a_recipe_that_is_not_text_is_refused(here: Path) -> None:
    (here / "mine.yaml").write_bytes(b"defaults: [config]\nrun: {name: \xff\xfe}\n")
    assert only_problem("mine.yaml").what.startswith("a YAML file is not UTF-8")


def test_a_wrong_choice_hides_what_would_only_follow_from_it() -> None:
    found = problems_of("model=mistrl7b", "train.max_length=32768", "method=lorra", "method.layers=last:99")
    assert set(found) == {"there is no model 'mistrl7b'", "there is no method 'lorra'"}


def test_a_folder_that_is_not_there_is_told_with_the_rest(here: Path) -> None:
    found = problems_of("lr=1", config_dirs=(here / "nope",))
    assert set(found) == {f"--config-dir {here / 'nope'} is not a folder", "unknown key lr"}


# ── as Hydra composes ──────────────────────────────────────────────────────────────────────────

WORDS = [
    (),
    ("model=mistral7b", "method=qlora4", "hw=h100x3", "deepspeed=zero2"),
    ("train.learning_rate=1e-3", "hw.env.A='01'", "method.target_modules=[q_proj,v_proj]"),
    ("~train.learning_rate", "model=phi2"),
    ("objective=dpo", "data=file", "data.path=x.jsonl", "run.name=${model.name}"),
]


def _by_hydra(checked: Checked) -> tuple[object, dict[str, str]]:
    primary = primary_of(checked.request)
    with hydra_over(checked.request, primary) as hydra:
        config = hydra.compose_config(primary.name, checked.for_hydra, RunMode.RUN, with_log_configuration=False)
    choices = {key: value for key, value in config.hydra.runtime.choices.items() if not key.startswith("hydra/")}
    with open_dict(config):
        del config["hydra"]
    return OmegaConf.to_container(config), choices


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, *conf_files.recipes()])
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_files_are_merged_as_hydra_merges_them(
    recipe: str | None, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = check_request(Request(recipe, words))
    assert not checked.problems
    config, choices = _by_hydra(checked)
    monkeypatch.setattr("runner.config.hydra_compose.hydra_over", None)  # it is not asked
    mine, chosen = merge_config(checked, primary_of(checked.request))
    assert OmegaConf.to_container(mine) == config
    assert dict(chosen) == choices


@pytest.mark.parametrize(
    ("words", "recipe"),
    [(("hydra.sweeper.max_batch_size=2",), None), ((), "hydra: {sweeper: {max_batch_size: 2}}")],
    ids=["typed", "written"],
)
def test_what_is_for_hydra_is_left_to_it(here: Path, words: tuple[str, ...], recipe: str | None) -> None:
    write(here / "mine.yaml", f"defaults: [config, _self_]\n{recipe or ''}\n")
    checked = replace(
        check_request(Request("mine.yaml")), overrides=check_request(Request(overrides=words), sweeping=True).overrides
    )
    config, _ = merge_config(checked, primary_of(checked.request))
    assert config.hydra.sweeper.max_batch_size == 2


@pytest.mark.parametrize("file", [*CONF.rglob("*.yaml"), *RECIPES.glob("*.yaml")], ids=lambda file: file.stem)
def test_libyaml_reads_what_pyyaml_reads(file: Path) -> None:
    with file.open(encoding="utf-8") as stream:
        assert yaml_files.load(stream) == yaml.load(file.read_text("utf-8"), get_yaml_loader())
    with file.open(encoding="utf-8") as stream:
        lines = _lines(yaml_files.compose(stream))
    assert lines == _lines(yaml.compose(file.read_text("utf-8")))


def _lines(node: yaml.Node) -> list[int]:
    """Lines of the keys of a mapping, or of the items of a list."""
    return [(item[0] if isinstance(item, tuple) else item).start_mark.line for item in node.value]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3\nb: 010\nc: 12:30\nd: yes\ne: 2026-11-30\nf: .5e+1", [1e-3, 8, 750, True, "2026-11-30", 5.0]),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}", [{"b": 1}, {"b": 1, "d": 2}]),
        ("\ufeffa: ü\nb: |\n  two\n  lines\n", ["ü", "two\nlines\n"]),
        ("", None),
    ],
    ids=["numbers", "anchors", "texts", "empty"],
)
def test_libyaml_reads_values_as_omegaconf_does(text: str, value: list[object] | None) -> None:
    found = yaml_files.load(io.StringIO(text))
    assert found == yaml.load(text, get_yaml_loader())
    assert (found and list(found.values())) == value


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("a: 1\na: 2\n", "found duplicate key a", 1),
        ("a:\n\tb: 1\n", "found character '\\t' that cannot start any token", 1),
        ("a: [1\nb: 2\n", "expected ',' or ']', but got ':'", 1),
        ("a: 1\n---\nb: 2\n", "but found another document", 1),
        ("a: !!python/name:os.system\n", "could not determine a constructor for the tag", 0),
    ],
    ids=["twice", "tab", "bracket", "two documents", "python"],
)
def test_broken_yaml_is_told_in_pyyamls_words(text: str, what: str, line: int) -> None:
    with pytest.raises(yaml.MarkedYAMLError) as caught:
        yaml_files.load(io.StringIO(text))
    assert what in str(caught.value.problem)
    assert caught.value.problem_mark is not None
    assert caught.value.problem_mark.line == line


# ── where a value came from ────────────────────────────────────────────────────────────────────


def test_every_place_that_sets_a_key_is_found_in_its_line(here: Path) -> None:
    write(here / "mine.yaml", RECIPE)
    found = origins_of_key(Request("mine.yaml", ("train.learning_rate=1e-4",)), "train.learning_rate")
    assert [(p.place.rsplit(":")[0], p.value) for p in found] == [
        (str(CONF.relative_to(CONF.parent) / "method/qlora4.yaml"), "${model.learning_rate_adapter}"),
        ("mine.yaml", "3e-5"),
        ("command line", "1e-4"),
    ]
    for origin in found[:-1]:
        name, line = origin.place.split(":")
        file = here / name if (here / name).is_file() else CONF.parent / name
        assert file.read_text("utf-8").splitlines()[int(line) - 1].strip().startswith("learning_rate:")


def test_an_interpolation_is_followed_to_its_value() -> None:
    last = origins_of_key(Request(overrides=("model=phi2",)), "train.learning_rate")[-1]
    assert (last.key, last.value) == ("model.learning_rate_adapter", "2e-4")


# ── points of a sweep ──────────────────────────────────────────────────────────────────────────


def test_a_sweep_is_the_grid_of_its_values() -> None:
    found = read_sweep(Request(overrides=("method=full,lora", "train.seed=range(1,3)", "model=phi2"))).points
    assert [point.overrides for point in found] == [
        ("method=full", "++train.seed=1", "model=phi2"),
        ("method=full", "++train.seed=2", "model=phi2"),
        ("method=lora", "++train.seed=1", "model=phi2"),
        ("method=lora", "++train.seed=2", "model=phi2"),
    ]


def test_a_pattern_sweeps_over_the_choices_it_fits() -> None:
    found = read_sweep(Request(overrides=("method=glob(qlora*)",))).points
    assert [point.overrides for point in found] == [("method=qlora4",), ("method=qlora8",)]


def test_a_grid_does_not_choose_from_a_range() -> None:
    with pytest.raises(RequestError, match=r"learning_rate=interval\(1e-5,1e-3\): only a sweeper that searches"):
        read_sweep(Request(overrides=("train.learning_rate=interval(1e-5,1e-3)", "train.seed=3")))


def test_a_sweep_with_a_wrong_word_tells_all_that_is_wrong() -> None:
    with pytest.raises(RequestError) as caught:
        read_sweep(Request(overrides=("method=fulll,lorra", "method.rank=8", "train.seed=x")))
    assert [problem.what for problem in caught.value.problems] == [
        "there is no method 'fulll'",
        "train.seed=x: expected a whole number",
    ]


def test_a_spec_json_cannot_be_swept(here: Path) -> None:
    write(here / "spec.json", json.dumps(spec_of().model_dump(mode="json")))
    with pytest.raises(RequestError, match=r"a sweep cannot start from a resolved run"):
        read_sweep(Request(overrides=("train.seed=1,2",), spec_file=Path("spec.json")))


# ── a resolved run as YAML ─────────────────────────────────────────────────────────────────────

EACH = [
    *((f"{group}={name}",) for group in ("hw", "method", "deepspeed", "track") for name in conf_files.options(group)),
    *((f"model={name}",) for name in conf_files.options("model") if name != "hub" and "scratch" not in name),
    *((f"recipe={name}",) for name in conf_files.recipes()),
    ("objective=dpo", "data=hub", "data.id=a/b"),
    ("objective=kto", "data=hub", "data.id=a/b"),
    ("objective=orpo", "data=hub", "data.id=a/b"),
    ("objective=reward", "data=hub", "data.id=a/b"),
    ("objective=grpo", "data=hub", "data.id=a/b", "objective.rewards=[regex]", "objective.reward_regex='^{[0-9]: #'"),
    ("objective=pretrain", "data=python_docs"),
    ("hw=h100x3", "where=runpod", "where.max_usd=40"),
]  # fmt: skip


@pytest.mark.parametrize("words", EACH, ids=" ".join)
def test_what_show_prints_is_run_again_as_the_same_run(here: Path, words: tuple[str, ...]) -> None:
    shown = runner("show", *words)
    assert shown.exit_code == 0, shown.stderr
    write(here / "mine.yaml", shown.stdout)
    assert spec_of("mine.yaml") == spec_of("recipe=mine.yaml") == spec_of(*words)


TEXTS = ["1e-5", "2e5", "no", "on", "null", "~", "010", "0x1f", "12:30", "1_000", "2026-11-30", "???", "${model.id}",
         "$", "${", "a: b", "#a", " a", "a ", "'", '"', "- a", "*a", "&a", "!a", "%a", "@a", "=", "<<", "[a]", "{a: b}",
         "a\nb", "ä\u2028ö", "\t", ".inf", ".5", "True", "\\", "x" * 2000]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_yaml_as_it_was(here: Path, text: str) -> None:
    spec = spec_of("model=phi2", "data.path=rows.jsonl")
    spec = spec.model_copy(
        update={
            "data": spec.data.model_copy(update={"path": text, "add_tokens": [text]}),
            "hw": spec.hw.model_copy(update={"env": {"NAME": text}}),
        }
    )
    write(here / "mine.yaml", conf_files.dump_yaml(spec.model_dump(mode="json")))
    again = spec_json.load_spec(Path("mine.yaml"))
    assert (again.data.path, again.data.add_tokens, again.hw.env) == (text, [text], {"NAME": text})


@example("\x85")
@example("a\u2028b")
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_any_value_comes_back_from_yaml_as_it_was(value: Any) -> None:
    assert yaml.load(conf_files.dump_yaml({"key": value}), Loader=get_yaml_loader()) == {"key": value}


def test_a_resolved_run_is_changed_by_hand_and_by_words(here: Path) -> None:
    text = runner("show", "model=phi2", "method=lora", "hw=a100").stdout
    write(
        here / "config.yml", text.replace("learning_rate: 0.0002", "learning_rate: 3e-5")
    )  # no recipe may be called so
    spec = spec_of("config.yml", "train.max_steps=7", "hw.env.X=010")
    assert (spec.train.learning_rate, spec.train.max_steps, spec.hw.env) == (3e-5, 7, {"X": "010"})
    write(here / "mine.yaml", text.replace("rank: 16", "rnak: 16") + "hw_: {}\n")
    found = problems_of("mine.yaml", "method=full")
    assert found["unknown key method.rnak"].source.startswith("mine.yaml:")
    assert "method=full: mine.yaml is resolved, so a whole choice cannot be exchanged in it" in found


def test_a_recipe_that_sets_a_value_of_every_group_is_still_a_recipe(here: Path) -> None:
    values = "model: {}\nmethod: {rank: 4}\nhw: {num_cpus: 2}\ndata: {eval_fraction: 0.1}\n"
    write(
        here / "mine.yaml",
        f"defaults: [config, _self_]\n{values}objective: {{}}\ndeepspeed: {{}}\nwhere: {{}}\ntrack: {{}}\n",
    )
    assert spec_of("mine.yaml").method.rank == 4


def test_a_run_keeps_its_yaml_which_is_the_same_run(here: Path) -> None:
    spec = spec_of("model=phi2", "method=lora", "run.name=a")
    run = RunDir.create(spec)
    assert spec_of(str(run.path / "training.yaml")) == spec_of(str(run.spec_file)) == spec
