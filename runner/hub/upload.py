"""Upload a model with its card and spec, or a checkpoint, to a repository on the Hub or a prefix in an S3 bucket.

`python -m runner.hub.upload runs/<id>` is what the agent runs in a pod, with the keys that it was sent.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from shlex import quote
from typing import Any, Protocol, TypedDict, TypeVar

from rich.console import Console

from runner.config import json_text
from runner.errors import CannotRunError, Problem, RequestError, RunFailedError, RunnerError
from runner.hub.model_card import base_name, card_text
from runner.report.text import dump, print_problems
from runner.rundir import checkpoints, plain_files
from runner.rundir.directory import RunDir
from runner.spec import RunInfo, RunSpec
from runner.spec.input_paths import is_url, named_places, put_place

Files = Mapping[str, Path | bytes]
"""Path below the target → a file here, or its content."""
Answer = TypeVar("Answer")
WRITE = "export HF_TOKEN=… with a token that may write (huggingface.co/settings/tokens)"


class UploadFacts(TypedDict, total=False):
    """The content of `pushed.json`."""

    url: str
    repo: str
    """On the Hub: its name there."""
    commit: str


class UploadResult(UploadFacts):
    """The same, with the files that went."""

    files: list[str]


class Target(Protocol):
    """Interface of an upload target. Errors: RequestError for keys and names, RunFailedError for failures."""

    @property
    def repo(self) -> str | None:
        """Repository name on the Hub."""

    def prepare(self) -> None:
        """Make the repository, or find that the bucket may be used: before hours are spent on what goes there."""

    def send(self, files: Files, message: str, without: Sequence[str] = ()) -> UploadFacts:
        """Upload files, delete the folders `without`: facts for `pushed.json`."""

    def folders(self, below: str) -> list[str]:
        """Names of the folders that are in one there."""


def target_of(name: str, *, public: bool = False) -> Target:
    """`org/name` or `s3://bucket/prefix`; RequestError for neither, CannotRunError without its library."""
    hub = re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name)
    if not hub and not re.fullmatch(r"s3://[^/]+(/.*)?", name):
        what = f"{name!r} is not the name of a repository on the Hub, and no s3:// address"
        raise RequestError(Problem(what, None, "write ORG/NAME, with your user name or an organisation's"))
    module, package = ("huggingface_hub", "huggingface-hub") if hub else ("boto3", "boto3")
    if util.find_spec(module) is None:
        what = f"{package}, which uploads to {name}, is not installed"
        raise CannotRunError(Problem(what, None, f"pip install {package}"))
    return Hub(name, public) if hub else S3(name)


@dataclass(frozen=True)
class Hub:
    """A repository for a model. What is sent is one commit: all of it or nothing."""

    repo: str
    public: bool = False
    """Of a repository that is made; one that is there stays as it is."""

    def prepare(self) -> None:
        """Make the repository if it is not there."""
        from huggingface_hub import HfApi  # 0.3 s

        self._asked(lambda: HfApi().create_repo(self.repo, private=not self.public, exist_ok=True))
        self._asked(lambda: HfApi().auth_check(self.repo, write=True))  # one that is there may be somebody else's

    def send(self, files: Files, message: str, without: Sequence[str] = ()) -> UploadFacts:
        """One commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        added = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
        deleted = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in without]
        done = self._asked(lambda: HfApi().create_commit(self.repo, [*added, *deleted], commit_message=message))
        return {"repo": self.repo, "url": str(done.repo_url), "commit": done.oid}

    def folders(self, below: str) -> list[str]:
        """By the paths of all files."""
        from huggingface_hub import HfApi

        paths = self._asked(lambda: HfApi().list_repo_files(self.repo))
        return sorted({path.split("/")[1] for path in paths if path.startswith(f"{below}/") and path.count("/") > 1})

    def _asked(self, ask: Callable[[], Answer]) -> Answer:
        """The Hub's answer, or its refusal in words."""
        from httpx2 import HTTPError  # what huggingface_hub calls the Hub with
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        try:
            return ask()
        except LocalTokenNotFoundError:
            raise RequestError(Problem("there is no token for the Hub", None, WRITE)) from None
        except OfflineModeIsEnabled:
            raise CannotRunError(Problem("HF_HUB_OFFLINE is set", None, "unset it to push")) from None
        except HfHubHTTPError as error:
            raise self._refused(error) from None
        except (HTTPError, OSError, ValueError) as error:
            what = f"the Hub cannot be reached: {error}"
            raise RunFailedError(Problem(what, None, "try again; nothing went")) from None

    def _refused(self, error: Any) -> RequestError | RunFailedError:
        status = error.response.status_code
        if status == 401:
            return RequestError(Problem("the Hub does not accept the token", None, WRITE))
        if status == 403:
            return RequestError(Problem(f"the token may not write to {self.repo}", None, WRITE))
        words = getattr(error, "server_message", None) or str(error).splitlines()[0]
        return RunFailedError(Problem(f"the Hub answered {status}: {words}", None, "try again; nothing was changed"))


@dataclass(frozen=True)
class S3:
    """A prefix in a bucket: file by file, in the order in which they are given."""

    address: str
    repo: None = None

    def prepare(self) -> None:
        """Ask for the bucket."""
        bucket, _ = self._place()
        self._asked(lambda client: client.head_bucket(Bucket=bucket))

    def send(self, files: Files, message: str, without: Sequence[str] = ()) -> UploadFacts:
        """Every file, in parts; then what goes."""
        bucket, prefix = self._place()

        def upload(client: Any) -> None:
            for name, file in files.items():
                if isinstance(file, Path):
                    client.upload_file(str(file), bucket, prefix + name)
                else:
                    client.put_object(Bucket=bucket, Key=prefix + name, Body=file)
            for folder in without:
                pages = client.get_paginator("list_objects_v2")
                for page in pages.paginate(Bucket=bucket, Prefix=f"{prefix}{folder}/"):
                    for entry in page.get("Contents", ()):
                        client.delete_object(Bucket=bucket, Key=entry["Key"])

        self._asked(upload)
        return {"url": self.address}

    def folders(self, below: str) -> list[str]:
        """Common prefixes."""
        bucket, prefix = self._place()
        start = f"{prefix}{below}/"
        found = self._asked(lambda client: client.list_objects_v2(Bucket=bucket, Prefix=start, Delimiter="/"))
        return [entry["Prefix"][len(start) : -1] for entry in found.get("CommonPrefixes", ())]

    def _place(self) -> tuple[str, str]:
        bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        return bucket, f"{prefix.strip('/')}/".lstrip("/")

    def _asked(self, ask: Callable[[Any], Answer]) -> Answer:
        import boto3
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return ask(boto3.client("s3"))
        except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
            said = (str(error).splitlines() or ["no message"])[0]
            what = f"the upload to {self.address} failed: {type(error).__name__}: {said}"
            raise RunFailedError(Problem(what, None, "look at the bucket's name and the AWS_… keys")) from None


BESIDE = ("summary.json", "loss.png")
"""What goes along with the weights, the card and the spec."""
RECORD = "pushed.json"
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints there."""


def push_model(run: RunDir, spec: RunSpec, folder: Path, target: Target) -> UploadResult:
    """Upload `model/` or `merged/`, and record it in `pushed.json`; its address, and the files that went.

    RequestError for a folder with links.
    """
    files = _files(run, spec, folder, target.repo)
    done = target.send(files, run.id)
    run.write(RECORD, {**run.read(RECORD), **done, "folder": folder.name})
    return {**done, "files": sorted(files)}


def push_checkpoint(run: RunDir, folder: Path, step: int, keep: int, target: Target) -> None:
    """Upload a whole checkpoint as it is, so that a run can go on from it, and delete all but the last `keep` there."""
    files: dict[str, Path | bytes] = {
        f"{CHECKPOINTS}/checkpoint-{step}/{file.relative_to(folder)}": file
        for file in sorted(folder.rglob("*"), key=lambda file: file.name == checkpoints.MARKER)  # what makes it count
        if file.is_file()
    }
    there = sorted(
        (name for name in target.folders(CHECKPOINTS) if name != f"checkpoint-{step}"),
        key=lambda name: int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else -1,
    )
    old = [f"{CHECKPOINTS}/{name}" for name in there[: max(0, len(there) + 1 - keep)]]
    done = target.send(files, f"{run.id}, the checkpoint after step {step}", old)
    run.write(RECORD, {**run.read(RECORD), **done, "checkpoint": step})


def _files(run: RunDir, spec: RunSpec, folder: Path, repo: str | None) -> Files:
    plain_files.refuse_special_files(folder, *(run.path / name for name in BESIDE))
    beside = [name for name in BESIDE if (run.path / name).is_file()]
    adapter = (folder / "adapter_config.json").is_file()
    text = card_text(spec, run, repo, adapter=adapter, picture="loss.png" in beside)
    files: dict[str, Path | bytes] = {
        str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    files |= {name: run.path / name for name in beside}
    if summary := run.summary:
        files["summary.json"] = dump({key: value for key, value in summary.items() if key != "model_dir"}).encode()
    files |= {"README.md": text.encode(), "spec.json": dump(_portable(spec)).encode()}
    if adapter:
        files["adapter_config.json"] = _with_base(folder / "adapter_config.json", spec)
    return files


def _portable(spec: RunSpec) -> dict[str, Any]:
    """The spec without the folders of this machine, or pod: whoever repeats the run has the files beside it."""
    values = spec.model_dump(mode="json")
    for key, path in named_places(spec):
        if not is_url(path):
            put_place(values, key, Path(path).name)
    if Path(spec.run.output_dir).is_absolute():
        values["run"]["output_dir"] = RunInfo.model_fields["output_dir"].default
    return values


def _with_base(file: Path, spec: RunSpec) -> bytes:
    """The adapter's settings; a base in a folder of this machine is called by its name."""
    config = json_text.loads(file.read_text("utf-8"))
    if str(config.get("base_model_name_or_path") or "").startswith("/"):
        config["base_model_name_or_path"] = base_name(spec)
    return dump(config).encode()


def push_run(run_dir: Path, to: str | None = None, *, public: bool = False, merged: bool = False) -> UploadResult:
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
        return str(push_run(run.path)["url"])
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
        print(push_run(Path(argv[0]))["url"])
        return 0
    except RunnerError as error:
        print_problems(Console(stderr=True), error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
