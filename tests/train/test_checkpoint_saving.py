"""When a checkpoint is written, and that nothing is lost after the last one. In this process, but for the signals."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer
from transformers.utils.logging import set_tqdm_hook

from runner.errors import InterruptedRun
from runner.launcher.supervisor import SAME_SECONDS, remove_reports
from runner.report.progress import Progress
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.train import checkpoint_saving
from runner.train.trainers.stop_on_signal import StopOnSignal
from runner.train.worker import work
from tests.conftest import ROOT, run_cli, spec_of
from tests.support.processes import losses, only_run, sign, start, tiny_model, until, words

WEIGHTS = "model/adapter_model.safetensors"
ASKED = ("train.max_steps=4", "eval.num_prompts=2", "eval.max_new_tokens=4", "hw.num_cpus=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tiny(model: Path, tmp_path: Path) -> Callable[..., RunDir]:
    """A finished run of the tiny model, in this process."""

    def trained(*more: str, stop: StopOnSignal | None = None) -> RunDir:
        spec = spec_of(*words(model, tmp_path / "runs", "hw.num_cpus=1", *more))
        run = RunDir.create(spec)
        go_on(run, spec, stop)
        return run

    return trained


def go_on(run: RunDir, spec: Any, stop: StopOnSignal | None = None) -> None:
    work(spec, run, Progress(Console(file=io.StringIO())), stop or StopOnSignal())


def outcome(run: RunDir) -> tuple[Any, ...]:
    """All that a disturbed run has to have in common with an undisturbed one."""
    steps = [(line["step"], line["loss"], line["learning_rate"], line["grad_norm"]) for line in run.metrics()]
    held = [(line["step"], line["loss"]) for line in run.evals() if line["step"]]
    (weights,) = (run.path / "model").glob("*.safetensors")
    return steps, held, weights.read_bytes()


# ── after the last step ────────────────────────────────────────────────────────────────────────

SLOW = """
import sys, time
if "runner.train" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    {patch}
"""
IN_AFTER = """
    from runner.train.evaluation.before_after import BeforeAfter
    was = BeforeAfter._answers
    BeforeAfter._answers = lambda self, when: time.sleep(600) if when == "after" else was(self, when)
"""
IN_SAVE = """
    from runner.train import model_saving

    was = model_saving.save_weights
    model_saving.save_weights = lambda *args: (was(*args), time.sleep(600))
"""
IN_CHECKPOINT = """
    from transformers import Trainer
    was = Trainer._save_checkpoint
    Trainer._save_checkpoint = lambda *args: (was(*args), time.sleep(600))
"""


def slow(folder: Path, patch: str) -> dict[str, str]:
    """An environment in which a worker stays in one place for ten minutes."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW.format(patch=patch.strip()), "utf-8")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.slow
def test_what_comes_after_the_last_step_can_be_ended_at_any_time(model: Path, tmp_path: Path) -> None:
    """SIGTERM and SIGKILL while answering and while saving: the training is not lost, and the end is the same."""
    undisturbed = run_cli(*words(model, tmp_path / "undisturbed", *ASKED), OMP_NUM_THREADS="1")
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = only_run(tmp_path / "undisturbed")
    assert expected is not None

    places = (("after", IN_AFTER), ("save", IN_SAVE))
    for place, patch in places:
        env = slow(tmp_path / place, patch)
        for number in (signal.SIGTERM, signal.SIGKILL):
            found = only_run(tmp_path / "runs")
            front = start(*(["resume", str(found)] if found else words(model, tmp_path / "runs", *ASKED)), **env)
            run: Path = found or until(lambda: only_run(tmp_path / "runs"))
            until(partial(at, run, place), 240)
            os.kill(front.pid if number == signal.SIGTERM else sign(run, 0)["pid"], number)
            _, errors = front.communicate(timeout=120)
            state = RunDir(run).read("status.json")
            assert "Traceback" not in errors and f"resume {run}" in errors, errors
            if number == signal.SIGTERM:
                assert front.returncode == 130 and state["state"] == "interrupted", errors
                assert "what was trained until step 4 is in" in errors and "until step 4" in state["error"]
            else:
                assert front.returncode == 1 and state["state"] == "failed", errors
            assert checkpoints.newest(RunDir(run)) == 4 and not (run / "model").exists()
    done = run_cli("resume", str(run), OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "Resumes after step 4" in done.stdout, done.stderr
    assert outcome(RunDir(run)) == outcome(RunDir(expected))
    for name in ("answers_before.jsonl", "answers_after.jsonl"):
        assert (run / name).read_bytes() == (expected / name).read_bytes()
    assert not (run / ".model.tmp").exists()


def at(run: Path, place: str) -> bool:
    """The worker that was started last has come to the place."""
    status, now = RunDir(run).read("status.json"), sign(run, 0)
    if not now or now["state"] != "alive" or status.get("pid") != now["pid"]:
        return False
    if place == "save":
        return status["state"] == "saving" and (run / ".model.tmp" / "adapter_model.safetensors").exists()
    return status["state"] == "evaluating" and status.get("when") == "after"


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(model: Path, tmp_path: Path) -> None:
    long = ("hw.num_cpus=1", "train.max_steps=4000")
    front = start(*words(model, tmp_path / "runs", *long), **slow(tmp_path / "site", IN_CHECKPOINT))
    run: Path = until(lambda: only_run(tmp_path / "runs"))
    until(lambda: sign(run, 0).get("step"), 240)
    front.send_signal(signal.SIGINT)  # finishes the step, and begins to write its checkpoint
    until(lambda: sign(run, 0).get("phase") == "saving", 240)
    pid = sign(run, 0)["pid"]
    time.sleep(2 * SAME_SECONDS)  # so close together they would be one
    front.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = front.communicate(timeout=120)
    assert time.monotonic() - began < 30  # not ten minutes
    assert front.returncode == 130 and "interrupted before there was anything to save" in errors, errors
    assert RunDir(run).read("status.json")["state"] == "interrupted" and "Traceback" not in errors
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_a_finished_run_made_longer_ends_like_one_that_was_as_long_from_the_start(
    tiny: Callable[..., RunDir],
) -> None:
    same = ("train.schedule=constant", "train.warmup_ratio=0", "method.dropout=0.1")
    longer = tiny("train.max_steps=6", *same)
    run = tiny("train.max_steps=3", *same)
    first = [*run.metrics()]
    summary = run.read("summary.json")
    remove_reports(run)  # this process is alive
    done = run_cli("resume", str(run.path), "train.max_steps=6", OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "Resumes after step 3" in done.stdout, done.stderr
    assert [*run.metrics()][:3] == first  # with their times: not done again
    assert outcome(run)[::2] == outcome(longer)[::2]
    assert [step for step, _ in outcome(run)[1]] == [3, 6] and outcome(run)[1][-1:] == outcome(longer)[1]
    again = run.read("summary.json")
    assert (summary["train"]["steps"], again["train"]["steps"]) == (3, 6)
    assert again["seconds"] >= again["train"]["seconds"]


def test_a_longer_run_follows_its_own_schedule_from_its_first_step(tiny: Callable[..., RunDir]) -> None:
    """The shorter cosine had come to 0: one step would have been for nothing."""
    run = tiny("train.max_steps=3", "train.warmup_ratio=0")
    go_on(run, spec_of(*changed(run, "train.max_steps=6")))
    rates = [line["learning_rate"] for line in run.metrics()]
    whole = [line["learning_rate"] for line in tiny("train.max_steps=6", "train.warmup_ratio=0").metrics()]
    assert rates[3:] == pytest.approx(whole[3:]) and min(rates[3:]) > 0


def changed(run: RunDir, *words_: str) -> list[str]:
    """A run's own words, with something else."""
    spec = run.read("spec.json")
    base = words(Path(spec["model"]["id"]), run.path.parent, "hw.num_cpus=1", "train.warmup_ratio=0")
    return [*base, *words_]


# ── which ones, and when ───────────────────────────────────────────────────────────────────────


def test_a_short_run_writes_the_last_one_alone(tiny: Callable[..., RunDir]) -> None:
    run = tiny("train.max_steps=3")
    assert checkpoints.complete(run) == [3] == checkpoints.steps(run)
    assert checkpoints.damage(checkpoints.folder(run, 3)) == []


def test_none_is_kept_where_none_is_wanted(tiny: Callable[..., RunDir]) -> None:
    run = tiny("train.max_steps=4", "train.save_every_steps=2", "train.keep_checkpoints=0")
    assert checkpoints.steps(run) == [] and (run.path / WEIGHTS).is_file()


def test_the_clock_asks_for_one_and_starts_anew_with_each(
    tiny: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by 100 s at every step: with 4 minutes, one every third step."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr(
        checkpoint_saving.SaveWhenDue, "on_step_begin", lambda *args, **kw: tick(next(steps)), raising=False
    )
    now = [0.0]

    def tick(step: int) -> None:
        now[0] = 100.0 * step

    monkeypatch.setattr(checkpoint_saving, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    run = tiny("train.max_steps=11", "train.save_every_minutes=4", "train.keep_checkpoints=9")
    assert checkpoints.complete(run) == [3, 6, 9, 11]
    off = tiny("train.max_steps=11", "train.save_every_minutes=null", "train.keep_checkpoints=9")
    assert checkpoints.complete(off) == [11]
    assert outcome(run) == outcome(off)


def test_checkpoints_by_the_clock_take_a_twentieth_of_the_time_at_most() -> None:
    class Slow:
        seconds = 60.0
        ranks = checkpoint_saving.Ranks()

    due: Any = checkpoint_saving.SaveWhenDue(Slow(), 1.0)
    control: Any = type("Control", (), {"should_save": False})()
    for minutes, expected in ((2, False), (19, False), (20.1, True)):
        due.last, control.should_save = time.monotonic() - 60 * minutes, False
        due.on_step_end(None, None, control)
        assert control.should_save is expected


def test_writing_one_is_a_phase_of_its_own(tiny: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches waits four times as long for it as for a step."""
    phases: list[str] = []
    was = Trainer._save_checkpoint

    def noted(self: Any, *args: Any) -> None:
        phases.append(json.loads((Path(self.args.output_dir).parent / "logs" / "rank0.json").read_text())["phase"])
        was(self, *args)

    monkeypatch.setattr(Trainer, "_save_checkpoint", noted)
    beaten: list[str] = []
    beat = checkpoint_saving.Heartbeat.beat
    monkeypatch.setattr(
        checkpoint_saving.Heartbeat,
        "beat",
        lambda self, phase=None, **kw: (beaten.append(phase), beat(self, phase, **kw))[1],
    )
    tiny("train.max_steps=4", "train.save_every_steps=2")
    assert phases == ["saving", "saving"]
    order = [phase for phase, before in zip(beaten, [None, *beaten], strict=False) if phase and phase != before]
    assert "".join(phase[0] for phase in order).count("tst") >= 1  # training, saving, training


def test_loading_gives_a_sign_of_life_with_every_weight(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[float] = []
    monkeypatch.setattr(checkpoint_saving.Heartbeat, "beat", lambda self, *args, **kw: beats.append(time.monotonic()))
    before = set_tqdm_hook(checkpoint_saving.Heartbeat(RunDir(tmp_path), 0).wrap_tqdm)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    finally:
        set_tqdm_hook(before)
    assert len(beats) >= len([*loaded.parameters()]) - 1  # a tied head has no weight of its own


# ── stopped in between ─────────────────────────────────────────────────────────────────────────


class Hit(StopOnSignal):
    """A signal arrives in the middle of the measurement after step 2."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training and state.global_step == 2:
            self.received = signal.SIGTERM
        super().on_prediction_step(args, state, control, **kwargs)


def test_a_signal_cuts_a_measurement_short_and_resume_makes_up_for_it(tiny: Callable[..., RunDir]) -> None:
    same = ("train.max_steps=5", "eval.every_steps=2", "method.dropout=0.1")
    undisturbed = tiny(*same)
    with pytest.raises(InterruptedRun, match="stopped after step 2"):
        tiny(*same, stop=Hit())
    (run,) = [RunDir(path) for path in undisturbed.path.parent.iterdir() if path != undisturbed.path]
    assert [line["step"] for line in run.evals() if line["step"]] == [] and checkpoints.newest(run) == 2
    go_on(run, spec_of(*words(Path(run.read("spec.json")["model"]["id"]), run.path.parent, "hw.num_cpus=1", *same)))
    assert outcome(run)[0] == outcome(undisturbed)[0]
    assert outcome(run) == outcome(undisturbed)


def test_a_run_that_stopped_early_has_its_last_checkpoint_and_does_not_go_on(tiny: Callable[..., RunDir]) -> None:
    worse = ("method=full", "train.learning_rate=0.9", "train.schedule=constant", "eval.every_steps=1")
    run = tiny("train.max_steps=12", *worse, "eval.early_stopping_patience=2")
    before = outcome(run)
    last = len(losses(run.path))
    assert last < 12 and checkpoints.newest(run) == last
    spec = spec_of(
        *words(Path(run.read("spec.json")["model"]["id"]), run.path.parent, "hw.num_cpus=1", *worse),
        "eval.early_stopping_patience=2",
    )  # fmt: skip
    go_on(run, spec)  # as if it had been killed while it measured or saved
    assert outcome(run)[::2] == before[::2]
