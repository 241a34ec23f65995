"""Misuses of the command line, of recipes and of a run's files that a stranger tried: refused in words, or done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.options import request_of
from runner.config import other_trainers_keys
from runner.config.compose import compose
from runner.config.schema_keys import allowed_words, known_keys, parts_of
from runner.config.spec_json import load_spec
from runner.config.validation import PATTERNS
from runner.errors import RequestError
from runner.rundir.directory import RunDir
from runner.runs.worker_tasks import produce_in_worker
from runner.spec import RunSpec
from tests.support.front import here, laptop, only_problem, problems_of, runner, write
from tests.support.front import spec_of as resolved

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

BASE = "defaults:\n  - config\n  - override /model: phi2\n  - _self_\n"
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


# --- a run's spec.json, edited by hand


@pytest.mark.parametrize("verb", ["chat", "eval", "merge", "export", "push"])
@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "spec.json is not JSON"), ('{"model": {"name": "x"}}', "is not a whole spec.json"), (None, "max_steps=two")],
)
def test_a_spec_json_that_somebody_has_edited_is_refused_by_every_verb(
    here: Path, verb: str, content: str | None, says: str
) -> None:
    spec = resolved("train.max_steps=2").model_dump(mode="json")
    spec["train"]["max_steps"] = "two"
    write(here / "runs/a/spec.json", json.dumps(spec) if content is None else content)
    write(here / "runs/a/model/model.safetensors", "")
    write(here / "runs/a/status.json", '{"state": "done"}')
    found = runner(verb, "runs/a", *(["org/name"] if verb == "push" else []), "--json")
    assert (found.exit_code, found.exception.__class__) == (2, SystemExit)
    assert says in json.loads(found.stdout)["problems"][0]["what"]


def test_a_spec_json_that_is_whole_is_the_run(here: Path) -> None:
    spec = resolved("train.max_steps=2")
    assert load_spec(write(here / "spec.json", json.dumps(spec.model_dump(mode="json")))) == spec


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        ({"zero_optimization": {"stage": 3}}, "x.json is a DeepSpeed config", "deepspeed=auto deepspeed.config=x.json"),
        ({"per_device_train_batch_size": 4, "num_train_epochs": 1}, "TrainingArguments", "train: {num_epochs: …}"),
        ({"peft_type": "LORA", "r": 8, "lora_alpha": 8}, "a config of another trainer", "method: {rank: …}"),
        ({"train": {"max_steps": 3}}, "not a whole spec.json: it has no model, method", "write a recipe"),
    ],
)
def test_another_json_file_is_told_for_what_it_is(here: Path, content: object, what: str, remedy: str) -> None:
    write(here / "x.json", json.dumps(content))
    problem = next(iter(problems_of("x.json").values()))
    assert what in problem.what and remedy in str(problem.remedy)


def test_a_run_in_the_working_directory_has_its_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "abc").mkdir()
    monkeypatch.chdir(here / "abc")
    assert RunDir(Path()).id == "abc"


# --- recipes


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"a": "defaults: [a, _self_]\n"}, "a.yaml builds on a, which is itself"),
        ({"a": "defaults: [b, _self_]\n", "b": "defaults: [a, _self_]\n"}, "b.yaml builds on a, which is built on it"),
        ({"a": "defaults: [b, _self_]\n", "b": "defaults: [b]\n"}, "b.yaml builds on b, which is itself"),
        (
            {"a": "defaults: [b, _self_]\n", "b": "defaults: [c]\n", "c": "defaults: [b]\n"},
            "a defaults list leads back to its own file, and would never end",
        ),
    ],
)
@pytest.mark.parametrize("words", [(), ("model.id=org/name",)])
def test_recipes_that_build_on_one_another_in_a_circle_are_refused(
    here: Path, files: dict[str, str], what: str, words: tuple[str, ...]
) -> None:
    for name, text in files.items():
        write(here / f"{name}.yaml", text)
    assert what in problems_of("a.yaml", *words)


def test_a_choice_that_builds_on_itself_is_refused(here: Path) -> None:
    write(here / "mine/model/a.yaml", "defaults: [a]\nname: a\nid: x/y\n")
    assert "leads back" in only_problem("model=a", config_dirs=(here / "mine",)).what


def test_a_recipe_named_as_the_shipped_one_it_builds_on_is_told_to_take_another_name(here: Path) -> None:
    write(here / "smollm2_quick.yaml", "defaults: [smollm2_quick, _self_]\n")
    assert only_problem("smollm2_quick.yaml").remedy == "call smollm2_quick.yaml another name"


@pytest.mark.parametrize(
    ("text", "what", "place", "remedy"),
    [
        (
            "defaults:\n  - config\n  - override /model: phi2\n  - override /model: mistral7b\n  - _self_\n",
            "model is chosen twice: phi2 in line 3, and mistral7b here", "a.yaml:4", "leave one of the two lines",
        ),
        (
            "defaults:\n  - _self_\n  - config\ntrain: {learning_rate: 5e-3}\n",
            "_self_ stands before config, which would overwrite what this file sets", "a.yaml:2", "write - _self_ last",
        ),
        (
            f"{BASE}hydra:\n  run: {{dir: /tmp/x}}\n",
            "hydra.run: this runner decides it itself", "a.yaml:6", "leave it out; run.output_dir is where runs go",
        ),
        (f"{BASE}train: []\n", "train: expected a mapping of keys, not a list", "a.yaml:5", "write train: {…}"),
        (f"{BASE}null: 2\n", "a key is empty", "a.yaml:5", "write key: value"),
    ],
)  # fmt: skip
def test_what_hydra_passes_over_in_a_recipe_is_refused(
    here: Path, text: str, what: str, place: str, remedy: str
) -> None:
    problem = only_problem(str(write(here / "a.yaml", text)))
    assert (problem.what, problem.source, problem.remedy) == (what, place, remedy)


def test_an_own_recipe_may_set_up_a_sweeper_and_leave_self_out(here: Path) -> None:
    write(here / "a.yaml", "defaults:\n  - config\ntrain: {max_steps: 3}\nhydra: {sweeper: {params: {}}}\n")
    assert resolved("a.yaml").train.max_steps == 3


def test_one_broken_file_among_ones_own_is_named_in_a_listing(here: Path) -> None:
    write(here / "mine/model/broken.yaml", "id: [\n")
    found = runner("list", "models", "--config-dir", "mine")
    assert (found.exit_code, "mine/model/broken.yaml:2" in found.stderr) == (2, True)


def test_a_folder_that_is_no_group_is_not_taken_for_one(here: Path) -> None:
    write(here / "mine/modle/q.yaml", "name: q\n")
    problem = only_problem("modle=q", config_dirs=(here / "mine",))
    assert (problem.what, problem.remedy) == ("there is no group 'modle'", "call the folder model, and write model=…")


# --- words


@pytest.mark.parametrize(
    ("word", "what", "remedy"),
    [
        ("~train.max_steps", "~train.max_steps: no file sets it, so that it has its default already", "leave it out"),
        ("~train.bacth_size", "unknown key train.bacth_size", "did you mean train.batch_size?"),
        ("~method.rank=8", "~method.rank: it is 16", "write ~method.rank"),
        ("+model=phi2", "+model=phi2: a run has one model", "write model=phi2"),
        ("train.foo=1", "unknown key train.foo", "docs/reference.md has every key of train"),
        ("train.learning_rate=null", "train.learning_rate=null: expected a number", None),
        ("train.seed=99999999999", "train.seed=99999999999: expected at most 4294967295",
         "write train.seed=4294967295, or less"),
        ("hw=4090", "there is no hw '4090'", "did you mean hw=rtx4090?"),
        ("hw=H100 80GB", "there is no hw 'H100 80GB'", "did you mean hw=h100?"),
        ("hw=4xH100", "there is no hw '4xH100'", "write hw=h100 hw.num_gpus=4"),
        ("hw=h100x5", "there is no hw 'h100x5'", "write hw=h100 hw.num_gpus=5"),
        ("hw=3xh100", "there is no hw '3xh100'", "write hw=h100x3"),
        ("hw=gpu", "there is no hw 'gpu'", "write hw=local"),
        ("model=llama3", "there is no model 'llama3'", "did you mean model=llama3_8b?"),
        ("model.id=${oc.env:NOT_SET_HERE}", "model.id: the environment variable NOT_SET_HERE is not set",
         "export NOT_SET_HERE=…, or give a default: ${oc.env:NOT_SET_HERE,…}"),
        ("method.target_modules=[q_projj]",
         "method.target_modules=[q_projj]: none of them is in smollm2_135m, and nothing would train", None),
        ("method.target_modules=[q_proj,foo,model.layers.0.mlp.w1]",
         "method.target_modules: smollm2_135m has no module foo, model.layers.0.mlp.w1",
         "choose among its linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj; or write "
         "all-linear"),
        ("method.target_modules=[]",
         "method.target_modules=[]: none of them is in smollm2_135m, and nothing would train", None),
        ("method.modules_to_save=[nope]",
         "method.modules_to_save: smollm2_135m has no module nope with weights", None),
    ],
)  # fmt: skip
def test_a_word_that_cannot_be_is_told_what_can(word: str, what: str, remedy: str | None) -> None:
    problem = only_problem(word)
    assert problem.what == what
    assert remedy is None or problem.remedy == remedy


@pytest.mark.parametrize(
    ("words", "what", "remedy"),
    [
        (["model=mixtral_8x7b", "method=lora", "method.target_modules=[down_proj]"],
         "method.target_modules: down_proj of mixtral_8x7b is no linear layer, but part of a mixture",
         "choose among its linear layers: k_proj, o_proj, q_proj, v_proj; or write all-linear"),
        (["model=mixtral_8x7b", "method=ia3"],
         "method.target_modules: down_proj of mixtral_8x7b is no linear layer, but part of a mixture",
         "write method.target_modules=[k_proj,v_proj], and write method.arguments.feedforward_modules=[], too"),
        (["model=phi2", "method=ia3", "method.target_modules=all-linear"],
         "method.arguments.feedforward_modules: phi2 has no linear layer down_proj",
         "write method.arguments.feedforward_modules=[fc2]"),
        (["method=oft", "method.arguments.oft_block_size=0", "method.arguments.r=576"],
         "method.arguments: q_proj of smollm2_135m would have 0 parameters",
         "change method.arguments.oft_block_size=0 or method.arguments.r=576"),
        (["model=phi2", "method=freeze", "method.extra_modules=[nope]"],
         "method.extra_modules: phi2 has no module nope with weights outside its layers",
         "it has embed_tokens, final_layernorm, lm_head"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_modules_are_those_of_the_model(words: list[str], what: str, remedy: str) -> None:
    problem = only_problem(*words)
    assert (problem.what, problem.remedy) == (what, remedy)


@pytest.mark.parametrize("remedy", ["model=phi2", "~method.rank", "hw=h100 hw.num_gpus=4", "hw=local"])
def test_those_remedies_can_be_typed(remedy: str) -> None:
    assert resolved(*remedy.split())


@pytest.mark.parametrize("value", ["dö.jsonl", "~/rows.jsonl", "Ordner ä/漢字.jsonl"])
def test_letters_of_every_language_and_the_home_folder_need_no_quotes(
    here: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("HOME", str(here))
    write(Path(value).expanduser(), CHAT)
    assert resolved(f"data.path={value}").data.model_dump()["path"] == value


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("rec", "rec is no recipe: the name of one ends in .yaml", "call it rec.yaml, if it is a recipe"),
        ("./rec", "./rec is no recipe: the name of one ends in .yaml", "call it rec.yaml, if it is a recipe"),
        ("REC.YAML", "REC.YAML is no recipe: the name of one ends in .yaml", "call it REC.yaml, if it is a recipe"),
        ("rows.jsonl", "rows.jsonl holds rows, and no recipe", "write data.path=rows.jsonl"),
    ],
)
def test_a_file_that_is_there_is_not_said_to_be_missing(here: Path, name: str, what: str, remedy: str) -> None:
    write(here / name, BASE)
    problem = only_problem(name)
    assert (problem.what, problem.remedy) == (what, remedy)


def test_a_folder_that_is_there_is_not_said_to_be_missing(here: Path) -> None:
    (here / "mine").mkdir()
    assert only_problem("./mine").what == "./mine is a folder without a spec.json"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan --learning_rate 1e-4", "Keys have no dashes: train.learning_rate=1e-4"),
        ("plan --train.max_steps=3", "Keys have no dashes: train.max_steps=3"),
        ("plan --model phi2", "Keys have no dashes: model=phi2"),
        ("--num-train-epochs 3", "Keys have no dashes: train.num_epochs=3"),
        ("--resume_from_checkpoint runs/x", "Leave it out: python -m runner resume RUN continues from its last"),
        ("--dry-run", "Leave it out: the verb plan predicts memory, time and cost of a run, and starts nothing."),
        ("table --plot t.png", "It is an option of plan and data stats."),
        ("plan --out there", "It is an option of merge and export."),
        ("plan --frobnicate", "No such option '--frobnicate'."),
        ("explain", "Missing argument 'KEY'."),
        ("data nope", "No such command 'nope'."),
    ],
)
def test_an_option_that_is_none_is_told_and_also_in_json(words: str, says: str) -> None:
    found = runner(*words.split())
    assert (found.exit_code, found.stdout) == (2, "") and says in found.stderr
    found = runner(*words.split(), "--json")
    assert found.exit_code == 2 and says in json.loads(found.stdout)["problems"][0]["what"]


@pytest.mark.parametrize(
    "words",
    [
        "train.gradient_checkpointing=-2",
        "train.micro_batch_size=0",
        "train.accumulation_steps=-1",
        "objective.beta=-1 objective=dpo data.path=rows.jsonl",
        "where.volume_gb=0 where=runpod",
        "where.deadline_hours=1e5 where=runpod",
    ],
)
def test_a_number_out_of_bounds_is_told_what_to_write(here: Path, words: str) -> None:
    word, *others = words.split()
    assert only_problem(word, *others).remedy == f"write {word.partition('=')[0]}=auto"


@pytest.mark.parametrize("word", ["--runpod", "--train", "--evaluate"])
def test_a_group_of_keys_is_not_told_in_place_of_an_option(word: str) -> None:
    """`run=…` would be refused in its turn."""
    assert "Keys have" not in runner(word, "3").stderr


def test_an_option_of_a_verb_without_keys_stays_one() -> None:
    assert "Keys have" not in runner("runs", "--model", "phi2").stderr


def test_explain_says_that_the_key_comes_first() -> None:
    found = runner("explain", "train.max_steps=3")
    assert found.exit_code == 2 and "runner explain train.max_steps train.max_steps=3" in found.stderr
    assert runner("explain", "train.max_steps", "train.max_steps=3").exit_code == 0


def test_explain_of_an_empty_mapping_says_so() -> None:
    assert runner("explain", "hw.env").stdout.startswith("hw.env = {}")


def test_explain_of_a_group_cuts_nothing_off_at_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = runner("explain", "model").stdout
    assert "…" not in told and "yaml:" in told and "model.learning_rate_adapter" in told


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_terminal_of_no_width_gets_its_answer(here: Path, columns: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runner", "list"], env={"COLUMNS": columns, "PATH": ""}, capture_output=True, text=True
    )
    assert "smollm2_135m" in done.stdout


# --- sweeps


def test_a_range_that_holds_nothing_is_refused() -> None:
    found = runner("-m", "train.max_steps=range(3,1)")
    assert (found.exit_code, found.exception.__class__) == (2, SystemExit)
    assert "holds none" in found.stderr


def test_a_sweeper_that_is_not_installed_is_told_how() -> None:
    found = runner("-m", "hydra/sweeper=optuna", "train.max_steps=1,2")
    assert found.exit_code == 2 and "pip install hydra-optuna-sweeper" in found.stderr


def test_the_rest_of_a_spec_is_still_told_key_by_key(here: Path) -> None:
    spec = resolved().model_dump(mode="json")
    spec["train"] |= {"max_steps": "two", "foo": 1}
    with pytest.raises(RequestError) as caught:
        load_spec(write(here / "spec.json", json.dumps(spec)))
    assert {p.what for p in caught.value.problems} == {
        "train.max_steps=two: expected a whole number", "unknown key train.foo",
    }  # fmt: skip


# --- remedies that can be typed where they are given


@pytest.mark.parametrize("verb", ["plan", "fit", "show", "doctor", "data preview"])
def test_several_values_are_no_sweep_for_a_verb_that_takes_no_m(verb: str) -> None:
    found = runner(*verb.split(), "method=lora,full", "--json")
    (problem,) = json.loads(found.stdout)["problems"]
    assert (found.exit_code, problem["remedy"]) == (2, "name one value")
    assert only_problem("method=lora,full").remedy == "add -m to run once per value"


def test_a_run_in_a_folder_with_a_space_is_quoted_in_what_to_type(here: Path) -> None:
    write(here / "my runs/a/spec.json", json.dumps(resolved().model_dump(mode="json")))
    write(here / "my runs/a/status.json", '{"state": "done"}')
    write(here / "my runs/a/summary.json", '{"trained": 1}')
    (here / "my runs/a/model").mkdir()
    assert "push 'my runs/a' org/name" in runner("push", "my runs/a").stderr
    assert "runs --output-dir 'my runs' lists them" in runner("resume", "my runs/b").stderr


def test_a_folder_that_is_not_there_is_not_said_to_be_no_run(here: Path) -> None:
    assert "runs/b does not exist" in runner("resume", "runs/b").stderr
    (here / "runs/b").mkdir(parents=True)
    assert "runs/b is no run: it has no spec.json" in runner("resume", "runs/b").stderr


def test_a_place_that_cannot_be_written_to_is_found_before_anything_is_loaded() -> None:
    with pytest.raises(RequestError, match="/proc cannot be written to"):
        produce_in_worker("export", RunDir(Path("a")), Path("/proc/x"))


def test_json_as_show_prints_it_is_run_again(here: Path) -> None:
    assert resolved(str(write(here / "a.json", runner("show", "model=phi2", "--json").stdout))).model.name == "phi2"


def test_the_answer_of_plan_is_no_spec(here: Path) -> None:
    write(here / "plan.json", runner("plan", "--json").stdout)
    assert "not a whole spec.json: it has no model, method" in next(iter(problems_of("plan.json")))


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("train:\n\tmax_steps: 3\n", "indent with spaces: YAML takes no tabs"),
        ("---\ntrain: {max_steps: 3}\n---\ntrain: {}\n", "leave one document: without the second ---"),
    ],
)
def test_broken_yaml_is_told_how_to_mend_it(here: Path, text: str, remedy: str) -> None:
    assert only_problem(str(write(here / "a.yaml", text))).remedy == remedy


def test_a_file_is_no_folder_of_runs(here: Path) -> None:
    write(here / "runs", "")
    assert runner("runs").exit_code == 2


def test_the_module_of_the_command_line_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "runner.cli.main", "list"], capture_output=True, text=True)
    assert "smollm2_135m" in done.stdout


@pytest.mark.parametrize(
    ("word", "what", "remedy"),
    [
        ("objective.code=objs.py", "expected FILE.py:NAME", "write objective.code=objs.py:NAME"),
        ("objective.code=objs:Fine", "expected FILE.py:NAME", "write objective.code=objs.py:Fine"),
        ("track.code=lines.py:Lines", "a tracker of your own alone", "name: own and code: FILE.py:CLASS"),
        ("track.name=own", "another tracker", "name: own and code: FILE.py:CLASS"),
        ("method.name=foo", "another method", "leave it out: run.name names a run"),
    ],
)
@pytest.mark.usefixtures("here")
def test_the_form_of_a_text_and_where_it_belongs_are_said(word: str, what: str, remedy: str) -> None:
    problems = list(problems_of(word).values())
    assert any(what in problem.what and remedy in str(problem.remedy) for problem in problems), problems


def test_every_pattern_of_the_schema_has_words() -> None:
    parts, patterns = [RunSpec], set()
    for part in parts:  # grows
        for field in part.model_fields.values():
            parts += [inner for inner in parts_of(field.annotation) if inner not in parts]
            patterns |= {one.pattern for one in field.metadata if getattr(one, "pattern", None)}
    assert patterns and patterns <= PATTERNS.keys()


@pytest.mark.parametrize(
    ("group", "text", "remedy"),
    [
        ("method", "peft_type: HRA\narguments: {r: 4}\ntrainable: r * inputs\n", "write name: mine into it"),
        ("track", "code: lines.py:Lines\n", "write name: own into it"),
        ("method", "name: My-Own\npeft_type: HRA\ntrainable: inputs\n", "write name: my_own into the file"),
    ],
)
def test_a_file_of_ones_own_without_a_right_name_is_told_the_line(
    here: Path, group: str, text: str, remedy: str
) -> None:
    write(here / "own" / group / "mine.yaml", text)
    assert remedy in str(only_problem(f"{group}=mine", config_dirs=(here / "own",)).remedy)


@pytest.mark.usefixtures("here")
def test_explain_of_a_name_that_a_mapping_lacks_says_which_it_has() -> None:
    said = " ".join(runner("explain", "method.arguments.nope", "method=oft").stderr.split())
    assert "method.arguments.nope is not set" in said and "method.arguments has oft_block_size here" in said


# --- values that Python takes for others


@pytest.mark.parametrize(
    "key", ["train.batch_size", "train.micro_batch_size", "where.max_usd", "method.rank", "eval.num_prompts"]
)
def test_a_truth_value_is_no_number(here: Path, key: str) -> None:
    assert only_problem(f"{key}=true").what.startswith(f"{key}=true: expected a ")
    group, leaf = key.split(".")
    write(here / "mine.yaml", f"defaults: [config, _self_]\n{group}:\n  {leaf}: yes\n")
    problem = only_problem("recipe=mine.yaml")
    assert problem.what.startswith(f"{key}=true: expected a ") and "mine.yaml:3" in str(problem.source)


@pytest.mark.parametrize("key", ["data.path", "run.output_dir", "model.id", "where.volume", "data.chat_template"])
def test_an_empty_text_as_of_a_variable_that_is_not_set_is_refused(key: str) -> None:
    problem = only_problem(f"{key}=", "where=runpod" if key.startswith("where") else "method=lora")
    assert problem.what == f"{key} is empty" and str(problem.remedy).startswith("leave it out")


def test_texts_that_may_be_empty_are() -> None:
    assert resolved("data.system_prompt=").data.system_prompt == ""


@pytest.mark.parametrize("verb", ["plan", "fit", "show", "doctor"])
def test_a_word_that_a_later_one_takes_back_is_named(verb: str) -> None:
    words = ("model=smollm2_135m", "method=lora", "hw=cpu", "data=commands")
    said = " ".join(runner(verb, *words, "method=full", "train.max_steps=3", "train.max_steps=5").output.split())
    assert "method=lora has no effect: method=full comes after it" in said
    assert "train.max_steps=3 has no effect: train.max_steps=5 comes after it" in said
    assert "model=smollm2_135m has no effect" not in said


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("model=phi2 method=lora", "without quotes they are words of their own: model=phi2 method=lora"),
        ("model=phi2,", "write model=phi2"),
        ("model==phi2", "write model=phi2"),
        ("model:phi2", "did you mean model=phi2?"),
        ("train.max_steps:5", "did you mean train.max_steps=5?"),
    ],
)
def test_a_word_with_wrong_marks_is_told_the_right_one(word: str, remedy: str) -> None:
    assert only_problem(word).remedy == remedy
    typed = remedy.rpartition(": ")[2].removeprefix("write ").removeprefix("did you mean ").rstrip("?")
    assert resolved(*typed.split()).model.name in ("phi2", "smollm2_135m")


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("hydra.sweeper.params.train.max_steps=1,2", "write train.max_steps=1,2"),
        ("hydra/launcher=basic,joblib", "name one value"),
    ],
)
def test_a_sweep_over_hydras_own_keys_is_told_what_to_write(word: str, remedy: str) -> None:
    found = runner("-m", word, "train.max_steps=1,2")
    assert found.exit_code == 2 and f"→ {remedy}" in " ".join(found.stderr.split())


@pytest.mark.parametrize(("group", "name"), other_trainers_keys.CHOICES)
def test_a_choice_of_another_trainers_is_told_in_our_words(group: str, name: str) -> None:
    remedy = str(only_problem(f"{group}={name}").remedy)
    assert remedy == f"write {other_trainers_keys.CHOICES[group, name]}"
    more = ("data.path=pairs.jsonl",) if group == "objective" else ()
    assert compose(request_of((*remedy.removeprefix("write ").split(), *more), ()))


def test_a_value_of_another_trainers_is_told_in_our_words() -> None:
    keys = [key for key in known_keys() if allowed_words(key)]
    for theirs, ours in other_trainers_keys.VALUES.items():
        key = next(key for key in keys if ours in allowed_words(key))
        assert only_problem(f"{key}={theirs}").remedy == f"did you mean {ours}?", theirs
