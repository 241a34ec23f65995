"""Every key of a run is read by the run, or is said to have no effect on it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner.cli.options import request_of
from runner.config.compose import Sources, compose
from runner.config.schema_keys import parts_of
from runner.report.progress import Progress
from runner.resolve.steps import resolve
from runner.rundir.launch_options import DEFAULT_OPTIONS
from runner.runs import launch
from runner.runs.content_checks import check_contents
from runner.runs.unread_keys import UNREAD, verb_reads
from runner.spec import RunSpec
from runner.spec.part import Part
from runner.spec.unused_keys import _candidates, _facts
from runner.train.tokens.fill_token_cache import fill_cache
from tests.conftest import train_here
from tests.support import preferences
from tests.train.test_pretraining import SMALL

GROUPS = {part: group for group, field in RunSpec.model_fields.items() for part in parts_of(field.annotation)}
ASKS = ("eval.num_prompts=2", "eval.max_new_tokens=3")
RUNS: dict[str, tuple[str, ...]] = {
    "sft lora": ("method=lora", "data.path=questions.jsonl", *ASKS),
    "sft full": ("method=full", "data.path=questions.jsonl"),
    "sft freeze": ("method=freeze", "method.layers=last:1", "data.path=questions.jsonl"),
    "dpo": ("method=lora", "objective=dpo"),
    "simpo": ("method=lora", "objective=dpo", "objective.loss=simpo"),
    "kto": ("method=full", "objective=kto"),
    "orpo": ("method=full", "objective=orpo"),
    "reward": ("method=lora", "objective=reward"),
    "grpo": (
        "method=lora", "objective=grpo", "data.path=questions.jsonl", "objective.num_generations=2",
        "objective.max_new_tokens=4", *ASKS,
    ),
    "text": ("method=full", "objective=pretrain", "data.path=text.txt"),
    "shards": ("objective.take=100", "eval.num_prompts=0"),
}  # fmt: skip
BESIDE = {
    "model.title", "model.learning_rate_full", "model.learning_rate_adapter", "hw.title", "hw.runpod_gpu_id", "hw.bf16",
    "train.hang_minutes", "run.report", "run.on_changed_inputs", "push.keep_checkpoints",
}  # fmt: skip
"""Read by whoever composes, shows, rents, watches or resumes the run."""
REFUSED = {
    "data.mix", "data.id", "data.revision", "data.subset", "data.split", "data.eval_split", "data.streaming",
    "deepspeed.nvme_path", "objective.precompute_reference",
}  # fmt: skip
"""Refused where nothing reads them: tests/config/test_compose.py, tests/spec/test_unused_keys.py."""


@contextmanager
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The keys that code of ours reads of a run meanwhile; rules of the schema itself do not count."""
    seen: set[str] = set()
    plain: Callable[[Any, str], Any] = Part.__getattribute__

    def read(part: Any, name: str) -> Any:
        if type(part) in GROUPS and name in type(part).model_fields and _by_the_run():
            seen.add(f"{GROUPS[type(part)]}.{name}")
        return plain(part, name)

    def _by_the_run() -> bool:
        frame = sys._getframe(2)
        while frame.f_back and _is_schema(frame.f_globals["__name__"], frame.f_code.co_name):
            if frame.f_code.co_name == "_parts_agree":
                return False
            frame = frame.f_back
        name = frame.f_globals["__name__"]
        return name.startswith("runner.") and name != "runner.spec.unused_keys"

    def _is_schema(module: str, function: str) -> bool:
        schema = module.startswith("runner.spec.") and module != "runner.spec.unused_keys"
        return schema or (module == __name__ and function == "read")

    with monkeypatch.context() as patch:
        patch.setattr(Part, "__getattribute__", read)
        yield seen


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With rows of every kind, and a cache that is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    pairs = list(preferences.pairs(60))
    (tmp_path / "text.txt").write_text("\n\n".join(f"{row['prompt']} {row['chosen']}" for row in pairs))
    questions = [{"prompt": row["prompt"], "completion": row["chosen"], "answer": row["chosen"]} for row in pairs]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return tmp_path


def words_of(folder: Path, name: str) -> tuple[str, ...]:
    """One step."""
    own = RUNS[name]
    words = [*SMALL, *own, f"run.output_dir={folder / 'runs'}"] if name == "shards" else preferences.words(folder, *own)
    return (*words, "train.max_steps=1")


@pytest.mark.parametrize("name", RUNS)
def test_every_key_is_read_by_the_run_or_said_to_have_no_effect(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(words_of(folder, name), ())
    composed = compose(request)
    with reading(monkeypatch) as seen:
        spec, notes = resolve(composed, Sources(request))
        launch.plan_or_refuse(spec, notes, composed)
        launch.check_launch(spec, notes, composed, DEFAULT_OPTIONS)
        train_here(spec)
    keys = {f"{group}.{key}" for group in RunSpec.model_fields for key in type(getattr(spec, group)).model_fields}
    said = {key for key, _ in (*_candidates(spec), *_facts(spec))}
    silent = {
        key for key in keys - seen - said - BESIDE - REFUSED if not key.endswith(".name") and verb_reads("run", key)
    }
    assert not silent, " ".join(sorted(silent))
    assert len(seen) > 80


def test_data_prepare_reads_what_it_does_not_say_to_have_no_effect(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    for name in RUNS:
        monkeypatch.setenv("RUNNER_CACHE", str(folder / name))
        spec = compose(request_of(words_of(folder, name), ()))
        with reading(monkeypatch) as found:
            check_contents(spec)
            fill_cache(spec, Progress(Console(file=io.StringIO())))
        seen |= found
    wrong = {key for key in seen if not key.endswith(".name") and not verb_reads("data prepare", key)}
    assert not wrong - set(UNREAD["data prepare"]), " ".join(sorted(wrong))
    keys = {f"{GROUPS[part]}.{key}" for part in GROUPS for key in part.model_fields}
    silent = {key for key in keys - seen - REFUSED if not key.endswith(".name") and verb_reads("data prepare", key)}
    assert not silent - {"where.volume", "objective.options"}, " ".join(sorted(silent))  # these of a class of one's own
