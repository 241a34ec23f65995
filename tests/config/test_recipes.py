"""Every recipe composes, is valid, and resolves: a new file in recipes/ is covered by being there."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config import conf_files
from runner.config.command_line import Request
from runner.machine import detect
from runner.paths import ASSETS, RECIPES
from runner.resolve.steps import resolved
from runner.spec import RunSpec
from tests.support.front import LAPTOP, laptop, spec_of

__all__ = ["laptop"]  # a fixture
pytestmark = pytest.mark.usefixtures("laptop")

RECIPE_NAMES = conf_files.recipes()
Shown = dict[str, tuple[RunSpec, list[str]]]


@pytest.fixture(scope="module")
def shown() -> Shown:
    """Every recipe as it resolves on a laptop, with its notes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "detect", lambda: LAPTOP)
        return {name: resolved(Request(name)) for name in RECIPE_NAMES}


def test_there_are_recipes() -> None:
    assert len(RECIPE_NAMES) >= 5


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_resolves_to_a_run(name: str, shown: Shown) -> None:
    spec, _ = shown[name]
    train = spec.train
    assert isinstance(train.micro_batch_size, int) and isinstance(train.accumulation_steps, int)
    assert train.micro_batch_size * train.accumulation_steps * spec.hw.world_size == train.batch_size
    assert spec.hw.world_size >= 1
    assert train.precision in ("bf16", "fp16", "fp32")
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_means_the_same_however_it_is_named(
    name: str, shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = shown[name]
    monkeypatch.chdir(tmp_path)
    assert spec_of(str(RECIPES / f"{name}.yaml")) == spec
    monkeypatch.chdir(ASSETS)
    assert spec_of(f"recipes/{name}.yaml") == spec


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_the_batch_of_a_recipe_divides_among_its_gpus(name: str, shown: Shown) -> None:
    assert [note for note in shown[name][1] if "rounded" in note] == []


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_is_named_as_its_file_and_says_what_it_is_for(name: str, shown: Shown) -> None:
    assert shown[name][0].run.name == name
    assert (RECIPES / f"{name}.yaml").read_text("utf-8").startswith("# ")


def test_the_command_line_still_beats_a_recipe() -> None:
    spec = spec_of("recipe=mistral7b_qlora4_h100x3", "hw=h100", "train.batch_size=24")
    assert (spec.model.name, spec.hw.num_gpus, spec.train.batch_size) == ("mistral7b", 1, 24)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_recipe_takes_the_same_steps_on_eight_gpus(name: str, shown: Shown) -> None:
    """It says the global batch alone: micro batch and accumulation follow from the hardware."""
    spec = spec_of(f"recipe={name}", "hw=a100x8")
    wanted = max(8, shown[name][0].train.batch_size)
    assert abs(spec.train.batch_size - wanted) <= 4  # the nearest multiple of eight
