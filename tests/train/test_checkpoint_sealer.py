"""What makes a checkpoint count, when one is due, and what is uploaded of those: without a trainer."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.errors import RequestError, RunFailedError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec.train import PushSpec
from runner.train import checkpoint_saving
from runner.train.checkpoint_saving import CheckpointPush, CheckpointSealer, SaveWhenDue
from runner.train.distributed import Ranks

BARRIER = "barrier"


class Order:
    """A heartbeat and the ranks, which note who came when."""

    def __init__(self, rank: int = 0) -> None:
        self.seen: list[Any] = []
        self.rank, self.main = rank, rank == 0

    def beat(self, phase: str | None = None, *, now: bool = False) -> None:
        self.seen.append((phase, now))

    def barrier(self) -> None:
        self.seen.append(BARRIER)

    def any(self, flag: bool) -> bool:
        self.seen.append(flag)
        return flag


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    (run.path / "logs").mkdir()
    return run


def written(run: RunDir, step: int, weights: str = "model.safetensors", state: bool = True) -> Path:
    """A checkpoint as the trainer leaves it: nothing of ours in it."""
    folder = checkpoints.folder(run, step)
    folder.mkdir(parents=True)
    (folder / weights).write_bytes(b"weights")
    if state:
        (folder / "trainer_state.json").write_text("{}")
    return folder


def sealed(run: RunDir, step: int) -> None:
    checkpoints.seal(written(run, step), {"step": step})


# --- sealed --------------------------------------------------------------------------------------


def test_a_checkpoint_counts_when_it_is_sealed_and_those_before_it_go(run: RunDir) -> None:
    told: list[tuple[int, list[int]]] = []
    facts = {"processes": 2, "world": 4}
    sealer = CheckpointSealer(
        run, Ranks(), 2, sealed=lambda step: told.append((step, checkpoints.complete(run))), facts=facts
    )
    for step in (5, 10, 15, 20):
        sealer.clear(step)
        written(run, step)
        assert checkpoints.complete(run)[-1:] != [step]
        sealer.seal(step, 5)
        sealer.wait()
    assert told == [(5, [5]), (10, [5, 10]), (15, [5, 10, 15]), (20, [5, 10, 15, 20])]  # before any of them is deleted
    assert checkpoints.complete(run) == [5, 15, 20] == checkpoints.steps(run)  # the newest two, and the best
    noted = checkpoints.facts(checkpoints.folder(run, 20))
    assert {key: noted[key] for key in ("step", "processes", "world")} == {"step": 20, **facts}
    assert sealer.thread is None and sealer.error is None


def test_one_stays_while_a_run_goes_on_that_keeps_none_and_none_at_its_end(run: RunDir) -> None:
    sealer = CheckpointSealer(run, Ranks(), 0)
    for step in (5, 10):
        sealer.clear(step)
        written(run, step)
        sealer.seal(step, None)
        sealer.wait()
    assert checkpoints.complete(run) == [10]
    sealer.finish()
    assert checkpoints.steps(run) == []
    sealed(run, 15)
    CheckpointSealer(run, Ranks(), 1).finish()
    assert checkpoints.complete(run) == [15]


def test_the_marker_is_the_last_that_is_written_and_the_first_that_goes(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the machine stops, what counts is whole."""
    sealed(run, 5)
    sealer = CheckpointSealer(run, Ranks(), 1)
    written(run, 10)
    seen: list[tuple[str, bool]] = []
    for name in ("replace", "fsync"):
        own = getattr(os, name)

        def note(*args: Any, name: str = name, own: Any = own) -> Any:
            seen.append((name, (checkpoints.folder(run, 10) / "COMPLETE").exists()))
            return own(*args)

        monkeypatch.setattr(os, name, note)
    removed: list[tuple[bool, bool]] = []
    rmtree = shutil.rmtree

    def remove(path: Path, **how: Any) -> None:
        removed.append(((path / "COMPLETE").exists(), (checkpoints.folder(run, 10) / "COMPLETE").exists()))
        rmtree(path, **how)

    monkeypatch.setattr(checkpoints.shutil, "rmtree", remove)
    sealer.seal(10, None)
    sealer.wait()
    assert ("fsync", False) in seen and removed == [(False, True)]
    assert checkpoints.complete(run) == [10]


def test_the_work_is_done_beside_the_training_and_waited_for_before_the_next(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = threading.Event(), threading.Event()
    own = checkpoints.seal

    def slowly(*args: Any) -> None:
        began.set()
        assert go.wait(20)
        own(*args)

    monkeypatch.setattr(checkpoints, "seal", slowly)
    order = Order()
    ranks: Any = order
    heartbeat: Any = order
    sealer = CheckpointSealer(run, ranks, 1, heartbeat)
    written(run, 5)
    sealer.seal(5, None)  # returns while it is sealed
    assert began.wait(20) and checkpoints.complete(run) == []
    assert order.seen == [BARRIER, ("training", True)]  # all have written, and go on
    threading.Timer(0.05, go.set).start()
    written(run, 10)
    sealer.clear(10)  # waits for the one before, and takes away what an earlier attempt left
    assert order.seen[2:] == [("saving", True), ("saving", True), BARRIER]
    assert checkpoints.complete(run) == [5] == checkpoints.steps(run)


def test_only_the_main_process_deletes_and_seals(run: RunDir) -> None:
    order = Order(rank=1)
    anything: Any = order
    sealer = CheckpointSealer(run, anything, 1, anything)
    written(run, 5)
    sealer.clear(5)
    sealer.seal(5, None)
    assert sealer.thread is None and checkpoints.steps(run) == [5] and checkpoints.complete(run) == []
    assert order.seen == [("saving", True), BARRIER, BARRIER, ("training", True)]


def test_its_own_heartbeat_is_that_of_its_rank(run: RunDir) -> None:
    sealer = CheckpointSealer(run, Ranks(2, 3, 0), 1)
    assert sealer.heartbeat.file == run.path / "logs" / "rank2.json"


def test_how_long_it_held_up_the_training_is_kept(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(checkpoint_saving, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sealer = CheckpointSealer(run, Ranks(), 1)
    assert sealer.seconds == sealer.began == 0.0
    sealer.clear(5)
    written(run, 5)
    now[0] = 107.5
    sealer.seal(5, None)
    sealer.wait()
    assert (sealer.began, sealer.seconds) == (100.0, 7.5)


@pytest.mark.parametrize(
    ("weights", "state", "lacks"),
    [
        ("model.safetensors", True, None), ("adapter_model.safetensors", True, None), ("latest", True, None),
        ("model.safetensors", False, "no trainer state"), ("latest", False, "no trainer state"),
        ("optimizer.pt", True, "no weights"), ("optimizer.pt", False, "no weights"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_weights_or_state_does_not_count(
    run: RunDir, weights: str, state: bool, lacks: str | None
) -> None:
    """DeepSpeed's weights are in shards, which `latest` names; what went wrong is raised once, when waited for."""
    sealed(run, 5)
    told: list[int] = []
    sealer = CheckpointSealer(run, Ranks(), 1, sealed=told.append)
    folder = written(run, 10, weights, state)
    sealer.seal(10, None)
    if lacks is None:
        sealer.wait()
        assert checkpoints.complete(run) == [10] and told == [10]
        return
    with pytest.raises(RunFailedError) as caught:
        sealer.wait()
    assert str(caught.value) == f"{folder} holds {lacks}, and does not count as a checkpoint"
    assert checkpoints.complete(run) == [5] and told == []  # the older one stays
    sealer.wait()


# --- when one is due -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minutes", "seconds", "passed", "due"),
    [
        (1.0, 0.0, 59.9, False), (1.0, 0.0, 60.0, True), (2.0, 0.0, 119.0, False), (2.0, 0.0, 120.0, True),
        (1.0, 6.0, 119.9, False), (1.0, 6.0, 120.1, True),  # a twentieth of the time at most
        (None, 0.0, 1e9, False),
    ],
)  # fmt: skip
def test_one_is_due_by_the_clock(
    minutes: float | None, seconds: float, passed: float, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr(checkpoint_saving, "time", SimpleNamespace(monotonic=lambda: now[0]))
    order = Order()
    sealer: Any = SimpleNamespace(seconds=seconds, ranks=order)
    asked = SaveWhenDue(sealer, minutes)
    now[0] = 1000.0
    control: Any = SimpleNamespace(should_save=False)
    nothing: Any = None
    for starts in (asked.on_train_begin, asked.on_save):  # the clock starts anew with each
        starts(nothing, nothing, control)
        now[0] += passed
        control.should_save = False
        asked.on_step_end(nothing, nothing, control)
        assert control.should_save is due
    assert order.seen == ([] if minutes is None else [due, due])


def test_the_main_process_decides_for_all_and_nobody_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoint_saving, "time", SimpleNamespace(monotonic=lambda: now[0]))
    control: Any = SimpleNamespace(should_save=False)
    nothing: Any = None
    other = Order(rank=1)
    sealer: Any = SimpleNamespace(seconds=0.0, ranks=other)
    asked = SaveWhenDue(sealer, 1.0)
    now[0] = 61.0
    asked.on_step_end(nothing, nothing, control)
    assert other.seen == [False] and control.should_save is False
    sealer.ranks = SimpleNamespace(main=False, any=lambda flag: True)
    asked.on_step_end(nothing, nothing, control)
    assert control.should_save is True
    sealer.ranks = SimpleNamespace(main=True, any=lambda flag: pytest.fail("asked for by transformers already"))
    asked.on_step_end(nothing, nothing, control)
    assert control.should_save is True


# --- uploaded ------------------------------------------------------------------------------------


class Place:
    """Where checkpoints go: remembers what came, may refuse, may wait."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.files: list[dict[str, bytes]] = []
        self.keeps: list[int] = []
        self.refuses: Exception | None = None
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()

    def __call__(self, name: str) -> Any:
        self.name = name
        return SimpleNamespace(prepare=self.prepare, place=self)

    def prepare(self) -> None:
        self.began.set()
        assert self.go.wait(20)
        if self.refuses:
            raise self.refuses

    def push(self, run: RunDir, folder: Path, step: int, keep: int, target: Any) -> None:
        assert target.place is self and run.path.is_dir()
        self.steps.append(step)
        self.keeps.append(keep)
        self.files.append({str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()})


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place()
    monkeypatch.setattr(checkpoint_saving, "target_of", place)
    monkeypatch.setattr(checkpoint_saving, "push_checkpoint", place.push)
    return place


PUSH = PushSpec(to="org/name", every_steps=10, keep_checkpoints=3)


def left(run: RunDir) -> list[str]:
    return [path.name for path in run.path.glob(".pushing-*")]


def test_every_so_many_steps_one_is_uploaded_whole_and_noted(run: RunDir, place: Place) -> None:
    notes: list[str] = []
    push = CheckpointPush(run, PUSH, notes.append)
    push.close()  # nothing is under way
    for step in (5, 10, 15, 20):
        sealed(run, step)
        push.enqueue(step)
        push.close()
    assert place.steps == [10, 20] and place.keeps == [3, 3] and place.name == "org/name"
    assert set(place.files[0]) == {"model.safetensors", "trainer_state.json", "COMPLETE"}
    assert place.files[0]["model.safetensors"] == b"weights"
    assert notes == [f"Pushed  the checkpoint after step {step} to org/name" for step in (10, 20)]
    assert left(run) == [] and push.thread is None


def test_without_a_number_of_steps_none_is_uploaded(run: RunDir, place: Place) -> None:
    push = CheckpointPush(run, PushSpec(to="org/name"), lambda note: pytest.fail(note))
    sealed(run, 10)
    push.enqueue(10)
    assert push.thread is None and left(run) == [] and place.steps == []


def test_of_those_sealed_while_one_is_uploaded_the_newest_is_next(run: RunDir, place: Place) -> None:
    notes: list[str] = []
    push = CheckpointPush(run, PUSH, notes.append)
    place.go.clear()
    for step in (10, 20, 30):
        sealed(run, step)
        push.enqueue(step)
        assert place.began.wait(20)
        checkpoints.discard(run, [step])  # as the run does with those that are superseded
    assert push.thread is not None and push.thread.daemon  # the end of the run does not wait for it
    assert sorted(left(run)) == [".pushing-10", ".pushing-30"]
    place.go.set()
    push.close()
    assert place.steps == [10, 30] and left(run) == []
    assert all(files["model.safetensors"] == b"weights" for files in place.files)


@pytest.mark.parametrize("error", [RequestError("no such place"), OSError("no network")])
def test_a_failed_upload_is_told_and_the_next_is_tried(run: RunDir, place: Place, error: Exception) -> None:
    notes: list[str] = []
    push = CheckpointPush(run, PUSH, notes.append)
    place.refuses = error
    sealed(run, 10)
    push.enqueue(10)
    push.close()
    assert notes == [f"the checkpoint after step 10 was not uploaded: {error}; the next one is tried"]
    assert left(run) == []
    place.refuses = None
    sealed(run, 20)
    push.enqueue(20)
    push.close()
    assert place.steps == [20]


def test_one_that_cannot_be_held_is_told_and_ends_nothing(run: RunDir, place: Place) -> None:
    notes: list[str] = []
    push = CheckpointPush(run, PUSH, notes.append)
    push.enqueue(10)  # it is not there
    assert len(notes) == 1 and notes[0].startswith("the checkpoint after step 10 is not uploaded: ")
    assert push.thread is None


def test_half_a_copy_does_not_stay_on_a_full_disk(run: RunDir, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: str, target: str) -> None:
        if source.endswith("trainer_state.json"):
            raise OSError("No space left on device")
        shutil.copy2(source, target)

    monkeypatch.setattr(checkpoint_saving, "_link", full)
    notes: list[str] = []
    push = CheckpointPush(run, PUSH, notes.append)
    sealed(run, 10)
    push.enqueue(10)
    assert "No space left on device" in notes[0] and left(run) == [] and push.thread is None


def test_what_an_earlier_process_left_half_uploaded_goes(run: RunDir) -> None:
    (run.path / ".pushing-10" / "sub").mkdir(parents=True)
    (run.path / "kept").mkdir()
    CheckpointPush(run, PUSH, lambda note: None)
    assert left(run) == [] and (run.path / "kept").is_dir()


def test_the_files_are_linked_not_copied_where_that_is_possible(
    run: RunDir, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.go.clear()
    push = CheckpointPush(run, PUSH, lambda note: None)
    sealed(run, 10)
    push.enqueue(10)
    names = [checkpoints.folder(run, 10), run.path / ".pushing-10"]
    inodes = [(name / "model.safetensors").stat().st_ino for name in names]
    assert inodes[0] == inodes[1]

    def refused(*args: Any) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    sealed(run, 20)
    push.enqueue(20)
    copied = run.path / ".pushing-20" / "model.safetensors"
    assert copied.read_bytes() == b"weights"
    assert copied.stat().st_mtime == (checkpoints.folder(run, 20) / "model.safetensors").stat().st_mtime
    place.go.set()
    push.close()


def test_the_end_waits_a_minute_at_most(run: RunDir, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_saving.CLOSING_S == 60
    monkeypatch.setattr(checkpoint_saving, "CLOSING_S", 0.05)
    place.go.clear()
    push = CheckpointPush(run, PUSH, lambda note: None)
    sealed(run, 10)
    push.enqueue(10)
    assert place.began.wait(20)
    began = time.monotonic()
    push.close()
    assert time.monotonic() - began < 10 and place.steps == []
    place.go.set()
    monkeypatch.setattr(checkpoint_saving, "CLOSING_S", 20)
    push.close()
    assert place.steps == [10]
