"""Evaluate a finished run's model, in a worker process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from runner.config.repeat import spec_of
from runner.errors import CannotRunError, Problem, RequestError
from runner.report.invocation import install
from runner.rundir.find import find, unfinished
from runner.runs.artifact_process import MODULE, environment
from runner.runs.chat import look_at_base, says_words


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure."""

    data: Path | None = None
    """Rows, if not the run's held-out ones."""
    tasks: str | None = None
    """Benchmarks, with commas between them."""
    tasks_dir: Path | None = None
    limit: int | None = None
    base: bool = False


def evaluate(run_dir: Path, wanted: EvaluateOptions, as_json: bool) -> int:
    """Its exit code; RequestError where there is no model, CannotRunError for benchmarks without lm-eval."""
    run = find(run_dir)
    says_words(spec_of(run.spec_file))
    if not wanted.base and not (run.path / "model").is_dir():
        raise unfinished(run, "or measure the model as it was: --base")
    for place, option in ((wanted.data, "--data"), (wanted.tasks_dir, "--tasks-dir")):
        if place is not None and not place.exists():
            raise RequestError(Problem(f"there is no {place}", option))
    if wanted.tasks and util.find_spec("lm_eval") is None:
        what = "benchmarks need lm-eval, which is not installed"
        raise CannotRunError(Problem(what, "--tasks", install("eval")))
    look_at_base(run, wanted.base)
    words = ["--base"] * wanted.base + ["--json"] * as_json
    for option in ("data", "tasks", "tasks_dir", "limit"):
        value = getattr(wanted, option)
        words += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    command = [sys.executable, "-m", MODULE, "eval", str(run.spec_file), *words]
    return subprocess.call(command, env=environment())
