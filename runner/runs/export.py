"""Export a run's checkpoint as a model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from runner.config.repeat import spec_of
from runner.errors import Problem, RequestError
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.rundir.find import find
from runner.runs.artifact_process import produce


def export(run_dir: Path, step: int | None, out: Path | None, as_json: bool) -> int:
    """Write checkpoint `step`, or the newest that is whole, to `out` (`export-<step>/` in the run's folder).

    RequestError where there is no such checkpoint, or where its files are not those that were written.
    """
    run = find(run_dir)
    spec_of(run.spec_file)
    if step is None:
        console = Console(stderr=True)
        step = checkpoints.newest(run, lambda line: console.print(line, highlight=False, soft_wrap=True))
        if step is None:
            remedy = f"its state is {run.state()}; the first one comes after train.save_every_minutes, or at the end"
            raise RequestError(Problem(f"{run.path} has no complete checkpoint", None, remedy))
    else:
        _check(run, step)
    target = out or run.path / f"export-{step}"
    return produce("export", run, target, "--step", str(step), *["--json"] * as_json)


def _check(run: RunDir, step: int) -> None:
    known = checkpoints.complete(run)
    if step not in known:
        what = f"checkpoint {step} was never finished" if step in checkpoints.steps(run) else f"no checkpoint {step}"
        remedy = f"complete ones: {', '.join(map(str, known))}" if known else "the run has no complete checkpoint"
        raise RequestError(Problem(f"{run.path}: {what}", "--step", remedy))
    wrong = checkpoints.damage(checkpoints.folder(run, step))
    if wrong:
        others = ", ".join(str(one) for one in known if one != step)
        better = f"try another one: {others}" if others else None
        raise RequestError(*(Problem(f"checkpoint {step}: {line}", "--step", better) for line in wrong))
