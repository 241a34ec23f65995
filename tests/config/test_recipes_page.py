"""The recipes of docs/recipes.md compose and plan as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.support.front import here, laptop, runner, spec_of

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here", "laptop")

PAGE = (ROOT / "docs" / "recipes.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"`(\w+\.yaml)`;.*?```yaml\n(.*?)```", PAGE, re.DOTALL))


def written(name: str, text: str) -> Path:
    Path("support.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}) + "\n"
    )
    Path("pairs.jsonl").write_text('{"prompt": "2+2?", "chosen": "4", "rejected": "5"}\n')
    Path("my.jsonl").write_text('{"prompt": "2+2?", "completion": "4"}\n')
    file = Path(name)
    file.write_text(text)
    return file


def test_there_are_three_complete_recipes_and_a_first_one() -> None:
    assert list(SECTIONS) == ["support.yaml", "hub.yaml", "prefer.yaml"]
    assert len(re.findall("```yaml", PAGE)) == 4


@pytest.mark.parametrize("name", SECTIONS)
def test_a_recipe_of_the_page_is_planned_as_it_stands(name: str) -> None:
    written(name, SECTIONS[name])
    spec = spec_of(name)
    content = yaml.safe_load(SECTIONS[name])
    for entry in content["defaults"]:
        if isinstance(entry, dict):
            ((group, choice),) = entry.items()
            assert getattr(spec, group.removeprefix("override /")).name == choice
    for group, values in content.items():
        if isinstance(values, dict):
            for key, value in values.items():
                assert getattr(getattr(spec, group), key) == value
    if spec.model.name != "hub":  # whose sizes are asked of the Hub
        planned = runner("plan", name, "--json")
        assert planned.exit_code in (0, 3), planned.stderr
        assert json.loads(planned.stdout)["peak_gib"]["expected"] > 0


def test_the_first_one_works_with_a_word_behind_it() -> None:
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert text
    written("mine.yaml", text[1])
    assert spec_of("mine.yaml", "train.learning_rate=1e-4").train.learning_rate == 1e-4
    assert spec_of("mine.yaml").model.name == "qwen3_0_6b"
