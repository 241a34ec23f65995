"""Resume a run in its own directory, from its newest complete checkpoint."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from runner.config.command_line import Request
from runner.config.compose import Sources, compose
from runner.config.provenance import flattened
from runner.errors import Problem, RequestError, RunnerError
from runner.launcher.supervisor import rank_reports
from runner.report.text import counted
from runner.rundir import checkpoints, lock
from runner.rundir.directory import (
    ACTIVE,
    YAML_FILE,
    RunDir,
    display_path,
    facts_of,
    is_alive,
    no_such_run_problem,
    process_birth,
    run_without_spec,
    write_atomically,
)
from runner.runs import input_digests
from runner.runs.inputs import with_absolute_paths
from runner.spec import LocalPlace, RunSpec

FREE = ("hw.", "deepspeed.", "where.", "push.", "track.", "run.", "eval.", "train.max_steps", "train.num_epochs",
        "train.save_every_", "train.keep_checkpoints", "train.hang_minutes", "train.micro_batch_size",
        "train.accumulation_steps", "train.gradient_checkpointing", "train.attention", "train.liger",
        "train.on_loss_spike", "train.spike_factor")  # fmt: skip
"""Keys that may differ from the first part of the run: where and how it is computed, how long, what is kept and
shown."""
FORMS = {
    "none": "torch's", "zero1": "flat", "zero2": "flat", "zero2_offload": "flat", "zero3": "by weight",
    "zero3_offload": "by weight",
}  # fmt: skip
"""How the optimiser's state lies in a checkpoint. DeepSpeed 0.19.8 converts between numbers of processes and, among
those alike, between stages; a universal checkpoint of ZeRO-2 fails an assertion when ZeRO-3 loads it."""


def resume_request(run: RunDir, overrides: tuple[str, ...], config_dirs: tuple[Path, ...]) -> Request:
    """The run as it was, with what was typed now; the batch is divided anew where the hardware is another."""
    words = {word.partition("=")[0].lstrip("+") for word in overrides}
    derived = ("train.micro_batch_size", "train.accumulation_steps")
    if any(word == "hw" or word.startswith("hw.") for word in words) and not words & set(derived):
        overrides = (*(f"{key}=auto" for key in derived), *overrides)
    if "run.on_changed_inputs" not in words:  # a permission is for one resume
        overrides = ("run.on_changed_inputs=stop", *overrides)
    groups = ("hw", "deepspeed", "track")
    return Request(overrides=overrides, config_dirs=config_dirs, spec_file=run.spec_file, exchange=groups)


def check_can_resume(run: RunDir) -> None:
    """RequestError for a folder that is no run."""
    if run.spec_file.is_file():
        return
    problem = no_such_run_problem(run.path)
    if run_without_spec(run.path) is None:
        why = "is no run: it has no spec.json" if run.path.exists() else "does not exist"
        found = str(problem.remedy).startswith("did you mean") or run.path.parent == Path()
        problem = Problem(f"{display_path(run.path)} {why}", "command line", problem.remedy if found else _list(run))
    raise RequestError(problem)


def compose_resumed(run: RunDir, asked: Request) -> RunSpec:
    """The composed spec; RequestError for a run that is at work, that is done, or that would become another one."""
    _check_idle(run)
    asked_for = compose(asked)  # first: a file that is no run is told there
    old = with_absolute_paths(run.spec)
    new = with_absolute_paths(asked_for)
    same = input_digests.with_moved_places(run, old, new)
    before, after = (dict(flattened(spec.model_dump(mode="json"))) for spec in (old, same))
    find = Sources(asked)
    changed = [key for key in after if before.get(key) != after[key] and not key.startswith(FREE)]
    remedy = f"start a run of its own: python -m runner {quote(display_path(run.spec_file))} …"
    problems = [
        Problem(f"{key} was {before.get(key)} and cannot become {after[key]} in the middle of a run", find(key), remedy)
        for key in changed
    ]
    if problems:
        raise RequestError(*problems)
    _check_longer(run, old, new)
    return new


def _check_longer(run: RunDir, old: RunSpec, new: RunSpec) -> None:
    """A run that is done goes on only if there are more steps to do, after its last one: never over what it has."""
    status = run.status
    if status.get("state") != "done":
        return
    steps = int(status.get("step", 0))
    longer = (new.train.max_steps, new.train.num_epochs) != (old.train.max_steps, old.train.num_epochs)
    if not longer or (new.train.max_steps or math.inf) <= steps:
        remedy = f"to train longer, resume with train.max_steps={2 * steps or 100}, say"
        raise RequestError(Problem(f"{run.id} is done: all {counted(steps, 'step')}", "command line", remedy))
    if checkpoints.newest(run) is None:
        what = f"{run.id} is done, and has no whole checkpoint from which it could be made longer"
        again = f"python -m runner {quote(display_path(run.spec_file))} …"
        remedy = f"{again} starts another one (train.keep_checkpoints=0 keeps none)"
        raise RequestError(Problem(what, "command line", remedy))


def check_same_run(run: RunDir, spec: RunSpec) -> list[str]:
    """Notes about what the checkpoint means for the resolved run; RequestError where it cannot be taken up."""
    step = (checkpoints.complete(run) or [0])[-1]
    if not step:
        return ["there is no complete checkpoint: the run starts again from the beginning"]
    old = run.spec
    problems = input_digests.changed_inputs(run, spec)
    if _batch(old) != _batch(spec):
        what = f"{spec.hw.name} makes the global batch {_batch(spec)}, and the first {step} steps took {_batch(old)}"
        remedy = f"take a number of processes that divides {_batch(old)}, or set train.micro_batch_size"
        problems.append(Problem(what, "hw", remedy))
    if _form(spec) != _form(old):
        what = f"the checkpoint was written with deepspeed={old.deepspeed.name} and cannot be read with"
        alike = ", ".join(f"deepspeed={stage}" for stage in FORMS if FORMS[stage] == _form(old))
        problems.append(Problem(f"{what} deepspeed={spec.deepspeed.name}", "deepspeed", f"write {alike}"))
    if problems:
        raise RequestError(*problems)
    if old.deepspeed.name != "none" and run.read("pod.json") and isinstance(spec.where, LocalPlace):
        return ["DeepSpeed unpickles its checkpoint, and a pod wrote it: go on here only if you trust that pod"]
    return []


def unfinished_note(asked: Request) -> list[str]:
    """A note for a new run that is started from the `spec.json` of one that could go on."""
    if asked.spec_file is None:
        return []
    run = RunDir(asked.spec_file.parent)
    done = checkpoints.complete(run)
    if not done or run.state() not in ("failed", "interrupted", "killed"):
        return []
    command = f"python -m runner resume {quote(display_path(run.path))}"
    return [f"a new run; {command} would go on after step {done[-1]} of {run.id}"]


def record_spec(run: RunDir, spec: RunSpec, overrides: tuple[str, ...]) -> None:
    """The spec that is in force from now on; `resumes.json` keeps what was typed, and after which step."""
    spent = run.spent()
    before: list[Any] = run.read("resumes.json").get("resumes", [])
    step = (checkpoints.complete(run) or [0])[-1]
    run.write("resumes.json", {"resumes": [*before, {"after_step": step, "overrides": list(overrides)}]})
    run.write_spec(with_absolute_paths(spec))
    input_digests.record_digests(run, spec)
    run.set_status("created", exit_code=None, error=None, oom=None, spent=spent, started=None, **facts_of(spec))


@contextmanager
def recording_resume(run: RunDir, spec: RunSpec, overrides: tuple[str, ...]) -> Iterator[None]:
    """`record` for a resume; one that fails before it has kept a step leaves spec.json and inputs.json as they were,
    since the next resume starts from those."""
    files, step = (run.spec_file, run.path / YAML_FILE), (checkpoints.complete(run) or [0])[-1]
    before = {file: file.read_text("utf-8") for file in files if file.is_file()}
    inputs = run.read(input_digests.FILE)
    record_spec(run, spec, overrides)

    def undo() -> None:
        for file, text in before.items():
            write_atomically(file, text)
        run.write(input_digests.FILE, inputs)

    try:
        yield
    except RunnerError:
        undo()
        raise
    if run.state() == "failed" and (checkpoints.complete(run) or [0])[-1] == step:
        undo()


def _form(spec: RunSpec) -> str:
    return FORMS[spec.deepspeed.name]


def _batch(spec: RunSpec) -> int:
    return int(spec.train.micro_batch_size) * int(spec.train.accumulation_steps) * spec.hw.world_size


def _check_idle(run: RunDir) -> None:
    """Refuse a run with a live process, also one without the lock (rundir/lock.py): torchrun's ranks do not inherit
    it."""
    status, state, here = run.status, run.state(), socket.gethostname()
    busy = [sign for sign in rank_reports(run) if sign["state"] == "alive" and is_alive(sign["pid"], sign.get("born"))]
    if busy:
        raise RequestError(lock.run_at_work_error(run, {"pid": busy[0]["pid"]}))
    if state not in ACTIVE:
        return
    if status.get("pid") is None:
        what = f"{run.id} is in a pod ({status.get('host')}): {state}, as far as is known here"
        raise RequestError(Problem(what, "command line", f"python -m runner attach {run.id}, or fetch {run.id}"))
    problem = lock.run_at_work_error(run, status)
    if status.get("host") == here:
        raise RequestError(problem)
    boot = str(process_birth(os.getpid())).partition(":")[0]
    if str(status.get("born")).partition(":")[0] != boot:  # else: another container, or name, of this machine
        gone = f"if {status.get('host')} is no more, delete {display_path(run.path / 'status.json')} and resume again"
        raise RequestError(Problem(problem.what, problem.source, f"{problem.remedy}; {gone}"))


def _list(run: RunDir) -> str:
    return f"python -m runner runs --output-dir {quote(display_path(run.path.parent))} lists them"
