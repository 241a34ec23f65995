"""A run is resumed on what it was trained on, wherever that lies now, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from runner.errors import RequestError
from runner.launcher import local
from runner.rundir import checkpoints
from runner.rundir.directory import Outcome, RunDir
from runner.runs import input_digests
from runner.runs.inputs import with_absolute_paths
from runner.runs.worker_tasks import report_changed_base
from runner.spec import RunSpec
from tests.conftest import run_cli, spec_of
from tests.support.front import runner, write
from tests.support.processes import only_run, words

ROWS = '{"prompt": "Q", "answer": "1"}\n' * 8
REWARD = "def score(completions, **_):\n    return [1.0 for _ in completions]\n"
TEMPLATE = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
GRPO = (
    "data=file", "data.path=rows.jsonl", "data.eval_path=held.jsonl", "data.chat_template=mine.jinja",
    "objective=grpo", "objective.rewards=[reward.py:score]", "train.batch_size=8", "train.micro_batch_size=8",
    "train.max_steps=4",
)  # fmt: skip


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """An interrupted run with a checkpoint after step 2, made by the front."""

    def execute(run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: object = None) -> Outcome:
        return Outcome(run, 0)

    monkeypatch.setattr(local, "execute", execute)
    for name, text in (("rows.jsonl", ROWS), ("held.jsonl", ROWS), ("reward.py", REWARD), ("mine.jinja", TEMPLATE)):
        write(here / name, text)
    result = runner(*GRPO)
    assert result.exit_code == 0, result.output
    found = only_run(here / "runs")
    assert found is not None
    interrupt(RunDir(found))
    return RunDir(found)


def interrupt(run: RunDir) -> None:
    """As a worker leaves it that was stopped after step 2."""
    folder = checkpoints.folder(run, 2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("w")
    checkpoints.seal(folder, {"step": 2})
    run.set_status("interrupted", exit_code=130, step=2)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rows.jsonl", "data.path"), ("held.jsonl", "data.eval_path"), ("mine.jinja", "data.chat_template"),
        ("reward.py", "objective.rewards.0"),
    ],
)  # fmt: skip
def test_what_has_changed_is_refused_unless_that_is_permitted(run: RunDir, here: Path, name: str, key: str) -> None:
    assert runner("resume", str(run.path)).exit_code == 0
    interrupt(run)
    before = run.spec_file.read_bytes()
    os.utime(here / name)  # touched, and the same
    assert runner("resume", str(run.path)).exit_code == 0
    interrupt(run)
    with (here / name).open("a") as file:
        file.write(ROWS if name.endswith("jsonl") else "\n")
    result = runner("resume", str(run.path))
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"{here / name} is not what the run has trained on until now ({key})" in said
    assert "run.on_changed_inputs=continue" in said
    assert run.spec_file.read_bytes() == before and run.read("status.json")["state"] == "interrupted"
    assert runner("resume", str(run.path), "run.on_changed_inputs=continue").exit_code == 0
    interrupt(run)
    assert runner("resume", str(run.path)).exit_code == 0  # it has trained on these now
    assert run.read("spec.json")["run"]["on_changed_inputs"] == "stop"
    with (here / name).open("a") as file:  # the permission was for one resume
        file.write("\n")
    interrupt(run)
    assert runner("resume", str(run.path)).exit_code == 2


@pytest.mark.parametrize("module", ["scoring.py", "lists/__init__.py", "lists/words.py", "late.py"])
def test_the_modules_of_a_reward_function_are_inputs_too(
    run: RunDir, here: Path, module: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(here / "reward.py", "import json\nfrom scoring import one\n" + REWARD)
    write(here / "scoring.py", "import lists.words\ndef one():\n    import late\n")
    for name in ("lists/__init__.py", "lists/words.py", "late.py", "other.py"):
        write(here / name, "\n")
    assert runner("resume", str(run.path), "run.on_changed_inputs=continue").exit_code == 0
    interrupt(run)
    write(here / "other.py", "changed = True\n")  # nobody imports it
    monkeypatch.chdir(tmp_path_factory.mktemp("away"))
    result = runner("resume", str(run.path))
    assert result.exit_code == 0, result.output
    interrupt(run)
    write(here / module, "import json\n")
    result = runner("resume", str(run.path))
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"{here / 'reward.py'} or a module it imports is not what the run has trained on until now" in said


def test_a_file_that_was_moved_and_is_the_same_is_fine(run: RunDir, here: Path) -> None:
    moved = here / "elsewhere" / "r.jsonl"
    moved.parent.mkdir()
    (here / "rows.jsonl").rename(moved)
    result = runner("resume", str(run.path))
    assert result.exit_code == 2 and "rows.jsonl does not exist (data.path)" in " ".join(result.output.split())
    assert runner("resume", str(run.path), "data.path=elsewhere/r.jsonl").exit_code == 0
    assert run.read("spec.json")["data"]["path"] == str(moved)
    interrupt(run)
    (here / "reward.py").rename(here / "elsewhere" / "mine.py")
    assert runner("resume", str(run.path), "objective.rewards=[elsewhere/mine.py:score]").exit_code == 0
    interrupt(run)
    other = here / "other.jsonl"
    other.write_text(ROWS * 2)
    result = runner("resume", str(run.path), "data.path=other.jsonl")
    assert result.exit_code == 2 and "cannot become" in result.output
    assert runner("resume", str(run.path), "data.path=other.jsonl", "run.on_changed_inputs=continue").exit_code == 0


def test_a_folder_that_is_read_as_the_hub_is_an_input(here: Path, run: RunDir) -> None:
    """`data.id=./rows`: absolute in spec.json, and compared; a pod gets it."""
    write(here / "rows" / "train.jsonl", ROWS)
    spec = with_absolute_paths(spec_of("data=hub", "data.id=rows", "hw=cpu"))
    assert spec.data.id == str(here / "rows")
    input_digests.record_digests(run, spec)
    assert input_digests.changed_inputs(run, spec) == []
    write(here / "rows" / "test.jsonl", ROWS)
    (problem,) = input_digests.changed_inputs(run, spec)
    assert (problem.source, problem.what) == (
        "data.id", f"{here / 'rows'} is not what the run has trained on until now",
    )  # fmt: skip


def test_a_permission_for_a_resume_that_failed_is_asked_for_again(
    run: RunDir, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: RunDir, spec: RunSpec, *, quiet_stdout: bool = False, launch_options: object = None) -> Outcome:
        run.set_status("failed", exit_code=1)
        return Outcome(run, 1)

    (here / "rows.jsonl").write_text(ROWS * 2)
    monkeypatch.setattr(local, "execute", fails)
    assert runner("resume", str(run.path), "run.on_changed_inputs=continue").exit_code == 1
    result = runner("resume", str(run.path))  # the checkpoint is that of the first rows
    assert result.exit_code == 2 and "is not what the run has trained on until now" in " ".join(result.output.split())


def test_a_run_is_resumed_and_repeated_from_any_folder(
    run: RunDir, here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("away"))
    result = runner("resume", str(run.path))
    assert result.exit_code == 0, result.output
    result = runner(str(run.spec_file))
    assert result.exit_code == 0, result.output
    spec = run.read("spec.json")
    assert spec["data"]["path"] == str(here / "rows.jsonl")
    assert spec["objective"]["rewards"] == [f"{here / 'reward.py'}:score"]


def test_without_a_checkpoint_the_run_begins_anew_on_what_is_there(run: RunDir, here: Path) -> None:
    shutil.rmtree(run.path / "checkpoints")
    (here / "rows.jsonl").write_text(ROWS * 2)
    assert runner("resume", str(run.path)).exit_code == 0


def test_what_opens_an_adapter_says_that_its_base_is_another_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of("method=lora", "hw=cpu")
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"id": str(here / "base"), "package": None})})
    run = RunDir.create(spec)
    base = here / "base"
    write(base / "model.safetensors", "weights")
    input_digests.record_digests(run, spec)
    write(run.path / "model" / "adapter_config.json", "{}")
    report_changed_base(run)
    assert capsys.readouterr().err == ""
    write(base / "model.safetensors", "others!")
    report_changed_base(run)
    assert f"{base}, the run's base, is not what the adapter was trained on" in capsys.readouterr().err
    base.rename(here / "moved")
    with pytest.raises(RequestError, match="the run's base, does not exist"):
        report_changed_base(run)


@pytest.mark.slow
def test_the_worker_compares_the_rows_and_the_tokenizer_themselves(model: Path, tmp_path: Path) -> None:
    """What no digest of a file shows: the Hub's rows, a URL's, a run of an earlier version."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}", "completion": f"{n}"}) + "\n" for n in range(40)))
    data = ("data=file", f"data.path={rows}", "train.max_steps=2", "train.save_every_steps=2")
    run_cli(*words(model, tmp_path), *data, code=0, OMP_NUM_THREADS="1")
    found = only_run(tmp_path)
    assert found is not None
    rows.write_text(rows.read_text().replace('"7"', '"8"'))
    (found / "inputs.json").unlink()
    again = run_cli("resume", str(found), "train.max_steps=3", OMP_NUM_THREADS="1")
    assert again.returncode == 2, again.stderr
    said = " ".join(again.stderr.split())
    assert "the rows are not those of the first 2 steps" in said and "run.on_changed_inputs=continue" in said
    assert "Traceback" not in said
    run_cli("resume", str(found), "train.max_steps=3", "run.on_changed_inputs=continue", code=0, OMP_NUM_THREADS="1")
