"""Paths of the project's own files, in a checkout or in the installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The package itself, wherever it is installed."""
VENDOR = PACKAGE / "web" / "vendor"
"""Files of other projects that pages carry: `VENDOR / "uplot" / "uPlot.iife.min.js"`; its README.md lists them."""

# The wheel carries conf/, recipes/ and deepspeed_configs/ below runner/assets; a checkout has
# them beside runner/.
ASSETS = PACKAGE / "assets" if (PACKAGE / "assets").is_dir() else PACKAGE.parent
CONF = ASSETS / "conf"
RECIPES = ASSETS / "recipes"
DEEPSPEED_CONFIGS = ASSETS / "deepspeed_configs"
CONSTRAINTS = ASSETS / "constraints.txt"


def cache_dir() -> Path:
    """Folder for what can be made again: tokenised data, dequantised models.

    `RUNNER_CACHE` names it; else it is `runner` below `XDG_CACHE_HOME` or `~/.cache`.
    """
    if named := os.environ.get("RUNNER_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "runner"


def state_dir() -> Path:
    """Folder for what must not be lost: the ledger of rented pods, and their keys.

    `RUNNER_STATE` names it; else it is `runner` below `XDG_STATE_HOME` or `~/.local/state`.
    """
    if named := os.environ.get("RUNNER_STATE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "runner"
