"""A checkpoint is whole, or it does not count."""

from __future__ import annotations

import hashlib
import json
import os
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
    assert said == [f"checkpoint 15 is damaged ({name} has changed since it was written): skipped"]
    assert checkpoints.damage(file.parents[name.count("/")], content=False) == []
    file.write_bytes(content[:-1])
    assert checkpoints.newest(run, said.append) == 10
    assert said[1].startswith(f"checkpoint 15 is damaged ({name} has {len(content) - 1:,} of {len(content):,} bytes)")


def test_one_that_was_never_finished_does_not_count(run: RunDir) -> None:
    (checkpoints.folder(run, 15) / checkpoints.MARKER).unlink()
    said: list[str] = []
    assert checkpoints.newest(run, said.append) == 10
    assert said == ["checkpoint 15 is incomplete: skipped"]


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


def test_every_file_and_folder_is_on_the_disk_before_the_marker_counts(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut there is no marker whose files are not there: each is flushed first, and so are the folders."""
    folder = checkpoints.folder(run, 15)
    (folder / checkpoints.MARKER).unlink()
    flushed: list[tuple[str, bool]] = []
    own = os.fsync

    def note(handle: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{handle}"), (folder / checkpoints.MARKER).exists()))
        own(handle)

    monkeypatch.setattr(os, "fsync", note)
    checkpoints.seal(folder, {"step": 15})
    before = {name for name, marked in flushed if not marked}
    files = {str(file) for file in folder.rglob("*") if file.name != checkpoints.MARKER}
    assert files | {str(folder), str(folder.parent)} <= before
    assert flushed[-1] == (str(folder), True)  # the marker's own name


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_half_a_marker_is_none(run: RunDir, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written beside its place, brought to the disk and renamed: whatever stops that, the checkpoint does not
    count."""
    folder = checkpoints.folder(run, 15)
    (folder / checkpoints.MARKER).unlink()
    monkeypatch.setattr(checkpoints, "_flushed", lambda file: {"size": 1, "sha256": "x"})
    monkeypatch.setattr(checkpoints, "_flush_folder", lambda folder: None)

    def stopped(*args: Any) -> None:
        raise OSError("the power is gone")

    monkeypatch.setattr(broken, stopped)
    with pytest.raises(OSError, match="the power is gone"):
        checkpoints.seal(folder, {"step": 15})
    assert checkpoints.complete(run) == [5, 10] and checkpoints.newest(run) == 10


def test_a_checkpoint_that_is_half_deleted_does_not_count(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def interrupted(path: Path, **how: Any) -> None:
        seen.append((path / checkpoints.MARKER).exists())

    monkeypatch.setattr(checkpoints.shutil, "rmtree", interrupted)
    checkpoints.discard(run, [15])
    assert seen == [False]
    assert checkpoints.newest(run) == 10


def test_what_is_gone_already_is_discarded_quietly(run: RunDir) -> None:
    (checkpoints.folder(run, 10) / checkpoints.MARKER).unlink()
    checkpoints.discard(run, [10, 99])
    assert checkpoints.steps(run) == [5, 15]


def test_other_things_beside_checkpoints_are_none(run: RunDir) -> None:
    folder = run.path / "checkpoints"
    (folder / "checkpoint-20").write_text("a file")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-").mkdir()
    assert checkpoints.steps(run) == [5, 10, 15]


@pytest.mark.parametrize(
    "marker", ["[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"adapter.bin": {"size": "3"}}}', "\xff"]
)
def test_a_marker_that_is_not_as_it_was_written_is_damage(run: RunDir, marker: str) -> None:
    file = checkpoints.folder(run, 15) / checkpoints.MARKER
    file.write_text(marker, "latin-1")
    assert checkpoints.damage(file.parent) == ["COMPLETE is missing or cannot be read"]
    assert checkpoints.newest(run) == 10
    assert isinstance(checkpoints.facts(file.parent), dict)


def test_files_outside_and_links_are_damage_and_the_others_are_told_as_well(run: RunDir) -> None:
    folder = checkpoints.folder(run, 15)
    noted = checkpoints.facts(folder)
    other = {"../../checkpoint-10/adapter.bin": noted["files"]["adapter.bin"]}
    (folder / checkpoints.MARKER).write_text(json.dumps({**noted, "files": other | noted["files"]}), "utf-8")
    (folder / "adapter.bin").write_bytes(b"")
    (folder / "global_step" / "shard.pt").write_bytes(b"")
    assert [one.split(" ")[0] for one in checkpoints.damage(folder)] == [*other, "adapter.bin", "global_step/shard.pt"]
    said: list[str] = []
    assert checkpoints.newest(run, said.append) == 10
    outside = f"checkpoint 15 is damaged ({next(iter(other))} is outside of it and 2 more): skipped"
    assert said == [outside]
    (folder / "global_step" / "link").symlink_to("/etc/passwd")
    assert checkpoints.damage(folder) == ["global_step/link is a link"]  # before any file is read


def test_two_damaged_files_are_counted(run: RunDir) -> None:
    for name in ("adapter.bin", "global_step/shard.pt"):
        (checkpoints.folder(run, 15) / name).unlink()
    said: list[str] = []
    checkpoints.newest(run, said.append)
    assert "(adapter.bin: No such file or directory and 1 more)" in said[0]


def test_names_and_facts_keep_their_letters(run: RunDir, tmp_path: Path) -> None:
    folder = checkpoints.folder(run, 20)
    folder.mkdir()
    (folder / "größe.bin").write_bytes(b"a" * (checkpoints.BLOCK + 7))
    checkpoints.seal(folder, {"note": "Zürich"})
    assert checkpoints.facts(folder)["note"] == "Zürich" and checkpoints.damage(folder) == []
    size, digest = checkpoints.BLOCK + 7, hashlib.sha256(b"a" * (checkpoints.BLOCK + 7)).hexdigest()
    assert checkpoints.facts(folder)["files"] == {"größe.bin": {"size": size, "sha256": digest}}


def test_an_interrupted_run_names_its_last_checkpoint_and_how_to_go_on(run: RunDir, tmp_path: Path) -> None:
    (problem,) = checkpoints.interrupted(run).problems
    assert problem.what == f"interrupted; what was trained until step 15 is in {checkpoints.folder(run, 15)}"
    assert problem.remedy == f"python -m runner resume {run.path}"
    empty = RunDir(tmp_path / "other run")
    (nothing,) = checkpoints.interrupted(empty).problems
    assert (nothing.what, nothing.remedy) == ("interrupted before there was anything to save", None)


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
