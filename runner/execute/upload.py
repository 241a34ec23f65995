"""A finished model to the Hugging Face Hub or to S3: `python -m runner.execute.upload runs/<id> org/name|s3://…`.

Also what the agent runs in a pod for `where.push_to`. Keys come from the environment: HF_TOKEN, AWS_ACCESS_KEY_ID, ….
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from runner import links
from runner.errors import CannotRunError, Problem, RequestError, RunFailedError, RunnerError
from runner.report.problems import print_problems
from runner.rundir import RunDir

BESIDE = ("summary.json", "spec.json", "loss.png")
"""What goes with the weights, so that whoever finds them knows where they come from."""


def upload(run: RunDir, target: str) -> str:
    """Upload `model/` and what tells of it; the address. RequestError where there is no model."""
    folder = run.path / "model"
    if not folder.is_dir():
        what = f"{run.path} has no model: its state is {run.state()}"
        raise RequestError(Problem(what, None, f"python -m runner resume {run.path}"))
    links.refuse(folder, *(run.path / name for name in BESIDE))
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files |= {f"run/{name}": run.path / name for name in BESIDE if (run.path / name).is_file()}
    try:
        return _to_s3(files, target) if target.startswith("s3://") else _to_hub(files, target)
    except RunnerError:
        raise
    except Exception as error:  # of two libraries, with dozens of classes between them
        said = (str(error).splitlines() or ["no message"])[0]
        remedy = "look at the AWS_… keys" if target.startswith("s3://") else "HF_TOKEN must be set, and may write there"
        problem = Problem(f"the upload to {target} failed: {type(error).__name__}: {said}", None, remedy)
        raise RunFailedError(problem) from None


def _to_hub(files: dict[str, Path], target: str) -> str:
    """One commit to a private repository, which is made if it is not there."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(target, private=True, exist_ok=True)
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()]
    done = api.create_commit(target, operations=added, commit_message="Model from llm-finetuning-runner")
    return str(done.commit_url)


def _to_s3(files: dict[str, Path], target: str) -> str:
    """Every file below the prefix, in parts."""
    try:
        import boto3
    except ImportError:
        what = "an upload to S3 needs boto3, which is not installed"
        raise CannotRunError(Problem(what, f"where.push_to={target}", "pip install boto3")) from None
    bucket, _, prefix = target.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for name, file in files.items():
        client.upload_file(str(file), bucket, f"{prefix.rstrip('/')}/{name}".lstrip("/"))
    return target


def main(argv: list[str]) -> int:
    """Upload, say where it is."""
    try:
        print(upload(RunDir(Path(argv[0])), argv[1]))
        return 0
    except RunnerError as error:
        print_problems(Console(stderr=True), error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
