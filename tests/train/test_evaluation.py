"""`eval` measures a finished run: the loss that training measured, other rows, and a benchmark without a network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from runner.errors import RequestError
from runner.runs.worker_tasks import EvaluateOptions, evaluate
from tests.conftest import run_cli
from tests.support import preferences

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{{{{right}}}}", "{{{{wrong}}}}"]
doc_to_target: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A supervised run on the polite answers."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences.pairs(80))
    file = preferences.write(folder / "answers.jsonl", rows)
    _, run = preferences.train(
        folder, "method=full", "train.packing=false", f"data.path={file}", "train.max_steps=40", "run.name=polite"
    )
    return folder, run


@pytest.mark.slow
def test_loss_benchmark_and_base_from_the_command_line(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, run = done
    data = preferences.write(
        tmp_path / "colours.jsonl",
        [
            {"question": row["prompt"], "right": f" {row['chosen']}", "wrong": " zebra quartz"}
            for row in preferences.pairs(6)
        ],
    )
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=data), "utf-8")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    words = ("eval", str(run.path), "--json")
    first = run_cli(*words, **offline)
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    after = run.read("summary.json")["eval"]["after"]
    assert found["held_out"]["loss"] == pytest.approx(after["loss"], rel=0.05)  # a mean of batches there
    assert found["held_out"]["perplexity"] == pytest.approx(math.exp(found["held_out"]["loss"]))
    assert run.read("eval.json") == found
    second = run_cli(
        *words, "--tasks", "colours", "--tasks-dir", str(tmp_path / "tasks"), "--data", str(folder / "answers.jsonl"),
        "--limit", "5", **offline,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    more = json.loads(second.stdout)
    assert more["tasks"]["colours"]["acc"] > 0.5 and more["held_out"]["rows"] == 5


def test_the_base_is_worse(done: tuple[Path, Any]) -> None:
    import argparse

    from runner.spec import RunSpec
    from runner.train.evaluation.finished_model import held_out
    from runner.train.open_model import load_finished

    run = done[1]
    spec = RunSpec.model_validate(run.read("spec.json"))
    options = argparse.Namespace(data=None, tasks=None, limit=None)
    tuned, base = (held_out(spec, *load_finished(spec, run, base=base), options) for base in (False, True))
    assert tuned["loss"] < 0.8 * base["loss"] and tuned["tokens"] == base["tokens"]


def test_what_cannot_be_measured_is_said(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, run = done
    with pytest.raises(RequestError, match="there is no nowhere"):
        evaluate(run.path, EvaluateOptions(data=Path("nowhere")), False)
    _, reward = preferences.train(folder, "objective=reward", "method=lora", "train.max_steps=1", "run.name=reward")
    with pytest.raises(RequestError, match="a reward model says nothing"):
        evaluate(reward.path, EvaluateOptions(), False)
