"""Find a run's model and hand it to the chat worker."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from runner import checkpoints, links, unchanged
from runner.errors import Problem, RequestError
from runner.execute.offline import environment
from runner.repeat import spec_of
from runner.report.summary import shown
from runner.rundir import ACTIVE, RunDir, all_runs
from runner.spec import Reward, RunSpec
from runner.suggest import nearest


def chat(run_dir: Path, prompt: str | None, base: bool, max_new_tokens: int, as_json: bool) -> int:
    """Talk to the run's model in a process of its own; RequestError where there is none to talk to."""
    run = find(run_dir)
    says_words(spec_of(run.spec_file))
    if not base and not (run.path / "model").is_dir():
        raise unfinished(run, "or talk to the model as it was: --base")
    look_at_base(run, base)
    command = [
        sys.executable,
        "-m",
        "runner.train.chat",
        str(run.spec_file),
        "--max-new-tokens",
        str(max_new_tokens),
    ]
    command += ["--base"] * base + ["--json"] * as_json + (["--prompt", prompt] if prompt is not None else [])
    return subprocess.call(command, env=environment())


def unfinished(run: RunDir, instead: str | None = None) -> RequestError:
    """A run that has no model yet: resumed where it has a checkpoint, else run again."""
    going_on = f"python -m runner resume {shlex.quote(shown(run.path))}"
    state = run.state()
    if state in ACTIVE:
        remedy = "wait for its end: python -m runner runs shows how far it is"
    elif checkpoints.complete(run):
        remedy = f"{going_on} goes on after step {checkpoints.complete(run)[-1]}"
    else:
        remedy = f"{going_on} begins it anew: it has no checkpoint"
    what = f"{shown(run.path)} has no model yet: its state is {state}"
    return RequestError(Problem(what, None, f"{remedy}, {instead}" if instead else remedy))


def look_at_base(run: RunDir, base: bool = False) -> None:
    """Say on stderr that the base has changed, where it is needed: below an adapter, or alone (`--base`)."""
    if not base and not (run.path / "model" / "adapter_config.json").is_file():
        return
    if line := unchanged.check_base(run, spec_of(run.spec_file)):
        print(line, file=sys.stderr)


def says_words(spec: RunSpec) -> None:
    """RequestError for a model that gives an answer one number."""
    if isinstance(spec.objective, Reward):
        what = "a reward model says nothing: it gives an answer a number"
        remedy = "load runs/<id>/model with AutoModelForSequenceClassification, or peft's class of that name"
        raise RequestError(Problem(what, "objective=reward", remedy))


def find(path: Path) -> RunDir:
    """The run at `path`, by its directory or its id below `runs/`; RequestError where its model is not plain files."""
    for candidate in (path, Path("runs") / path):
        if (candidate / "spec.json").is_file():
            links.refuse(candidate / "model")
            return RunDir(candidate)
    raise RequestError(missing(path))


def missing(path: Path) -> Problem:
    """There is no run at `path`; the one whose id is nearest."""
    parent = path.parent if path.parent.is_dir() and path.parent != Path() else Path("runs")
    near = nearest(path.name, [run.id for run in all_runs(parent)])
    remedy = f"did you mean {parent / near}?" if near else "python -m runner runs shows them"
    return Problem(f"there is no run {path}", "command line", remedy)
