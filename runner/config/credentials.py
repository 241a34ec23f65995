"""Keys of the Hub, Weights & Biases, RunPod and S3: from the environment, else where their own tools keep them.

Nothing here prints, stores or sends a value.
"""

from __future__ import annotations

import netrc
import os
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
"""Names of the Hub's token: huggingface_hub's own, its old one, and LangChain's."""
S3 = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@dataclass(frozen=True)
class Key:
    """A key, and where it was found."""

    value: str = field(repr=False)
    source: str
    """A variable's name, or a file."""


def find_key(name: str) -> Key | None:
    """The key that a program reads from the variable `name`; None without one."""
    for variable in HUB if name == HUB[0] else (name,):
        if value := os.environ.get(variable, "").strip():
            return Key(value, variable)
    if name == HUB[0]:
        return _hub_file()
    return _netrc() if name == "WANDB_API_KEY" else None


def hub_token() -> str | None:
    """The Hub's token."""
    key = find_key(HUB[0])
    return key.value if key else None


def export_hub_token() -> None:
    """Put the Hub's token where huggingface_hub reads it: it does not know LangChain's variable."""
    key = find_key(HUB[0])
    if key is not None and key.source in HUB[1:] and not os.environ.get(HUB[0], "").strip():
        os.environ[HUB[0]] = key.value


def s3_variables() -> dict[str, str]:
    """Variables with the keys of S3: the environment's, else what boto3 finds (`~/.aws`, a role); empty without any."""
    if named := {name: os.environ[name] for name in S3 if os.environ.get(name)}:
        return named
    if util.find_spec("botocore") is None:
        return {}
    from botocore.session import get_session  # 0.2 s

    found = get_session().get_credentials()
    if found is None:
        return {}
    frozen = found.get_frozen_credentials()
    return dict(kept for kept in zip(S3, (frozen.access_key, frozen.secret_key, frozen.token), strict=True) if kept[1])


def _hub_file() -> Key | None:
    """The token that `hf auth login` has written (huggingface_hub/constants.py, HF_TOKEN_PATH)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    file = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"))).expanduser()
    try:
        value = file.read_text("utf-8").strip()
    except OSError:
        return None
    return Key(value, str(file)) if value else None


def _netrc() -> Key | None:
    """The key that `wandb login` has written."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].partition(":")[0]
    try:
        entry = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return Key(entry[2], "~/.netrc") if entry and entry[2] else None
