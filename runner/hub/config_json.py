"""A model's config.json: in a folder, in the Hub's local cache, or from the Hub over HTTP.

It reads files and the variables HF_HOME and HF_HUB_CACHE, and imports neither transformers nor huggingface_hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from runner.config import credentials, json_text
from runner.errors import Problem, RequestError
from runner.hub.bounded import bounded
from runner.paths import cache_dir
from runner.rundir.directory import write_atomically

if TYPE_CHECKING:
    from urllib.error import HTTPError

TIMEOUT_S = 5.0  # between two bytes
TOTAL_S = 15.0  # to the last one
_unreachable: dict[str, str] = {}
"""Hubs that this process did not reach, and why: nobody waits for one twice."""
LARGEST_ANSWER = 1_000_000  # bytes; a config.json has a few thousand


class UnreachableError(RequestError):
    """The Hub said nothing about the model: no network, no answer in time, or an error of its own."""


def local_config(model_id: str, revision: str | None = None) -> tuple[dict[str, object], str] | None:
    """The config.json of a model folder, or of a Hub id in the local Hugging Face cache, and its path.

    In the cache, the snapshot that `revision` (default `main`) points to; without such a reference, the
    newest snapshot. Raises RequestError, naming the file, for one that cannot be read or is not JSON.
    """
    file = _config_file(model_id, revision)
    return (_read(file), str(file)) if file else None


def is_cached(model_id: str) -> bool:
    """Weights of this Hub id are in the local cache."""
    repo = _repo(model_id)
    return any(any(repo.glob(f"snapshots/*/*.{ending}")) for ending in ("safetensors", "bin", "gguf"))


def _repo(model_id: str) -> Path:
    # repo_folder_name, huggingface_hub/file_download.py
    return cache_folder() / "--".join(("models", *model_id.split("/")))


def _config_file(model_id: str, revision: str | None) -> Path | None:
    folder = Path(model_id)
    if os.path.isdir(folder):
        file = folder / "config.json"
        return file if os.path.isfile(file) else None
    repo = _repo(model_id)
    wanted = revision or "main"
    reference = repo / "refs" / wanted
    commit = reference.read_text("utf-8").strip() if os.path.isfile(reference) else wanted
    file = repo / "snapshots" / commit / "config.json"
    if os.path.isfile(file):
        return file
    snapshots = [] if revision else [f for f in repo.glob("snapshots/*/config.json") if os.path.isfile(f)]
    return max(snapshots, key=lambda f: f.parent.stat().st_mtime_ns, default=None)


def instead_of(folder: Path) -> str | None:
    """What to write for a folder that is no model, but holds an adapter or a GGUF file; None for any other."""
    if os.path.isfile(adapter := folder / "adapter_config.json"):
        if os.path.isfile(folder.parent / "spec.json"):
            run = quote(str(folder.parent))
            return f"it holds an adapter: python -m runner merge {run}, and write model.id={run}/merged"
        base = json_text.object_of(adapter.read_text("utf-8", "replace")).get("base_model_name_or_path")
        return f"it holds an adapter; name its base model: model.id={base or 'org/name'}"
    gguf = min((file.name for file in folder.glob("*.gguf")), default=None)
    return f"write model.gguf_file={gguf}" if gguf else None


def cache_folder() -> Path:
    """The Hub's local cache, by the rules of `huggingface_hub/constants.py` (2.x)."""
    home = os.getenv("HF_HOME") or os.path.join(os.getenv("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.getenv("HF_HUB_CACHE") or os.getenv("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def _read(file: Path) -> dict[str, object]:
    try:
        config = json_text.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RequestError(Problem(f"cannot be read: {error.strerror}", str(file))) from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError
        raise RequestError(Problem(f"not JSON: {error}", str(file), "download the model again")) from None
    if not isinstance(config, dict):
        raise RequestError(Problem("not a config: expected a JSON object", str(file), "download the model again"))
    return config


def fetch(model_id: str, revision: str | None = None) -> dict[str, object]:
    """The parsed config.json; kept in the cache. RequestError says what stands in the way, and what to do."""
    found = fetched_before(model_id, revision)
    if found is not None:
        return found
    text = _get(model_id, revision or "main")
    content = _parsed(text, model_id)
    file = _file(model_id, revision)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    return content


def fetched_before(model_id: str, revision: str | None = None) -> dict[str, object] | None:
    """Return the cached result of an earlier `fetch`; None without one."""
    file = _file(model_id, revision)
    return _parsed(file.read_text("utf-8"), model_id) if file.is_file() else None


def _file(model_id: str, revision: str | None) -> Path:
    name = "--".join([*model_id.split("/"), (revision or "main").replace("/", "--")])
    return cache_dir() / "configs" / f"{name}.json"


def gated_remedy(model_id: str) -> str:
    """Return the remedy for a gated model."""
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
    from http.client import HTTPException

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UnreachableError(Problem(f"HF_HUB_OFFLINE is set: {wanted} is not here", None, remedy))
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if base in _unreachable:
        raise UnreachableError(Problem(f"the Hub cannot be reached for {name}: {_unreachable[base]}", None, remedy))
    request = urllib.request.Request(f"{base.rstrip('/')}/{path}")
    if (secret := credentials.hub_token()) is not None:
        # Unredirected: a redirect to a storage host must not get the token.
        request.add_unredirected_header("Authorization", f"Bearer {secret}")

    def read() -> bytes:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(LARGEST_ANSWER)
            return content

    try:
        return bounded(read, TOTAL_S).decode("utf-8")
    except urllib.error.HTTPError:
        raise
    except (OSError, ValueError, HTTPException) as error:
        why = getattr(error, "reason", error)
        if isinstance(error, HTTPException):
            why = "the server there does not speak HTTP"
        _unreachable[base] = str(why)
        raise UnreachableError(Problem(f"the Hub cannot be reached for {name}: {why}", None, remedy)) from None


def _refused(model_id: str, error: HTTPError) -> Problem:
    if error.code in (401, 403):
        what = f"{model_id} is gated or private on the Hugging Face Hub, or does not exist"
        return Problem(what, None, gated_remedy(model_id))
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
