"""A model's `config.json` from the Hub over HTTP: a few kilobytes, without huggingface_hub.

The address is huggingface_hub's own: HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config import credentials, json_text
from runner.errors import Problem, RequestError
from runner.paths import cache_dir
from runner.rundir.directory import write_atomically

if TYPE_CHECKING:
    from urllib.error import HTTPError

TIMEOUT_S = 5.0
_unreachable: dict[str, str] = {}
"""Hubs that this process did not reach, and why: nobody waits for one twice."""
LARGEST = 1_000_000  # bytes; a config.json has a few thousand


class UnreachableError(RequestError):
    """The Hub said nothing about the model: no network, no answer in time, or an error of its own."""


def config(model_id: str, revision: str | None = None) -> dict[str, object]:
    """The parsed config.json; kept in the cache. RequestError says what stands in the way, and what to do."""
    found = kept(model_id, revision)
    if found is not None:
        return found
    text = _get(model_id, revision or "main")
    content = _parsed(text, model_id)
    file = _file(model_id, revision)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    return content


def kept(model_id: str, revision: str | None = None) -> dict[str, object] | None:
    """What an earlier `config` has kept; None where there was none."""
    file = _file(model_id, revision)
    return _parsed(file.read_text("utf-8"), model_id) if file.is_file() else None


def _file(model_id: str, revision: str | None) -> Path:
    name = "--".join([*model_id.split("/"), (revision or "main").replace("/", "--")])
    return cache_dir() / "configs" / f"{name}.json"


def gate(model_id: str) -> str:
    """How a gated model is opened."""
    return f"accept its licence at https://huggingface.co/{model_id}, then export HF_TOKEN=…"


def check_dataset(dataset_id: str) -> None:
    """RequestError for a data set that is not there, or closed; UnreachableError where nobody says so."""
    import urllib.error
    import urllib.parse

    remedy = "check the network, or bring the rows in a file: data=file data.path=…"
    try:
        _asked(f"api/datasets/{urllib.parse.quote(dataset_id)}", dataset_id, dataset_id, remedy)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403, 404):
            raise UnreachableError(Problem(f"the Hub answered {error.code} for {dataset_id}", None, remedy)) from None
        spelling = "check the spelling (org/name); for a private data set set HF_TOKEN"
        what = f"{dataset_id} is not on the Hugging Face Hub, or private"
        raise RequestError(Problem(what, "data.id", spelling)) from None


def _get(model_id: str, revision: str) -> str:
    import urllib.error  # 24 ms with what it imports, once per model
    import urllib.parse

    folder = f"name a folder that has its config.json (hf download {model_id} config.json --local-dir .): model.id=."
    path = f"{urllib.parse.quote(model_id)}/resolve/{urllib.parse.quote(revision)}/config.json"
    try:
        return _asked(path, f"config.json of {model_id}", model_id, folder)
    except urllib.error.HTTPError as error:
        kind = UnreachableError if error.code >= 500 or error.code == 429 else RequestError
        raise kind(_refused(model_id, error)) from None


def _asked(path: str, wanted: str, name: str, remedy: str) -> str:
    """What the Hub answers; UnreachableError where it does not, HTTPError where it refuses."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UnreachableError(Problem(f"HF_HUB_OFFLINE is set: {wanted} is not here", None, remedy))
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if base in _unreachable:
        raise UnreachableError(Problem(f"the Hub cannot be reached for {name}: {_unreachable[base]}", None, remedy))
    request = urllib.request.Request(f"{base.rstrip('/')}/{path}")
    if (secret := credentials.hub_token()) is not None:
        # Unredirected: a redirect to a storage host must not get the token.
        request.add_unredirected_header("Authorization", f"Bearer {secret}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(LARGEST)
            return content.decode("utf-8")
    except urllib.error.HTTPError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        _unreachable[base] = str(why)
        raise UnreachableError(Problem(f"the Hub cannot be reached for {name}: {why}", None, remedy)) from None


def _refused(model_id: str, error: HTTPError) -> Problem:
    if error.code in (401, 403):
        what = f"{model_id} is gated or private on the Hugging Face Hub, or does not exist"
        return Problem(what, None, gate(model_id))
    if error.code == 404:
        return Problem(f"the Hub has no config.json for {model_id}", None, "check model.id and model.revision")
    return Problem(f"the Hub answered {error.code} for {model_id}", None, "try again, or name a local folder")


def _parsed(text: str, model_id: str) -> dict[str, object]:
    try:
        content = json_text.loads(text)
    except ValueError as error:
        raise RequestError(Problem(f"config.json of {model_id} is not JSON: {error}")) from None
    if not isinstance(content, dict):
        raise RequestError(Problem(f"config.json of {model_id} is not a JSON object"))
    return content
