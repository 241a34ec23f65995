"""A run's model on the Hugging Face Hub, with a card and its spec: one commit, all of it or nothing."""

from __future__ import annotations

import json
import re
from importlib import util
from pathlib import Path
from typing import Any

from runner.data.files import is_url
from runner.errors import CannotRunError, Problem, RequestError, RunFailedError
from runner.execute.chat import find
from runner.inputs import named_places, put_place
from runner.report.card import base_name, card
from runner.report.problems import dump
from runner.rundir import RunDir
from runner.spec import RunSpec

BESIDE = ("spec.json", "summary.json", "loss.png")
"""What goes along with the weights and the card."""


def push(run_dir: Path, repo: str, *, public: bool, merged: bool) -> dict[str, Any]:
    """Upload `model/` (or `merged/`) of a finished run to `repo`; its address, commit, and the files that went.

    RequestError for what cannot be pushed, CannotRunError without huggingface_hub, RunFailedError if the Hub refuses.
    """
    run = find(run_dir)
    folder = _folder(run, merged)
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repo):
        remedy = "write ORG/NAME, with your user name or an organisation's"
        raise RequestError(Problem(f"{repo!r} is not the name of a repository on the Hub", "command line", remedy))
    if util.find_spec("huggingface_hub") is None:
        what, remedy = "pushing needs huggingface_hub, which is not installed", "pip install huggingface-hub"
        raise CannotRunError(Problem(what, None, remedy))
    spec = RunSpec.model_validate(run.read("spec.json"))
    beside = [name for name in BESIDE if (run.path / name).is_file()]
    adapter = (folder / "adapter_config.json").is_file()
    text = card(spec, run, repo, adapter=adapter, picture="loss.png" in beside)
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files |= {name: run.path / name for name in beside}
    own: dict[str, Path | bytes] = {"README.md": text.encode(), "spec.json": dump(_portable(spec)).encode()}
    if adapter:
        own["adapter_config.json"] = _with_base(folder / "adapter_config.json", spec)
    done = _commit(repo, {**files, **own}, run.id, private=not public)
    run.write("pushed.json", {"repo": repo, "commit": done["commit"], "folder": folder.name})
    return done


def _portable(spec: RunSpec) -> dict[str, Any]:
    """The spec without the folders of this machine: whoever repeats the run has the files beside it."""
    values = spec.model_dump(mode="json")
    for key, path in named_places(spec):
        if not is_url(path):
            put_place(values, key, Path(path).name)
    return values


def _with_base(file: Path, spec: RunSpec) -> bytes:
    """The adapter's settings; a base in a folder of this machine is called by its name."""
    config = json.loads(file.read_text("utf-8"))
    if str(config.get("base_model_name_or_path") or "").startswith("/"):
        config["base_model_name_or_path"] = base_name(spec)
    return dump(config).encode()


def _folder(run: RunDir, merged: bool) -> Path:
    """What is pushed; RequestError where the run has not left it."""
    folder = run.path / ("merged" if merged else "model")
    if not folder.is_dir() or not run.read("summary.json"):
        what = f"{run.path} has no {folder.name}/: its state is {run.state()}"
        remedy = f"python -m runner merge {run.path}" if merged else f"python -m runner resume {run.path}"
        raise RequestError(Problem(what, None, remedy))
    return folder


def _commit(repo: str, files: dict[str, Path | bytes], message: str, *, private: bool) -> dict[str, Any]:
    """One commit with all files, in a repository that is made if there is none."""
    from httpx2 import HTTPError  # what huggingface_hub calls the Hub with
    from huggingface_hub import CommitOperationAdd, HfApi  # 0.3 s
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    hub = HfApi()
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        additions = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files.items()]
        commit = hub.create_commit(repo, additions, commit_message=message)
    except LocalTokenNotFoundError:
        raise RequestError(_keyless("there is no token for the Hub")) from None
    except OfflineModeIsEnabled:
        raise CannotRunError(Problem("HF_HUB_OFFLINE is set", None, "unset it to push")) from None
    except HfHubHTTPError as error:
        raise _refused(repo, error) from None
    except (HTTPError, OSError, ValueError) as error:
        raise RunFailedError(Problem(f"the Hub cannot be reached: {error}", None, "try again; nothing went")) from None
    return {"repo": repo, "url": str(commit.repo_url), "commit": commit.oid, "files": sorted(files)}


def _keyless(what: str) -> Problem:
    return Problem(what, None, "export HF_TOKEN=… with a token that may write (huggingface.co/settings/tokens)")


def _refused(repo: str, error: Any) -> RequestError | RunFailedError:
    status = error.response.status_code
    if status == 401:
        return RequestError(_keyless("the Hub does not accept the token"))
    if status == 403:
        return RequestError(_keyless(f"the token may not write to {repo}"))
    words = getattr(error, "server_message", None) or str(error).splitlines()[0]
    return RunFailedError(Problem(f"the Hub answered {status}: {words}", None, "try again; nothing was changed"))
