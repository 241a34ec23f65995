"""A model's `config.json` straight from the Hugging Face Hub: a few kilobytes, without huggingface_hub.

The address and the token are huggingface_hub's own: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from runner.errors import Problem, RequestError
from runner.paths import cache_dir
from runner.rundir import write_atomically

if TYPE_CHECKING:
    from urllib.error import HTTPError

TIMEOUT_S = 5.0
LARGEST = 1_000_000  # bytes; a config.json has a few thousand


def config(model_id: str, revision: str | None = None) -> dict[str, Any]:
    """The parsed config.json; kept in the cache. RequestError says what stands in the way, and what to do."""
    wanted = revision or "main"
    name = "--".join([*model_id.split("/"), wanted.replace("/", "--")])
    kept = cache_dir() / "configs" / f"{name}.json"
    if kept.is_file():
        return _parsed(kept.read_text("utf-8"), model_id)
    text = _get(model_id, wanted)
    content = _parsed(text, model_id)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, text)
    return content


def _get(model_id: str, revision: str) -> str:
    import urllib.error  # 24 ms with what it imports, once per model
    import urllib.parse
    import urllib.request

    folder = f"name a folder that has its config.json (hf download {model_id} config.json --local-dir .): model.id=."
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise RequestError(Problem(f"HF_HUB_OFFLINE is set: config.json of {model_id} is not here", None, folder))
    base = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{base.rstrip('/')}/{urllib.parse.quote(model_id)}/resolve/{urllib.parse.quote(revision)}/config.json"
    request = urllib.request.Request(url)
    if os.environ.get("HF_TOKEN"):
        # Unredirected: a redirect to a storage host must not get the token.
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(LARGEST)
            return content.decode("utf-8")
    except urllib.error.HTTPError as error:
        raise RequestError(_refused(model_id, error)) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise RequestError(Problem(f"the Hub cannot be reached for {model_id}: {why}", None, folder)) from None


def _refused(model_id: str, error: HTTPError) -> Problem:
    if error.code in (401, 403):
        remedy = f"accept its licence at https://huggingface.co/{model_id}, then export HF_TOKEN=…"
        return Problem(f"{model_id} is gated or private on the Hugging Face Hub, or does not exist", None, remedy)
    if error.code == 404:
        return Problem(f"the Hub has no config.json for {model_id}", None, "check model.id and model.revision")
    return Problem(f"the Hub answered {error.code} for {model_id}", None, "try again, or name a local folder")


def _parsed(text: str, model_id: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise RequestError(Problem(f"config.json of {model_id} is not JSON: {error}")) from None
    if not isinstance(content, dict):
        raise RequestError(Problem(f"config.json of {model_id} is not a JSON object"))
    return content
