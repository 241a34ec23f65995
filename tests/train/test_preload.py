"""Loaded once for the runs of a sweep: where it is the same, to the last bit, and nowhere else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import model_loading, preload
from runner.train.objectives import objective_of
from tests.conftest import spec_of
from tests.support.processes import tiny_model, words

HERE = ("hw=cpu", "train.attention=eager", "deepspeed=none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("preload") / "model")


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    preload._loaded.clear()
    yield
    preload._loaded.clear()


def made(folder: Path, *overrides: str, digest: str = "a") -> tuple[RunSpec, RunDir]:
    run, spec = RunDir(folder), spec_of(*overrides)
    run.path.mkdir()
    run.write("spec.json", spec.model_dump(mode="json"))
    run.write("inputs.json", {"model.id": digest})
    return spec, run


def loaded_for(model: Path, out: Path, *more: str) -> tuple[RunSpec, RunDir]:
    spec, run = made(out / "first", *words(model, out, *HERE, *more))
    assert preload.prepare(run.spec_file), "threads that a fork would lose"
    return spec, run


def test_what_is_taken_is_what_a_run_would_load(model: Path, tmp_path: Path) -> None:
    spec, run = loaded_for(model, tmp_path)
    rows, weights = (preload.taken(part, spec, run) for part in (preload.ROWS, preload.WEIGHTS))
    assert rows is not None and rows.fingerprint == objective_of(spec).read().fingerprint
    own = model_loading.load_model(spec, str(model)).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.state_dict().items())
    assert preload.taken(preload.WEIGHTS, spec, run) is None, "a run that trains it leaves another model"


@pytest.mark.parametrize(
    ("overrides", "rows", "weights"),
    [
        (("train.learning_rate=3e-3", "method.rank=4", "train.max_steps=7"), True, True),
        (("train.seed=2",), False, True),  # holds other rows out
        (("data.max_examples=7",), False, True),
        (("train.precision=bf16",), True, False),
        (("train.attention=sdpa",), True, False),
        (("method=full",), True, False),  # its weights train: they would be in memory twice
        (("method=lora", "method.init=pissa"), True, False),
        (("method=qlora4",), True, False),
    ],
)
def test_only_equal_settings_share(
    overrides: tuple[str, ...], rows: bool, weights: bool, model: Path, tmp_path: Path
) -> None:
    loaded_for(model, tmp_path)
    spec, run = made(tmp_path / "second", *words(model, tmp_path, *HERE, *overrides))
    found = [preload.taken(part, spec, run) is not None for part in (preload.ROWS, preload.WEIGHTS)]
    assert found == [rows, weights]


def test_inputs_that_changed_are_loaded_again(model: Path, tmp_path: Path) -> None:
    loaded_for(model, tmp_path)
    spec, run = made(tmp_path / "second", *words(model, tmp_path, *HERE), digest="b")
    assert preload.taken(preload.WEIGHTS, spec, run) is None
    loaded_for(model, tmp_path / "second")
    before = dict(preload._loaded)
    preload.prepare(run.spec_file)
    assert all(preload._loaded[part][1] is not value for part, (_, value) in before.items())
    again = dict(preload._loaded)
    preload.prepare(run.spec_file)
    assert all(preload._loaded[part][1] is value for part, (_, value) in again.items())


def test_what_draws_a_random_number_is_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = model_loading.load_model

    def drawing(spec: RunSpec, source: str) -> object:
        random.random()
        return load(spec, source)

    monkeypatch.setattr(model_loading, "load_model", drawing)
    loaded_for(model, tmp_path)
    assert list(preload._loaded) == [preload.ROWS]


def test_what_cannot_be_loaded_is_left_to_the_run(model: Path, tmp_path: Path) -> None:
    spec, run = made(tmp_path / "first", *words(model, tmp_path, *HERE))
    values = json.loads(run.spec_file.read_text("utf-8"))
    values["model"]["id"] = str(tmp_path)
    run.write("spec.json", values)
    assert preload.prepare(run.spec_file)
    assert preload.WEIGHTS not in preload._loaded
    assert preload.taken(preload.WEIGHTS, spec, run) is None
