"""Environment of a run: versions, hardware, code and data, for reproduction."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from runner import __version__
from runner.errors import Problem, RequestError
from runner.machine import kernels
from runner.paths import ASSETS
from runner.rundir import checkpoints
from runner.rundir.directory import RunDir
from runner.spec import RunSpec
from runner.train import varlen_attention
from runner.train.tokens.token_cache import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


FINGERPRINTS = {"data_fingerprint": "the rows", "tokenizer_fingerprint": "the tokenizer or its chat template"}


def fingerprints(tokenizer: PreTrainedTokenizerBase, data_fingerprint: str) -> dict[str, str]:
    """Digests of rows and tokenizer, which stay the same for the whole run."""
    return {"data_fingerprint": data_fingerprint, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}


def check_fingerprints(spec: RunSpec, run: RunDir, found: dict[str, str], step: int) -> None:
    """RequestError where the checkpoint was trained on other rows, or with another tokenizer."""
    known = checkpoints.facts(checkpoints.folder(run, step))
    changed = [what for key, what in FINGERPRINTS.items() if key in known and known[key] != found[key]]
    if step and changed and spec.run.on_changed_inputs == "stop":
        remedy = "restore them, or write run.on_changed_inputs=continue to use the new content"
        what = f"{' and '.join(changed)} are not those of the first {step} steps"
        raise RequestError(Problem(what, "resume", remedy))


def environment(spec: RunSpec, model: PreTrainedModel, source: str, found: dict[str, str]) -> dict[str, Any]:
    """Facts for `environment.json`; `found` are the fingerprints."""
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
        "attention_kernel": varlen_attention.kernel(model, spec.train.precision),
        "liger": kernels.liger(spec),
        **found,
        "seed": spec.train.seed,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """Output of git in the project's own checkout; None without one."""
    if not (ASSETS / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ASSETS, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
