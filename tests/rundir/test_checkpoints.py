"""A checkpoint is whole, or it does not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from tests.support.processes import tiny_model


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Checkpoints after steps 5, 10 and 15, all sealed."""
    directory = RunDir(tmp_path)
    for step in (5, 10, 15):
        folder = checkpoints.folder(directory, step)
        (folder / "global_step").mkdir(parents=True)
        (folder / "adapter.bin").write_bytes(bytes(range(256)) * step)
        (folder / "global_step" / "shard.pt").write_bytes(b"shard" * step)
        checkpoints.seal(folder, {"step": step, "processes": 2})
    return directory


def test_the_newest_whole_one_is_taken(run: RunDir) -> None:
    assert checkpoints.complete(run) == [5, 10, 15]
    assert checkpoints.newest(run) == 15
    assert checkpoints.facts(checkpoints.folder(run, 15))["processes"] == 2


@pytest.mark.parametrize("name", ["adapter.bin", "global_step/shard.pt"])
def test_a_changed_byte_and_a_missing_one_are_found(run: RunDir, name: str) -> None:
    file = checkpoints.folder(run, 15) / name
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    assert checkpoints.newest(run, said.append) == 10
    assert said == [f"checkpoint 15 is damaged ({name} has changed since it was written): passed over"]
    assert checkpoints.damage(file.parents[name.count("/")], content=False) == []
    file.write_bytes(content[:-1])
    assert checkpoints.newest(run, said.append) == 10
    assert said[1].startswith(f"checkpoint 15 is damaged ({name} has {len(content) - 1:,} of {len(content):,} bytes)")


def test_one_that_was_never_finished_does_not_count(run: RunDir) -> None:
    (checkpoints.folder(run, 15) / checkpoints.MARKER).unlink()
    said: list[str] = []
    assert checkpoints.newest(run, said.append) == 10
    assert said == ["checkpoint 15 was never finished: passed over"]


def test_a_missing_file_and_an_unreadable_marker_are_damage(run: RunDir) -> None:
    (checkpoints.folder(run, 15) / "adapter.bin").unlink()
    (checkpoints.folder(run, 10) / checkpoints.MARKER).write_text("{", "utf-8")
    said: list[str] = []
    assert checkpoints.newest(run, said.append) == 5
    assert "adapter.bin: No such file or directory" in said[0] and "COMPLETE is missing" in said[1]


def test_old_ones_go_but_for_the_best(run: RunDir) -> None:
    assert checkpoints.superseded(run, keep=1) == [5, 10]
    assert checkpoints.superseded(run, keep=1, best=5) == [10]
    assert checkpoints.superseded(run, keep=3) == []
    checkpoints.discard(run, [5])
    assert checkpoints.steps(run) == [10, 15]


def test_no_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.newest(RunDir(tmp_path)) is None and checkpoints.complete(RunDir(tmp_path)) == []


def test_the_newest_are_kept_and_the_best_as_well(train: Callable[..., Any], tmp_path: Path) -> None:
    """At such a learning rate every step after the first makes the held-out loss worse."""
    model = tiny_model(tmp_path / "model")
    sizes = ("train.max_steps=8", "train.save_every_steps=2", "eval.every_steps=2", "train.keep_checkpoints=1")
    more = ("train.learning_rate=0.9", "train.schedule=constant", "eval.num_prompts=0", "train.precision=fp32")
    _, run = train("model=hub", f"model.id={model}", "method=full", "hw.num_cpus=1", *sizes, *more)
    measured = {line["step"]: line["loss"] for line in run.evals() if line["step"]}
    best = min(measured, key=lambda step: measured[step])
    assert best < 8
    assert checkpoints.complete(run) == [best, 8] == checkpoints.steps(run)
    assert all(checkpoints.damage(checkpoints.folder(run, step)) == [] for step in (best, 8))
