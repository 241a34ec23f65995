"""Chat with a run's model, in a worker process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runner.config.repeat import spec_of
from runner.errors import Problem, RequestError
from runner.rundir.directory import RunDir
from runner.rundir.find import find, unfinished
from runner.runs import input_digests
from runner.runs.artifact_process import environment
from runner.spec import Reward, RunSpec


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


def look_at_base(run: RunDir, base: bool = False) -> None:
    """Say on stderr that the base has changed, where it is needed: below an adapter, or alone (`--base`)."""
    if not base and not (run.path / "model" / "adapter_config.json").is_file():
        return
    if line := input_digests.check_base(run, spec_of(run.spec_file)):
        print(line, file=sys.stderr)


def says_words(spec: RunSpec) -> None:
    """RequestError for a model that gives an answer one number."""
    if isinstance(spec.objective, Reward):
        what = "a reward model says nothing: it gives an answer a number"
        remedy = "load runs/<id>/model with AutoModelForSequenceClassification, or peft's class of that name"
        raise RequestError(Problem(what, "objective=reward", remedy))
