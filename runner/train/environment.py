"""What the run ran on and with: versions, hardware, code and data, so that a result can be traced."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

import torch

from runner import __version__
from runner.paths import ASSETS
from runner.spec import RunSpec
from runner.train.tokenised import tokenizer_fingerprint

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "deepspeed",
    "tokenizers",
)


def environment(spec: RunSpec, model: Any, tokenizer: Any, source: str, data_fingerprint: str) -> dict[str, Any]:
    """Facts for `environment.json`."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "runner": __version__,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "num_threads": torch.get_num_threads(),
        "model_source": source,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "attention": model.config._attn_implementation,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "data_fingerprint": data_fingerprint,
        "seed": spec.train.seed,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Answer of git about the project's own checkout; None where there is none."""
    if not (ASSETS / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ASSETS, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
