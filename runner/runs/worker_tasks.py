"""Verbs that work in a process of their own: chat, evaluate, export, merge, prepare.

What writes a folder of weights writes it complete or not at all.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from rich.console import Console

from runner.errors import CannotRunError, Problem, RequestError, RunFailedError
from runner.launcher import inherited_ranks
from runner.machine import writable
from runner.report.invocation import install
from runner.rundir import checkpoints
from runner.rundir.atomic_folder import unfinished
from runner.rundir.directory import ACTIVE, RunDir, display_path
from runner.runs import input_digests
from runner.spec import RunSpec

MODULE = "runner.train.artifact_verbs"
# No GPU is needed to read what DeepSpeed wrote, and without one its import would announce that it found none.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}


def single_process_environment() -> dict[str, str]:
    """Environment of a single process, without the rank variables of another launcher."""
    return {**ENVIRONMENT, **inherited_ranks.without_ranks(os.environ)}


def produce_in_worker(verb: str, run: RunDir, target: Path, *arguments: str) -> int:
    """Have `verb` write `target` from the run; its exit code. Nothing of a killed one is left.

    RequestError where `target` exists or cannot be made; CannotRunError without torch; RunFailedError if killed.
    """
    _check_target(target)
    command = [sys.executable, "-m", MODULE, verb, str(run.spec_file), "--out", str(target), *arguments]
    worker = subprocess.Popen(command, env=single_process_environment())
    try:
        return exit_code_of(worker)
    finally:
        shutil.rmtree(unfinished(target, worker.pid), ignore_errors=True)


def exit_code_of(worker: subprocess.Popen[Any]) -> int:
    """Its exit code; RunFailedError if it was killed. A signal to this process is passed on, and it tidies up and ends:
    on a terminal Ctrl-C reaches it by itself."""
    previous = signal.signal(signal.SIGTERM, lambda number, frame: worker.send_signal(number))
    code = None
    try:
        while code is None:
            try:
                code = worker.wait()
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    worker.send_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code < 0:
        remedy = "the system's log (dmesg) says whether memory ran out" if code == -signal.SIGKILL else None
        raise RunFailedError(Problem(f"the process was ended by {signal.Signals(-code).name}", None, remedy))
    return code


def _check_target(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise RequestError(Problem(f"{target} exists", "--out", "name another folder with --out, or delete this one"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(Problem(f"{target} cannot be made: {error.strerror}", "--out")) from None
    if why := writable.why_not(target.parent):  # os.access says yes to root, also in /proc
        what = f"{target.parent} cannot be written to: {why}"
        raise RequestError(Problem(what, "--out", "name another folder with --out"))
    if util.find_spec("torch") is None or util.find_spec("peft") is None:
        what = "this needs torch, transformers and peft, which are not installed"
        raise CannotRunError(Problem(what, None, install("train")))


def no_model_yet(run: RunDir, instead: str | None = None) -> RequestError:
    """A run that has no model yet: resumed where it has a checkpoint, else run again."""
    going_on = f"python -m runner resume {shlex.quote(display_path(run.path))}"
    state = run.state()
    if state in ACTIVE:
        remedy = "wait for its end: python -m runner runs shows how far it is"
    elif checkpoints.complete(run):
        remedy = f"{going_on} continues after step {checkpoints.complete(run)[-1]}"
    else:
        remedy = f"{going_on} begins it anew: it has no checkpoint"
    what = f"{display_path(run.path)} has no model yet: its state is {state}"
    return RequestError(Problem(what, None, f"{remedy}, {instead}" if instead else remedy))


def chat(run_dir: Path, prompt: str | None, base: bool, max_new_tokens: int, as_json: bool) -> int:
    """Talk to the run's model in a process of its own; RequestError where there is none to talk to."""
    run = RunDir.find(run_dir)
    refuse_reward_model(run.spec)
    if not base and not (run.path / "model").is_dir():
        raise no_model_yet(run, "or talk to the model as it was: --base")
    report_changed_base(run, base)
    command = [sys.executable, "-m", "runner.train.chat", str(run.spec_file), "--max-new-tokens", str(max_new_tokens)]
    command += ["--base"] * base + ["--json"] * as_json + (["--prompt", prompt] if prompt is not None else [])
    return subprocess.call(command, env=single_process_environment())


def report_changed_base(run: RunDir, base: bool = False) -> None:
    """Say on stderr that the base has changed, where it is needed: below an adapter, or alone (`--base`)."""
    if not base and not (run.path / "model" / "adapter_config.json").is_file():
        return
    if line := input_digests.changed_base(run, run.spec):
        print(line, file=sys.stderr)


def refuse_reward_model(spec: RunSpec) -> None:
    """RequestError for a model that gives an answer one number."""
    if spec.objective.scores:
        what = "a reward model says nothing: it gives an answer a number"
        remedy = "load runs/<id>/model with AutoModelForSequenceClassification, or peft's class of that name"
        raise RequestError(Problem(what, "objective=reward", remedy))


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `eval`."""

    data: Path | None = None
    """Rows, if not the run's held-out ones."""
    tasks: str | None = None
    """Benchmarks, with commas between them."""
    tasks_dir: Path | None = None
    limit: int | None = None
    base: bool = False


def evaluate(run_dir: Path, options: EvaluateOptions, as_json: bool) -> int:
    """Its exit code; RequestError where there is no model, CannotRunError for benchmarks without lm-eval."""
    run = RunDir.find(run_dir)
    refuse_reward_model(run.spec)
    if not options.base and not (run.path / "model").is_dir():
        raise no_model_yet(run, "or measure the model as it was: --base")
    for place, option in ((options.data, "--data"), (options.tasks_dir, "--tasks-dir")):
        if place is not None and not place.exists():
            raise RequestError(Problem(f"there is no {place}", option))
    if options.tasks and util.find_spec("lm_eval") is None:
        what = "benchmarks need lm-eval, which is not installed"
        raise CannotRunError(Problem(what, "--tasks", install("eval")))
    report_changed_base(run, options.base)
    words = ["--base"] * options.base + ["--json"] * as_json
    for option in ("data", "tasks", "tasks_dir", "limit"):
        value = getattr(options, option)
        words += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    command = [sys.executable, "-m", MODULE, "eval", str(run.spec_file), *words]
    return subprocess.call(command, env=single_process_environment())


def export(run_dir: Path, step: int | None, out: Path | None, as_json: bool) -> int:
    """Write checkpoint `step`, or the newest that is whole, to `out` (`export-<step>/` in the run's folder).

    RequestError where there is no such checkpoint, or where its files are not those that were written.
    """
    run = RunDir.find(run_dir)
    _ = run.spec  # one that somebody has broken is refused here, not by the worker
    if step is None:
        console = Console(stderr=True)
        step = checkpoints.newest(run, lambda line: console.print(line, highlight=False, soft_wrap=True))
        if step is None:
            remedy = f"its state is {run.state()}; the first one comes after train.save_every_minutes, or at the end"
            raise RequestError(Problem(f"{run.path} has no complete checkpoint", None, remedy))
    else:
        _check_checkpoint(run, step)
    target = out or run.path / f"export-{step}"
    return produce_in_worker("export", run, target, "--step", str(step), *["--json"] * as_json)


def _check_checkpoint(run: RunDir, step: int) -> None:
    known = checkpoints.complete(run)
    if step not in known:
        what = f"checkpoint {step} is incomplete" if step in checkpoints.steps(run) else f"no checkpoint {step}"
        remedy = f"complete ones: {', '.join(map(str, known))}" if known else "the run has no complete checkpoint"
        raise RequestError(Problem(f"{run.path}: {what}", "--step", remedy))
    wrong = checkpoints.damage(checkpoints.folder(run, step))
    if wrong:
        others = ", ".join(str(one) for one in known if one != step)
        better = f"try another one: {others}" if others else None
        raise RequestError(*(Problem(f"checkpoint {step}: {line}", "--step", better) for line in wrong))


def merge(run_dir: Path, out: Path | None, as_json: bool) -> int:
    """Write the merged model to `out` (`merged/` in the run's folder); RequestError where there is no adapter."""
    run = RunDir.find(run_dir)
    spec = run.spec
    refuse_reward_model(spec)
    model = run.path / "model"
    if not spec.method.adapts:
        what = f"there is nothing to merge: method={spec.method.name} trains the model's own weights"
        remedy = f"{model} is a plain Hugging Face folder already" if model.is_dir() else None
        raise RequestError(Problem(what, str(run.spec_file), remedy))
    if not (model / "adapter_config.json").is_file():
        raise no_model_yet(run)
    report_changed_base(run)
    return produce_in_worker("merge", run, out or run.path / "merged", *["--json"] * as_json)


def prepare(spec: RunSpec, as_json: bool) -> int:
    """Exit code of the process; what it says goes where this one's words go. RequestError for data that are wrong."""
    from runner.runs.content_checks import check_contents  # the readers of rows, which no other of these verbs needs

    for note in check_contents(spec):
        print(f"Note    {note}", file=sys.stderr)
    command = [sys.executable, "-m", "runner.train.tokens.fill_token_cache", *["--json"] * as_json]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=single_process_environment())
    assert worker.stdin is not None
    with suppress(BrokenPipeError), worker.stdin:
        worker.stdin.write(spec.model_dump_json())
    return exit_code_of(worker)
