"""A finished run goes to the Hub whole: huggingface_hub itself, against a server that keeps what it is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from runner.errors import RunFailedError
from runner.hub.model_card import card_text
from runner.hub.upload import push_finished
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from tests.conftest import run_cli, spec_of
from tests.support.front import problems_of
from tests.support.hub import TOKEN, Hub, hub
from tests.support.processes import start, tiny_model, words

__all__ = ["hub"]

SUMMARY = {
    "train": {"loss_first": 4.6, "loss_last": 0.01, "steps": 294, "tokens": 69512, "trainable_parameters": 4884480},
    "eval": {
        "num_prompts": 40,
        "before": {"loss": 4.7, "num_exact": 0, "exact_match": 0.0},
        "after": {"loss": 0.01, "num_exact": 40, "exact_match": 1.0},
    },
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run, its adapter a few bytes."""
    done = RunDir.create(spec_of(f"run.output_dir={tmp_path / 'runs'}"))
    (done.path / "model").mkdir()
    (done.path / "model" / "adapter_model.safetensors").write_bytes(b"weights")
    (done.path / "model" / "adapter_config.json").write_text("{}", "utf-8")
    (done.path / "loss.png").write_bytes(b"picture")
    done.write("summary.json", {**SUMMARY, "model_dir": str(done.path / "model")})
    return done


def portable(run: RunDir) -> Any:
    """Its spec, but for the folder of this machine that the run lies in."""
    spec = run.read("spec.json")
    return {**spec, "run": {**spec["run"], "output_dir": "runs"}}


def push(run: RunDir, hub: Hub, *words: str, token: str = TOKEN) -> Any:
    return run_cli("push", str(run.path), *words, **hub.env(token), HF_HOME=str(run.path.parent / "hf"))


def test_weights_card_and_spec_go_in_one_commit_to_a_private_repository(run: RunDir, hub: Hub) -> None:
    done = push(run, hub, "me/tuned", "--json")
    assert done.returncode == 0, done.stderr
    (commit,) = hub.commits
    assert hub.repos["tuned"]["visibility"] == "private"
    assert commit["adapter_model.safetensors"] == b"weights" and commit["loss.png"] == b"picture"
    assert json.loads(commit["spec.json"]) == portable(run)
    assert json.loads(done.stdout)["files"] == sorted(commit)
    assert commit["README.md"].decode().startswith("---\nlibrary_name: peft")
    assert not any(TOKEN.encode() in content for content in commit.values())
    assert str(run.path).encode() not in b"".join(commit.values())  # where it was trained is nobody's business
    assert json.loads(commit["summary.json"]) == SUMMARY
    assert run.read("pushed.json")["repo"] == "me/tuned" and run.read("pushed.json")["folder"] == "model"


@pytest.mark.parametrize(
    ("words", "token", "status", "code", "said"),
    [
        (["me/tuned"], "hf_wrong", 200, 2, "the Hub does not accept the token"),
        (["me/tuned"], TOKEN, 403, 2, "may not write to me/tuned"),
        (["me/tuned"], TOKEN, 500, 1, "the Hub answered 500"),
        (["tuned"], TOKEN, 200, 2, "write ORG/NAME"),
        (["me/tuned", "--merged"], TOKEN, 200, 2, "python -m runner merge"),
    ],
)
def test_what_cannot_be_pushed_is_refused_in_words(
    run: RunDir, hub: Hub, words: list[str], token: str, status: int, code: int, said: str
) -> None:
    hub.status = status
    done = push(run, hub, *words, token=token)
    assert done.returncode == code
    assert said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached_is_told_in_words(run: RunDir, hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    done = push(run, hub, "me/tuned")
    assert done.returncode == 1
    assert "the Hub cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_the_card_says_what_the_hub_reads(run: RunDir) -> None:
    spec = spec_of("model=mistral7b", "method=qlora4", "hw=h100x3", "data=guanaco")
    text = card_text(spec, run, "me/tuned", adapter=True, picture=False)
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == spec.model.id and metadata["base_model_relation"] == "adapter"
    assert metadata["datasets"] == [spec.data.id]
    assert "| held-out prompts answered exactly | 0 of 40 | 40 |" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/tuned")' in text and "loss.png" not in text


# ── push.to ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_run_uploads_checkpoints_while_it_trains_and_its_model_at_its_end(tmp_path: Path, hub: Hub) -> None:
    own = words(tiny_model(tmp_path / "tiny"), tmp_path / "runs", "push.to=me/tuned", "push.every_steps=4")
    more = ("train.save_every_steps=2", "train.keep_checkpoints=1", "push.keep_checkpoints=2")
    process = start(*own, *more, **hub.env(), HF_HOME=str(tmp_path / "hf"))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0 and "Pushed  http" in said, said
    (run,) = map(RunDir, (tmp_path / "runs").iterdir())
    folders = {name.split("/")[1] for name in hub.files if name.startswith("checkpoints/")}
    assert folders == {"checkpoint-8", "checkpoint-12"}  # of 4, 8 and 12
    assert any("checkpoints/checkpoint-4/COMPLETE" in commit for commit in hub.commits)
    assert not list(run.path.glob(".pushing-*"))
    assert hub.files["README.md"].startswith(b"---") and json.loads(hub.files["spec.json"]) == portable_of(run)
    assert run.read("pushed.json")["folder"] == "model" and run.read("pushed.json")["repo"] == "me/tuned"
    # A run goes on from what is on the Hub.
    back = RunDir(tmp_path / "back")
    for name, content in hub.files.items():
        if name.startswith("checkpoints/"):
            file = back.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    assert checkpoints.newest(back) == 12


def portable_of(run: RunDir) -> Any:
    spec = portable(run)
    return {**spec, "model": {**spec["model"], "id": Path(spec["model"]["id"]).name}}


def test_a_place_that_may_not_be_written_to_is_refused_before_the_run(tmp_path: Path, hub: Hub) -> None:
    where = f"run.output_dir={tmp_path / 'runs'}"
    done = run_cli("push.to=me/tuned", where, **hub.env("hf_wrong"), HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 2 and "the Hub does not accept the token" in done.stderr, done.stderr
    hub.read_only = True
    done = run_cli("push.to=me/tuned", where, **hub.env(), HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 2 and "may not write to me/tuned" in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_whose_upload_fails_keeps_its_model_and_says_what_to_type(
    run: RunDir, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    run.write("spec.json", {**run.read("spec.json"), "push": {"to": "me/tuned"}})
    for name, value in hub.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    with pytest.raises(RunFailedError, match="was not uploaded") as error:
        push_finished(run)
    assert error.value.problems[-1].remedy == f"python -m runner push {run.path}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push.to=tuned"], "write push.to=ORG/NAME"),
        (["push.every_steps=4"], "add push.to=ORG/NAME"),
        (["push.to=me/tuned", "push.keep_checkpoints=3"], "add push.every_steps=100"),
        (["push.to=me/tuned", "push.every_steps=4"], "add train.save_every_steps=4"),
        (["push.to=me/tuned", "push.every_steps=5", "train.save_every_steps=2"], "add train.save_every_steps=5"),
        (["where=runpod", "where.push_to=me/tuned"], "did you mean push.to?"),
        (["hub_model_id=me/tuned"], "did you mean push.to?"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_with_what_to_write(words: list[str], said: str) -> None:
    assert any(said in str(problem.remedy) for problem in problems_of(*words).values())


def test_a_spec_of_before_is_read(run: RunDir) -> None:
    values = spec_of("where=runpod", "hw=rtx4090").model_dump(mode="json")
    values["where"]["push_to"] = None
    assert RunSpec.model_validate(values).push.to is None
