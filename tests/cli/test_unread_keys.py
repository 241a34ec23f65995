"""A key that a verb does not read is said to have no effect on it, and no other key is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from runner.cli.options import request_of
from runner.cloud.runpod import prices
from runner.config.compose import compose
from runner.config.schema_keys import _annotations
from runner.config.validation import validated
from runner.data.inspect.preview import preview
from runner.data.inspect.stats import stats
from runner.data.pretraining.sharder import make_shards
from runner.data.pretraining.workspace import workspace_of
from runner.errors import RunnerError
from runner.resolve import fit, plan_inputs
from runner.resolve.steps import resolve, with_facts
from runner.runs.unread_keys import verb_reads
from runner.spec import DataSpec, Pretrain, RunSpec
from tests.support import tiny_llama
from tests.support.front import here, laptop, runner, write

__all__ = ["here", "laptop"]  # fixtures
pytestmark = pytest.mark.usefixtures("here")

CALL = '[{"type": "function", "function": {"name": "f", "description": "g", "parameters": {}}}]'
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.reasoning_content or '' }} {{ m.content }}\n{% endfor %}{{ tools or '' }}"
)
ROWS: dict[str, list[dict[str, Any]]] = {
    "rows": [
        {
            "messages": [
                {"role": "user", "content": "a b c"},
                {"role": "assistant", "content": "d e", "weight": 0},
                {"role": "user", "content": "f"},
                {"role": "assistant", "content": "b c " * 40, "weight": 1},
            ]
        }
    ],
    "questions": [{"prompt": "a b", "completion": "b c d", "system": "kind", "thinking": "well", "tools": CALL}],
    "alpaca": [{"instruction": "a b", "input": "c", "output": "d e", "history": [["f", "g"]]}],
    "texts": [{"text": "a b c d e"}],
    "numbers": [{"input_ids": [1, 2, 3]}],
    "pairs": [{"prompt": "a b", "chosen": "b c", "rejected": "d"}],
    "labelled": [
        {"prompt": "a", "completion": "b c", "label": True},
        {"prompt": "a", "completion": "b", "label": False},
    ],
    "asked": [{"prompt": "a b", "answer": "b"}],
}
RUNS = (
    "model=llama3_8b method=qlora4 hw=rtx4090 where=runpod data.path=rows.jsonl",
    "model=llama3_8b method=qlora8 hw=h100 objective=dpo data.path=pairs.jsonl",
    "model=llama3_8b method=lora hw=h100x3 objective=kto data.path=labelled.jsonl deepspeed=zero3",
    "model=llama3_8b method=lora hw=h100 objective=grpo data.path=asked.jsonl train.batch_size=8",
    "model=llama3_8b method=lora hw=h100 objective=reward data.path=pairs.jsonl",
)
MORE = (
    "model=llama3_8b method=full hw=h100x8 deepspeed=zero3_offload data=ultrachat_200k train.save_every_steps=50",
    "model=llama3_8b method=full hw=h200 hw.num_gpus=8 deepspeed=zero3_offload where=runpod data=ultrachat_200k",
    "model=llama3_8b method=freeze hw=h100x3 deepspeed=zero2 data.path=alpaca.jsonl data.eval_path=questions.jsonl",
    "model=scratch_22m method=full hw=h100 objective=pretrain objective.experiment=made train.max_length=64 "
    "train.num_epochs=3e6 train.batch_size=1 data.path=texts.jsonl",
    "model=scratch_22m method=full hw=h100 objective=pretrain objective.experiment=new train.max_length=64 "
    "train.num_epochs=3e6 train.batch_size=1 data.path=texts.jsonl",
    "model=smollm2_135m method=lora hw=cpu data.path=questions.jsonl data.eval_fraction=0.2",
    "model=smollm2_135m method=full hw=cpu where=runpod data.path=alpaca.jsonl track=wandb eval.every_steps=2",
    "model=smollm2_135m method=lora hw=cpu data.path=numbers.jsonl train.max_length=16",
    "model=smollm2_135m method=lora hw=cpu data.path=rows.jsonl train.max_length=16 train.packing=false",
    "model=llama3_8b method=lora hw=h100 data.path=rows.jsonl train.max_length=16 train.packing=false",
    "model=smollm2_135m method=lora hw=cpu data.path=questions.jsonl data.chat_template=own.jinja",
    "model=hub model.id=tiny method=full hw=h100 train.max_length=64 data.path=rows.jsonl "
    "train.num_epochs=3e6 train.batch_size=1",
    "model=hub model.id=tiny method=full hw=h100 train.max_length=64 data.path=questions.jsonl "
    "data.chat_template=own.jinja",
    "model=llama3_8b method=lora hw=l4 data.path=wrong.jsonl data.on_error=skip",
    "model=llama3_8b method=lora hw=h100 objective=pretrain data.path=texts.jsonl where.max_usd=0.01",
)


ELSEWHERE = {"model.id", "model.package", "model.gguf_file", "model.revision"}
"""Name models, the others of which are not here."""
COUNT_ROWS = {
    "objective.experiment", "objective.root", "data.chat_template", "data.system_prompt", "train.seed",
}  # fmt: skip
"""Change the number of sequences in a plan of these rows, which `fit` rounds away."""


@pytest.fixture(autouse=True)
def files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every shape, of many lengths; shards; and a live price of every GPU."""
    monkeypatch.setenv("RUNNER_CACHE", str(here / "cache"))
    words = random.Random(3)
    for name, rows in ROWS.items():
        lines = [json.dumps(_varied(row, words)) for _ in range(30) for row in rows]
        write(here / f"{name}.jsonl", "\n".join(lines))
    write(here / "own.jinja", TEMPLATE)
    write(here / "wrong.jsonl", (here / "rows.jsonl").read_text() + '\n{"messages": 3}\n')
    objective = Pretrain(experiment="made")
    place = workspace_of(objective)
    assert place is not None
    make_shards(place, objective, DataSpec(path="texts.jsonl"), 42)
    monkeypatch.setattr(prices, "price", _priced)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, with its tokenizer."""
    return tiny_llama.base(tmp_path_factory.mktemp("tiny") / "tiny")


def _varied(value: Any, words: random.Random) -> Any:
    """The same row with other words, ever so many; roles and what is no text stay."""
    if isinstance(value, dict):
        return {key: inner if key == "role" else _varied(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [_varied(inner, words) for inner in value]
    return " ".join([value] * words.randint(1, 9)) if isinstance(value, str) and value != CALL else value


def _priced(gpu: str | None, cloud: str) -> prices.Price | None:
    return None if gpu is None or " L4" in gpu else prices.Price(len(gpu) / 10 + len(cloud), "a stand-in")


def planned(spec: RunSpec) -> str:
    ready, notes = resolve(spec, needed=True)
    own = [note for note in notes if " has no effect: " not in note]
    return json.dumps([plan_inputs.plan(ready, own).as_dict(), ready.model.title, ready.hw.title], default=str)


def fitted(spec: RunSpec) -> str:
    rows = fit.fit_rows(with_facts(spec, needed=True), dict.fromkeys(("model", "method", "hw", "data")), "usd")
    return json.dumps([asdict(row) for row in rows])


ANSWERS: dict[str, Any] = {
    "plan": planned,
    "fit": fitted,
    "data preview": lambda spec: json.dumps(preview(spec)),
    "data stats": lambda spec: json.dumps(stats(spec)),
}


def values(annotation: Any) -> list[Any]:
    """Some of what a key takes."""
    if annotation in (bool, int, float, str):
        some = {
            bool: [True, False],
            int: [1, 2, 7, 100],
            float: [0.01, 0.25, 3.0],
            str: ["zz", "0-3", "system", "texts.jsonl", "own.jinja"],
        }
        return some[annotation]
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is list:
        return [["zz"], [0.5], ["lm_head"], ["q_proj"], ["prompt"]]
    if get_origin(annotation) is dict:
        return [{"A": "zz"}, {"assistant": "user"}]
    return [value for inner in get_args(annotation) if inner is not type(None) for value in values(inner)]


def answers(
    verb: str, spec: RunSpec, only: Callable[[str], bool] = lambda key: True
) -> Iterator[tuple[str, Any, str | None]]:
    """Every key that a run of this kind has, with every other value it takes here, and what the verb says then; None
    where that is refused."""
    content = spec.model_dump()
    for key, kinds in _annotations().items():
        group, _, leaf = key.partition(".")
        if leaf in ("", "name") or leaf not in content[group] or not only(key):
            continue
        for value in [value for kind in kinds for value in values(kind) if value != content[group][leaf]]:
            try:
                changed = validated({**content, group: {**content[group], leaf: value}}, lambda key: None)
                yield key, value, ANSWERS[verb](changed)
            except RunnerError:  # such a value is told
                yield key, value, None


@pytest.mark.slow
@pytest.mark.parametrize("verb", ANSWERS)
@pytest.mark.parametrize("words", RUNS)
def test_what_is_said_to_have_no_effect_changes_nothing(verb: str, words: str) -> None:
    spec = compose(request_of(tuple(words.split()), ()))
    answer, tried = ANSWERS[verb](spec), set()
    for key, value, found in answers(verb, spec):
        if not verb_reads(verb, key) and found is not None:
            assert found == answer, f"{key}={value}"
            tried.add(key)
    assert len(tried) > 10


@pytest.mark.slow
@pytest.mark.parametrize("verb", ANSWERS)
def test_what_changes_nothing_is_said_to_have_no_effect(here: Path, verb: str, tiny: Path) -> None:
    """Every key, with every value, in every combination: where it never changes the answer it is named."""
    (here / "tiny").symlink_to(tiny)
    tried: set[str] = set()
    counts: set[str] = set()

    def undecided(key: str) -> bool:
        return key not in counts and verb_reads(verb, key)

    for words in (*RUNS, *MORE):
        if verb.startswith("data") and "ultrachat" in words:  # on the Hub
            continue
        spec = compose(request_of(tuple(words.split()), ()))
        answer = ANSWERS[verb](spec)
        for key, _, found in answers(verb, spec, only=undecided):
            tried |= {key} if found is not None else set()
            counts |= {key} if found != answer else set()
    silent = tried - counts - ELSEWHERE
    silent -= COUNT_ROWS if verb == "fit" else set()
    assert not silent, " ".join(sorted(silent))
    assert len(counts) > 20


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
