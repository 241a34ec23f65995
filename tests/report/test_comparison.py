"""`compare` shows the keys that differ and how each run came out, the best first, in every width."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from runner.report.comparison import ABSENT, compare
from runner.report.comparison_table import print_comparison
from runner.report.metric import direction
from runner.rundir.directory import RunDir
from tests.conftest import run_cli


def made(
    out: Path, name: str, spec: dict[str, Any], loss: float | None = None, state: str = "done", **summary: Any
) -> RunDir:
    """A run with a spec as given; with a summary where it has a held-out loss."""
    run = RunDir(out / name)
    run.path.mkdir(parents=True)
    own = {"metric": "eval.after.loss", "metric_mode": "min", "name": None}
    run.write("spec.json", {"run": own, "model": {"name": "tiny", "hidden_size": 8}, **spec})
    run.write("status.json", {"run_id": name, "state": state, "created": 1.0})
    lines = [json.dumps({"step": step, "loss": 3.0 - step / 4, "time": 1.0}) for step in (1, 2)]
    (run.path / "metrics.jsonl").write_text("\n".join(lines), "utf-8")
    if loss is not None:
        evaluated = {"num_prompts": 0, "before": {"loss": 2.0}, "after": {"loss": loss}}
        train = {"loss_first": 2.75, "loss_last": 2.5, "steps": 2, "tokens_per_second": 100.0}
        run.write("summary.json", {"state": "done", "seconds": 75.0, "eval": evaluated, "train": train, **summary})
    return run


def shown(runs: list[RunDir], width: int = 100, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(console, compare(runs), **options)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_only_keys_that_differ_are_told_and_the_best_run_is_first(tmp_path: Path) -> None:
    worse = made(tmp_path, "worse", {"train": {"learning_rate": 1e-4, "seed": 1, "packing": True}}, 1.5)
    better = made(tmp_path, "better", {"train": {"learning_rate": 2e-4, "seed": 1, "packing": 1}}, 1.25)
    failed = made(tmp_path, "failed", {"train": {"seed": 1, "packing": True}}, state="failed")
    found = compare([worse, failed, better])
    assert [result["run_id"] for result in found.results] == ["better", "worse", "failed"]
    assert found.differing == {"train.learning_rate": [2e-4, 1e-4, ABSENT], "train.packing": [1, True, True]}
    assert [result["metric"] for result in found.results] == [1.25, 1.5, None]
    assert found.results[2]["loss_last"] == 2.5 and found.results[2]["steps"] == 2  # of its metrics.jsonl
    assert found.as_dict()["differs"]["train.learning_rate"] == {
        found.results[0]["folder"]: 2e-4, found.results[1]["folder"]: 1e-4
    }  # fmt: skip


def test_the_metric_of_the_runs_says_what_is_better(tmp_path: Path) -> None:
    own = {"metric": "eval.after.score", "metric_mode": "max"}
    runs = [
        made(tmp_path, name, {"run": own}, eval={"after": {"score": score}}, loss=1.0)
        for name, score in (("low", 0.1), ("nan", float("nan")), ("high", 0.9))
    ]
    found = compare(runs)
    assert [result["run_id"] for result in found.results] == ["high", "low", "nan"] and found.mode == "max"
    assert compare(runs, "train.tokens_per_second").mode == "max" and direction("eval.after.loss") == "min"
    other = compare([runs[0], made(tmp_path, "other", {}, 1.0)])
    assert other.notes == ["sorted by eval.after.score; of other runs run.metric is eval.after.loss"]


def test_facts_that_follow_from_another_model_are_left_out_and_counted(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "a", {}, 1.0),
        made(tmp_path, "b", {"model": {"name": "large", "hidden_size": 16, "num_layers": 2}}, 2.0),
    ]
    lines = shown(runs)
    assert [line.split() for line in lines if line.startswith("model")] == [["model.name", "tiny", "large"]]
    assert "Note    2 facts of model that follow from model.name left out: --all shows them" in lines
    assert any(line.startswith("model.hidden_size") for line in shown(runs, every_key=True))


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_has_room_in_every_terminal(width: int, tmp_path: Path) -> None:
    specs = [
        {"train": {"learning_rate": rate}, "data": {"path": "/資料/文.jsonl"[: 4 + n]}}
        for n, rate in enumerate([1e-4, 2e-4])
    ]
    lines = shown([made(tmp_path, f"run{n}", spec, 1.0 + n) for n, spec in enumerate(specs)], width)
    text = "\n".join(lines)
    assert "0.0001" in text and "0.0002" in text and "1.0000" in text and "2.0000" in text
    assert ([n.split() for n in lines if n.startswith("train.l")] == [["train.learning_rate", "0.0001", "0.0002"]]) is (
        width > 60
    )


def test_the_command_refuses_what_it_cannot_compare_and_says_what_to_type(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made(tmp_path / "runs", name, {"train": {"seed": len(name) + ord(name[0])}}, 1.0)
    done = run_cli("compare", "one", "runs/two", "--json", cwd=tmp_path, code=0)
    assert json.loads(done.stdout)["differs"] == {"train.seed": {"runs/one": 114, "runs/two": 119}}
    assert "two runs, and this names 1" in run_cli("compare", "one", cwd=tmp_path, code=2).stderr
    wrong = run_cli("compare", "one", "runs/one", "twoo", cwd=tmp_path, code=2).stderr
    assert "named more than once" in wrong and "did you mean runs/two?" in wrong
    metric = run_cli("compare", "one", "two", "--metric", "loss", cwd=tmp_path, code=2).stderr
    assert "did you mean --metric eval.after.loss?" in metric


def test_damaged_runs_are_compared_as_far_as_they_can_be_read(tmp_path: Path) -> None:
    good = made(tmp_path, "good", {"train": {"seed": 1}}, 1.0)
    damaged = made(tmp_path, "bad", {"train": {"seed": 2}}, 2.0)
    (damaged.path / "spec.json").write_text("{", "utf-8")
    found = compare([good, damaged])
    assert found.differing == {} and found.notes == ["bad has no readable spec.json"]
