"""Merge a run's adapter into its base model."""

from __future__ import annotations

from pathlib import Path

from runner.config.repeat import spec_of
from runner.errors import Problem, RequestError
from runner.rundir.find import find, unfinished
from runner.runs.artifact_process import produce
from runner.runs.chat import look_at_base, says_words


def merge(run_dir: Path, out: Path | None, as_json: bool) -> int:
    """Write the merged model to `out` (`merged/` in the run's folder); RequestError where there is no adapter."""
    run = find(run_dir)
    spec = spec_of(run.spec_file)
    says_words(spec)
    model = run.path / "model"
    if not spec.method.adapts:
        what = f"there is nothing to merge: method={spec.method.name} trains the model's own weights"
        remedy = f"{model} is a plain Hugging Face folder already" if model.is_dir() else None
        raise RequestError(Problem(what, str(run.spec_file), remedy))
    if not (model / "adapter_config.json").is_file():
        raise unfinished(run)
    look_at_base(run)
    return produce("merge", run, out or run.path / "merged", *["--json"] * as_json)
