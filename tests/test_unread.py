"""A key that a verb does not read is said to have no effect on it, and no other key is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from runner import planning
from runner.compose import compose
from runner.data.preview import preview
from runner.data.stats import stats
from runner.errors import RunnerError
from runner.problems import validated
from runner.resolve import complete
from runner.spec import RunSpec
from runner.suggest import _annotations
from runner.unread import reads
from runner.verbs.shared import request_of
from tests.front import here, laptop, runner, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]}\n'
PAIR = '{"prompt": "a", "chosen": "b c", "rejected": "d"}\n'
LABELLED = '{"prompt": "a", "completion": "b c", "label": true}\n{"prompt": "a", "completion": "b", "label": false}\n'
ROWS = {"rows": ROW, "pairs": PAIR, "labelled": LABELLED, "asked": '{"prompt": "a", "answer": "b"}\n'}
RUNS = (
    "model=llama3_8b method=qlora4 hw=rtx4090 where=runpod data.path=rows.jsonl",
    "model=llama3_8b method=qlora8 hw=h100 objective=dpo data.path=pairs.jsonl",
    "model=llama3_8b method=lora hw=h100x3 objective=kto data.path=labelled.jsonl deepspeed=zero3",
    "model=llama3_8b method=lora hw=h100 objective=grpo data.path=asked.jsonl train.batch_size=8",
    "model=llama3_8b method=lora hw=h100 objective=reward data.path=pairs.jsonl",
)


def planned(spec: RunSpec) -> str:
    return json.dumps(planning.plan(*complete(spec, needed=True)).as_dict(), default=str)


ANSWERS: dict[str, Any] = {
    "plan": planned,
    "data preview": lambda spec: json.dumps(preview(spec)),
    "data stats": lambda spec: json.dumps(stats(spec)),
}


def values(annotation: Any) -> list[Any]:
    """Some of what a key takes."""
    if annotation in (bool, int, float, str):
        return {bool: [True, False], int: [2, 7], float: [0.25, 3.0], str: ["zz"]}[annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is list:
        return [["zz"], [0.5]]
    return [value for inner in get_args(annotation) if inner is not type(None) for value in values(inner)]


@pytest.mark.parametrize("verb", ANSWERS)
@pytest.mark.parametrize("words", RUNS)
def test_what_is_said_to_have_no_effect_changes_nothing(here: Path, verb: str, words: str) -> None:
    for name, row in ROWS.items():
        write(here / f"{name}.jsonl", row * 30)
    spec = compose(request_of(tuple(words.split()), ()))
    answer, content, tried = ANSWERS[verb](spec), spec.model_dump(), set()
    for key, kinds in _annotations().items():
        group, _, leaf = key.partition(".")
        if reads(verb, key) or leaf in ("", "name") or leaf not in content[group] or group == "deepspeed":
            continue
        for value in values(kinds[0])[: 1 + (verb == "plan")]:
            try:
                changed = validated({**content, group: {**content[group], leaf: value}}, lambda key: None)
                assert ANSWERS[verb](changed) == answer, f"{key}={value}"
                tried.add(key)
            except RunnerError:  # such a value is told
                continue
    assert len(tried) > 10


@pytest.mark.parametrize(
    ("verb", "said", "counts"),
    [
        ("plan", "train.learning_rate=3e-4", "train.batch_size=16"),
        ("plan", "run.name=x", "train.max_steps=3"),
        ("fit", "method.alpha=3", "train.max_length=128"),
        ("doctor", "train.weight_decay=0.1", "train.batch_size=16"),
        ("data preview", "train.packing=false", "objective.loss_on=all"),
        ("data preview", "method=full", "data.system_prompt=x"),
        ("data stats", "hw.num_cpus=4", "train.max_length=128"),
    ],
)
def test_a_typed_key_without_effect_on_a_verb_is_said(verb: str, said: str, counts: str) -> None:
    more = ("model=llama3_8b", "method=lora", "hw=h100") if verb == "fit" else ()
    key, note = said.partition("=")[0], f"has no effect on {verb}"
    result = runner(*verb.split(), *more, said)
    output = " ".join((result.stdout + result.stderr).split())
    assert f"{key} {note}" in output, output
    assert "no effect on" not in runner(*verb.split(), *more, counts).output


def test_what_a_recipe_sets_is_not_said() -> None:
    assert "no effect" not in runner("plan", "recipe=smollm2_quick").output


def test_several_keys_make_one_sentence() -> None:
    note = "hw, train.learning_rate and train.seed have no effect on data preview"
    assert note in runner("data", "preview", "hw=cpu", "train.learning_rate=0.1", "train.seed=3", "--json").stderr
