"""A run is resumed as itself: what may change, what may not, and what is written of it."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from runner.config.command_line import Request
from runner.errors import Problem, RequestError, RunFailedError
from runner.rundir import checkpoints, lock
from runner.rundir.directory import RunDir, process_birth
from runner.runs import resume
from runner.spec import RunSpec
from tests.support.front import spec_of, write

WORDS = ("model=smollm2_135m", "method=lora", "hw=cpu", "train.max_steps=8", "run.name=r")
STAGES = ("model=mistral7b", "method=lora", "hw=h100x3", "train.batch_size=12")


@pytest.fixture
def run(here: Path) -> RunDir:
    """An interrupted run, with whole checkpoints after steps 2 and 4."""
    return made(here, *WORDS)


def made(root: Path, *words: str, steps: tuple[int, ...] = (2, 4)) -> RunDir:
    run = RunDir.create(spec_of(*words, f"run.output_dir={root / 'runs'}"))
    resume.input_digests.record_digests(run, run.spec)
    for step in steps:
        keep(run, step)
    run.set_status("interrupted", step=4, exit_code=130)
    return run


def keep(run: RunDir, step: int) -> None:
    """A whole checkpoint."""
    write(checkpoints.folder(run, step) / "adapter.bin", "x")
    checkpoints.seal(checkpoints.folder(run, step), {"step": step})


def composed(run: RunDir, *words: str) -> RunSpec:
    return resume.compose_resumed(run, resume.resume_request(run, words, ()))


def told(call: Any) -> list[Problem]:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value.problems


def resolved_as(run: RunDir, **parts: dict[str, Any]) -> RunSpec:
    """The run's spec with some values changed, as `resolve` may make it."""
    spec = run.spec
    return spec.model_copy(update={k: getattr(spec, k).model_copy(update=v) for k, v in parts.items()})


# --- what is asked -----------------------------------------------------------------------------------------------


def test_words_go_over_the_runs_own_spec_and_a_permission_is_for_one_resume(run: RunDir) -> None:
    asked = resume.resume_request(run, ("train.max_steps=9",), (Path("mine"),))
    assert asked.overrides == ("run.on_changed_inputs=stop", "train.max_steps=9")
    assert (asked.spec_file, asked.config_dirs) == (run.spec_file, (Path("mine"),))
    assert asked.exchange == ("hw", "deepspeed", "track")
    for word in ("run.on_changed_inputs=continue", "+run.on_changed_inputs=continue"):
        assert resume.resume_request(run, (word,), ()).overrides == (word,)


@pytest.mark.parametrize("word", ["hw=cpu", "hw.num_cpus=2"])
def test_other_hardware_divides_the_batch_anew_unless_that_is_written(run: RunDir, word: str) -> None:
    anew = ("train.micro_batch_size=auto", "train.accumulation_steps=auto", word)
    assert resume.resume_request(run, (word,), ()).overrides == ("run.on_changed_inputs=stop", *anew)
    written = (word, "train.accumulation_steps=2")
    assert resume.resume_request(run, written, ()).overrides == ("run.on_changed_inputs=stop", *written)
    other = ("train.max_steps=9", "data.seed=3")
    assert resume.resume_request(run, other, ()).overrides == ("run.on_changed_inputs=stop", *other)


def test_what_is_no_run_is_named_with_what_to_do(run: RunDir, here: Path) -> None:
    resume.check_can_resume(run)
    (here / "runs" / "empty").mkdir()
    (problem,) = told(lambda: resume.check_can_resume(RunDir(Path("runs/empty"))))
    assert problem == Problem(
        "runs/empty is no run: it has no spec.json",
        "command line",
        "python -m runner runs --output-dir runs lists them",
    )
    (problem,) = told(lambda: resume.check_can_resume(RunDir(Path("elsewhere/x"))))
    assert problem.what == "elsewhere/x does not exist"
    assert problem.remedy == "python -m runner runs --output-dir elsewhere lists them"
    (problem,) = told(lambda: resume.check_can_resume(RunDir(Path(f"runs/{run.id}x"))))
    assert problem.what == f"runs/{run.id}x does not exist" and problem.remedy == f"did you mean runs/{run.id}?"
    run.spec_file.unlink()
    (problem,) = told(lambda: resume.check_can_resume(run))
    assert "training.yaml beside it holds the same values" in str(problem.remedy)


# --- what may change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word",
    [
        "train.max_steps=9", "train.save_every_steps=3", "train.keep_checkpoints=7", "train.hang_minutes=9",
        "train.gradient_checkpointing=true", "train.attention=eager", "train.on_loss_spike=skip",
        "train.spike_factor=5",
        "eval.num_prompts=1", "track=tensorboard", "hw.num_cpus=1", "train.liger=false", "train.micro_batch_size=1",
    ],
)  # fmt: skip
def test_where_how_and_how_long_it_trains_may_change(run: RunDir, word: str) -> None:
    key, _, value = word.partition("=")
    changed = composed(run, word).model_dump(mode="json")
    for step in key.split("."):
        changed = changed[step]
    assert str(changed if not isinstance(changed, dict) else changed["name"]).lower().removesuffix(".0") == value


def test_what_it_learns_may_not_change_and_every_such_key_is_named(run: RunDir) -> None:
    words = ("train.learning_rate=0.5", "train.max_length=99", "train.max_steps=9")
    length, rate = told(lambda: composed(run, *words))
    old = run.spec.train
    assert rate.what == f"train.learning_rate was {old.learning_rate} and cannot become 0.5 in the middle of a run"
    assert length.what == f"train.max_length was {old.max_length} and cannot become 99 in the middle of a run"
    assert rate.source == length.source == "command line"
    assert rate.remedy == f"start a run of its own: python -m runner runs/{run.id}/spec.json …"


def test_a_run_that_is_done_goes_on_only_for_more_steps(run: RunDir) -> None:
    run.set_status("done", step=8, exit_code=0)
    for words in ((), ("train.max_steps=8",), ("train.max_steps=7",), ("eval.num_prompts=1",)):
        (problem,) = told(lambda words=words: composed(run, *words))
        assert problem.what == f"{run.id} is done: all 8 steps" and problem.source == "command line"
        assert problem.remedy == "to train longer, resume with train.max_steps=16, say"
    run.set_status("done", step=9, exit_code=0)
    (problem,) = told(lambda: composed(run, "train.max_steps=9"))  # another number, and no step more
    assert problem.what == f"{run.id} is done: all 9 steps"
    run.set_status("done", step=8, exit_code=0)
    assert composed(run, "train.max_steps=9").train.max_steps == 9
    assert composed(run, "train.max_steps=null", "train.num_epochs=50").train.num_epochs == 50
    checkpoints.discard(run, checkpoints.steps(run))
    (problem,) = told(lambda: composed(run, "train.max_steps=9"))
    assert problem.what == f"{run.id} is done, and has no whole checkpoint from which it could be made longer"
    assert problem.source == "command line"
    again = f"python -m runner runs/{run.id}/spec.json … starts another one (train.keep_checkpoints=0 keeps none)"
    assert problem.remedy == again
    run.write("status.json", {"state": "done"})
    (problem,) = told(lambda: composed(run))
    assert (problem.what, problem.remedy) == (
        f"{run.id} is done: all 0 steps", "to train longer, resume with train.max_steps=100, say",
    )  # fmt: skip


# --- what the checkpoint is of -----------------------------------------------------------------------------------


def test_without_a_checkpoint_it_begins_anew(here: Path) -> None:
    run = made(here, *WORDS, steps=())
    other = resolved_as(run, train={"micro_batch_size": 64})
    assert resume.check_same_run(run, other) == [
        "there is no complete checkpoint: the run starts again from the beginning"
    ]


def test_the_global_batch_stays_what_it_was(run: RunDir) -> None:
    assert resume.check_same_run(run, run.spec) == []
    train = run.spec.train
    batch = int(train.micro_batch_size) * int(train.accumulation_steps)
    halved = {"micro_batch_size": 2 * int(train.micro_batch_size), "accumulation_steps": 3}
    (problem,) = told(lambda: resume.check_same_run(run, resolved_as(run, train=halved)))
    made_of = 6 * int(train.micro_batch_size)
    assert problem.what == f"cpu makes the global batch {made_of}, and the first 4 steps took {batch}"
    assert problem.source == "hw"
    assert problem.remedy == f"take a number of processes that divides {batch}, or set train.micro_batch_size"
    three = resolved_as(run, hw={"num_processes": 3})
    assert "makes the global batch" in told(lambda: resume.check_same_run(run, three))[0].what


def test_zero_stages_are_exchanged_only_where_their_states_lie_alike(here: Path) -> None:
    run = made(here, *STAGES, "deepspeed=zero2")
    for stage in ("zero1", "zero2", "zero2_offload"):
        assert resume.check_same_run(run, resolved_as(run, deepspeed={"name": stage})) == []
    for stage in ("none", "zero3", "zero3_offload"):
        (problem,) = told(lambda stage=stage: resume.check_same_run(run, resolved_as(run, deepspeed={"name": stage})))
        what = f"the checkpoint was written with deepspeed=zero2 and cannot be read with deepspeed={stage}"
        assert (problem.what, problem.source) == (what, "deepspeed")
        assert problem.remedy == "write deepspeed=zero1, deepspeed=zero2, deepspeed=zero2_offload"
    three = made(here, *STAGES, "deepspeed=zero3")
    assert resume.check_same_run(three, resolved_as(three, deepspeed={"name": "zero3_offload"})) == []


def test_a_checkpoint_that_a_pod_wrote_and_deepspeed_unpickles_is_told(here: Path) -> None:
    run = made(here, *STAGES, "deepspeed=zero2")
    run.write("pod.json", {"id": "p"})
    (note,) = resume.check_same_run(run, run.spec)
    assert note == "DeepSpeed unpickles its checkpoint, and a pod wrote it: go on here only if you trust that pod"
    plain = made(here, *STAGES, "deepspeed=none")
    plain.write("pod.json", {"id": "p"})
    assert resume.check_same_run(plain, plain.spec) == []
    rented = spec_of(*STAGES, "deepspeed=zero2", "where=runpod")
    assert resume.check_same_run(run, run.spec.model_copy(update={"where": rented.where})) == []


# --- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "noted"), [("interrupted", True), ("failed", True), ("done", False)])
def test_a_new_run_from_the_spec_of_one_that_could_go_on_says_so(run: RunDir, state: Any, noted: bool) -> None:
    run.set_status(state)
    notes = resume.unfinished_note(Request(spec_file=run.spec_file))
    wanted = f"a new run; python -m runner resume runs/{run.id} would go on after step 4 of {run.id}"
    assert notes == [wanted] * noted
    assert resume.unfinished_note(Request()) == []
    keep(run, 6)
    assert all(
        "would go on after step 6 of" in note for note in resume.unfinished_note(Request(spec_file=run.spec_file))
    )
    checkpoints.discard(run, [2, 4, 6])
    assert resume.unfinished_note(Request(spec_file=run.spec_file)) == []


def test_a_run_whose_process_is_gone_could_go_on_too(run: RunDir) -> None:
    run.set_status("training")
    assert resume.unfinished_note(Request(spec_file=run.spec_file)) == []  # this process is at it
    run.write("status.json", {**run.read("status.json"), "pid": 2**22 + 1})
    (note,) = resume.unfinished_note(Request(spec_file=run.spec_file))
    assert note.endswith(f"would go on after step 4 of {run.id}")


def test_a_resume_from_the_beginning_is_kept_as_one_and_says_what_it_runs_now(here: Path) -> None:
    run = made(here, *WORDS, steps=())
    other = resolved_as(run, data={"name": "moved"})
    resume.record_spec(run, other, ())
    assert run.read("resumes.json")["resumes"] == [{"after_step": 0, "overrides": []}]
    assert run.status["data"] == "moved"


def test_every_resume_is_kept_and_the_run_is_as_if_created(run: RunDir) -> None:
    run.set_status("failed", exit_code=1, error="x", oom={"kind": "cpu"}, started=1.0, spent=5.0)
    run.write("status.json", {**run.read("status.json"), "updated": 3.0})
    longer = composed(run, "train.max_steps=9", "train.keep_checkpoints=3")
    resume.record_spec(run, longer, ("train.max_steps=9",))
    keep(run, 6)
    resume.record_spec(run, longer, ())
    assert run.read("resumes.json")["resumes"] == [
        {"after_step": 4, "overrides": ["train.max_steps=9"]}, {"after_step": 6, "overrides": []},
    ]  # fmt: skip
    assert run.spec.train.max_steps == 9 and "max_steps: 9" in (run.path / "training.yaml").read_text("utf-8")
    status = run.status
    assert status["state"] == "created" and status["spent"] == 7.0  # 5 before, 2 since its start
    assert [status[key] for key in ("exit_code", "error", "oom", "started")] == [None] * 4
    assert status["model"] == "smollm2_135m" and status["method"] == "lora"


def test_a_resume_that_fails_before_it_keeps_a_step_leaves_the_spec_as_it_was(run: RunDir) -> None:
    files = (run.spec_file, run.path / "training.yaml", run.path / "inputs.json")
    before = [file.read_bytes() for file in files]
    longer = composed(run, "train.max_steps=9")

    def fails() -> None:
        with resume.recording_resume(run, longer, ()):
            assert run.spec.train.max_steps == 9
            run.write("inputs.json", {"data.path": "other"})
            raise RunFailedError("no room")

    with pytest.raises(RunFailedError):
        fails()
    assert [file.read_bytes() for file in files[:2]] == before[:2] and run.read("inputs.json") == {}
    with resume.recording_resume(run, longer, ()):
        run.set_status("failed", exit_code=1)
    assert [file.read_bytes() for file in files[:2]] == before[:2] and run.read("inputs.json") == {}


@pytest.mark.parametrize(("state", "kept"), [("failed", True), ("interrupted", False), ("done", False)])
def test_a_resume_that_has_kept_a_step_or_goes_well_keeps_its_spec(run: RunDir, state: Any, kept: bool) -> None:
    with resume.recording_resume(run, composed(run, "train.max_steps=9"), ()):
        keep(run, 6) if kept else None
        run.set_status(state)
    assert run.spec.train.max_steps == 9


# --- who is at it ------------------------------------------------------------------------------------------------


def test_a_run_with_a_live_process_is_left_alone(run: RunDir) -> None:
    own = {
        "state": "alive",
        "pid": os.getpid(),
        "born": process_birth(os.getpid()),
        "rank": 0,
        "host": socket.gethostname(),
    }
    run.write("logs/rank0.json", own)
    (problem,) = told(lambda: composed(run))
    assert problem == lock.run_at_work_error(run, {"pid": os.getpid()})
    for gone in ({"state": "done"}, {"born": "another boot:1"}, {"pid": 2**22 + 1}):
        run.write("logs/rank0.json", own | gone)
        assert composed(run)


def test_a_run_that_is_at_work_is_left_alone_wherever_that_is(run: RunDir) -> None:
    run.set_status("training")
    (problem,) = told(lambda: composed(run))
    assert problem == lock.run_at_work_error(run, run.status)
    run.write("status.json", {**run.read("status.json"), "host": "other", "born": "another boot:1"})
    (problem,) = told(lambda: composed(run))
    status = f"if other is no more, delete runs/{run.id}/status.json and resume again"
    own = lock.run_at_work_error(run, run.status)
    assert problem == Problem(own.what, own.source, f"{own.remedy}; {status}")
    here = process_birth(os.getpid())
    run.write("status.json", {**run.read("status.json"), "born": here})  # a container of this machine: its lock decides
    assert composed(run)
    run.write("status.json", {**run.read("status.json"), "host": "pod p1", "pid": None})
    (problem,) = told(lambda: composed(run))
    assert problem.what == f"{run.id} is in a pod (pod p1): training, as far as is known here"
    assert problem.source == "command line"
    assert problem.remedy == f"python -m runner attach {run.id}, or fetch {run.id}"
    run.set_status("failed")
    assert composed(run)
