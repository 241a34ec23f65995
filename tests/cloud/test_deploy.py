"""An endpoint and its template come and go together: the official SDK against the emulated RunPod."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cloud.runpod import serverless
from runner.cloud.runpod import serverless as deploying
from runner.cloud.runpod.runpod_provider import RunPod
from runner.cloud.runpod.serverless import DeployOptions, Source
from runner.errors import CannotRunError, RunnerError
from runner.rundir.directory import RunDir
from tests.conftest import spec_of
from tests.support.emulated import Emulator
from tests.support.front import runner


def yes(what: str) -> bool:
    return True


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run whose adapter was pushed."""
    words = ("model=mistral7b", "method=qlora4", "method.rank=24", "hw=rtx4090")
    done = RunDir.create(spec_of(*words, f"run.output_dir={tmp_path / 'runs'}"))
    done.write("pushed.json", {"repo": "me/tuned", "commit": "0" * 40, "folder": "model"})
    return done


def test_an_adapter_is_served_beside_its_base_and_deleted_again(run: RunDir, emulator: Emulator) -> None:
    done = deploying.deploy(run.path, DeployOptions(secret="hf"), yes)
    (endpoint,), (template,) = RunPod().endpoints(), RunPod().templates()
    assert endpoint["id"] == done["endpoint"] and template["id"] == done["template"]
    assert endpoint["workers"]["min"] == 0 and endpoint["gpu"]["pools"] == ["AMPERE_24", "ADA_24"]
    env = template["env"]
    assert env["MODEL_NAME"] == spec_of("model=mistral7b", "hw=rtx4090").model.id and env["MAX_LORA_RANK"] == "32"
    assert json.loads(env["LORA_MODULES"])[0]["path"] == "me/tuned"
    assert env["HF_TOKEN"] == "{{ RUNPOD_SECRET_hf }}"  # a reference; the token itself goes nowhere
    with pytest.raises(RunnerError, match="already"):
        deploying.deploy(run.path, DeployOptions(), yes)
    assert len(deploying.delete(run.path)) == 2
    assert RunPod().endpoints() == [] and RunPod().templates() == []
    assert deploying.delete(run.path) == []


def test_a_lost_answer_is_looked_up_and_a_refusal_leaves_no_template(run: RunDir, emulator: Emulator) -> None:
    calls: list[str] = []

    def lost(name: str) -> Callable[[], str]:
        def make() -> str:
            from runner.cloud.provider_errors import UnclearError

            calls.append(name)
            RunPod().create_template({"name": name, "image": "x/y", "serverless": True})
            raise UnclearError("no answer")

        return make

    found = deploying._made(lost("runner-a"), RunPod().templates, "runner-a")
    assert calls == ["runner-a"] and [t["id"] for t in RunPod().templates()] == [found]
    RunPod().delete_template(found)
    with pytest.raises(RunnerError):
        deploying.deploy(run.path, DeployOptions(pools=("NO_SUCH_POOL",)), yes)
    assert RunPod().templates() == [] and RunPod().endpoints() == []


@pytest.mark.parametrize(
    ("model", "pools", "count"),
    [
        ("phi2", ["AMPERE_16"], 1),
        ("llama2_13b", ["AMPERE_48", "ADA_48_PRO"], 1),
        ("llama2_70b", ["HOPPER_141"], 2),
    ],
)
def test_the_smallest_gpus_that_hold_the_weights_are_taken(model: str, pools: list[str], count: int) -> None:
    gpus = serverless.gpus_for(spec_of(f"model={model}", "hw=h100").model)
    assert sorted(gpus.pools) == sorted(pools) and gpus.count == count


def test_what_a_worker_cannot_reach_is_refused_before_anything_is_made(run: RunDir, tmp_path: Path) -> None:
    (run.path / "pushed.json").unlink()
    with pytest.raises(RunnerError) as caught:
        deploying.deploy(run.path, DeployOptions(), yes)
    assert "python -m runner push" in str(caught.value.problems[0].remedy)
    with pytest.raises(RunnerError, match="not deployed"):
        deploying.deploy(run.path, DeployOptions(repo="me/tuned"), lambda what: False)
    demo = RunDir.create(spec_of(f"run.output_dir={tmp_path / 'runs'}"))
    with pytest.raises(RunnerError, match="cannot reach the base"):
        deploying.deploy(demo.path, DeployOptions(repo="me/tuned"), yes)
    assert not (run.path / deploying.RECORD).exists()


def test_a_whole_model_on_a_volume_is_named_by_its_path() -> None:
    model: Any = spec_of("model=mistral7b", "method=full", "hw=h100x3").model
    env = serverless.worker_variables(model, Source("/runpod-volume/runs/x/model", "vol"), "x", 4096, None)
    assert env == {
        "MAX_MODEL_LEN": "4096", "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "x", "MODEL_NAME": "/runpod-volume/runs/x/model",
    }  # fmt: skip
    unknown = model.model_copy(update={"num_parameters": None})
    with pytest.raises(CannotRunError):
        serverless.gpus_for(unknown)


@pytest.mark.usefixtures("state")
def test_delete_says_whether_something_was_deleted(run: RunDir, emulator: Emulator) -> None:
    made = deploying.deploy(run.path, DeployOptions(), yes)
    first, again = (runner("deploy", "--delete", str(run.path)).output for _ in range(2))
    assert first == f"Deleted: endpoint {made['endpoint']}, template {made['template']}\n"
    assert again == f"Nothing to delete: RunPod has no endpoint of {run.path}\n"
