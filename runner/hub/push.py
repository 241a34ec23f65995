"""Upload a run's model to the Hub or S3: `python -m runner.hub.push runs/<id>`.

That is what the agent runs in a pod, with the keys that it was sent in the environment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from shlex import quote

from rich.console import Console

from runner.errors import CannotRunError, Problem, RequestError, RunFailedError, RunnerError
from runner.hub.upload import Pushed, push_model, target_of
from runner.report.text import print_problems
from runner.rundir.directory import RunDir
from runner.spec import RunSpec


def push(run_dir: Path, to: str | None = None, *, public: bool = False, merged: bool = False) -> Pushed:
    """Upload `model/` (or `merged/`) of a finished run, by default to its `push.to`: address, commit, files.

    RequestError for what cannot be pushed, CannotRunError without the library, RunFailedError where it fails.
    """
    run = RunDir.find(run_dir)
    spec = run.spec
    folder = _folder(run, merged)
    if (to := to or spec.push.to) is None:
        remedy = f"python -m runner push {quote(str(run.path))} org/name"
        raise RequestError(Problem("the run has no push.to, and no repository was named", "command line", remedy))
    target = target_of(to, public=public)
    target.prepare()
    return push_model(run, spec, folder, target)


def check_push(spec: RunSpec) -> list[str]:
    """Make the place for the model before the run begins; notes. RequestError where nothing may be written there."""
    if spec.push.to is None:
        return []
    try:
        target_of(spec.push.to).prepare()
    except RunFailedError as error:  # a Hub that does not answer now may do so in hours
        return [f"push.to={spec.push.to}: {error}; it is tried again when the model is there"]
    except CannotRunError as error:
        if spec.is_rented and "not installed" in str(error):  # it is installed in the pod
            return []
        raise _named(spec, error) from None
    except RequestError as error:
        raise _named(spec, error) from None
    return []


def push_finished(run: RunDir) -> str:
    """The address of the model of a run that has just ended well. RunFailedError where it did not go there."""
    try:
        return str(push(run.path)["url"])
    except RunnerError as error:
        again = f"python -m runner push {quote(str(run.path))}"
        told = (Problem(f"the model is in {run.path}/model and was not uploaded: {p.what}", p.source, p.remedy)
                for p in error.problems)  # fmt: skip
        raise RunFailedError(*told, Problem("the training itself is done", None, again)) from None


def _named(spec: RunSpec, error: RunnerError) -> RunnerError:
    return type(error)(*(Problem(p.what, p.source or f"push.to={spec.push.to}", p.remedy) for p in error.problems))


def _folder(run: RunDir, merged: bool) -> Path:
    """What is pushed; RequestError where the run has not left it."""
    folder = run.path / ("merged" if merged else "model")
    if not folder.is_dir() or not run.summary:
        what = f"{run.path} has no {folder.name}/: its state is {run.state()}"
        remedy = f"python -m runner {'merge' if merged else 'resume'} {quote(str(run.path))}"
        raise RequestError(Problem(what, None, remedy))
    return folder


def main(argv: list[str]) -> int:
    """Upload, say where it is."""
    try:
        print(push(Path(argv[0]))["url"])
        return 0
    except RunnerError as error:
        print_problems(Console(stderr=True), error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
