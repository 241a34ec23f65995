"""What there is to choose from: the files of `conf/` and `recipes/`, read without Hydra."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from runner.errors import Problem, RequestError
from runner.paths import CONF, DEEPSPEED_CONFIGS, RECIPES

GROUPS = ("model", "method", "hw", "deepspeed", "objective", "data", "where", "track")


def options(group: str, extra_dirs: tuple[Path, ...] = ()) -> tuple[str, ...]:
    """Sorted names one can write after `group=`, from `conf/` and a user's own folders."""
    folders = [base / group for base in (*extra_dirs, CONF)]
    return tuple(sorted({file.stem for folder in folders for file in folder.glob("*.yaml")}))


def recipes() -> tuple[str, ...]:
    """Sorted names one can write after `recipe=`."""
    return tuple(sorted(file.stem for file in RECIPES.glob("*.yaml")))


@cache
def read(file: Path) -> dict[str, Any]:
    """One YAML file as written (an empty file is an empty mapping)."""
    return yaml.load(file.read_text("utf-8"), Loader=_loader()) or {}


def load(group: str, name: str) -> dict[str, Any]:
    """The values `conf/<group>/<name>.yaml` gives to its own group, its in-group defaults merged."""
    values: dict[str, Any] = {}
    content = read(CONF / group / f"{name}.yaml")
    for parent in content.get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            values |= load(group, parent)
    own = content.get(group, content)
    return values | {key: value for key, value in own.items() if key != "defaults"}


def deepspeed_templates(own: tuple[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The DeepSpeed JSONs by stage, as they are written; `own` is a stage and a user's file for it.

    RequestError for a file that is not there or not JSON.
    """
    files = {file.stem: file for file in DEEPSPEED_CONFIGS.glob("*.json")}
    if own is not None:
        stage, name = own
        ours = "/" not in name and (DEEPSPEED_CONFIGS / name).is_file()  # ./zero2.json is the user's
        files[stage] = DEEPSPEED_CONFIGS / name if ours else Path(name).expanduser()
    return {stage: _json(file) for stage, file in files.items()}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        names = ", ".join(sorted(f.name for f in DEEPSPEED_CONFIGS.glob("*.json")))
        raise RequestError(Problem(f"deepspeed.config={file}: {error.strerror}", None, f"a path, or {names}")) from None
    except ValueError as error:
        raise RequestError(Problem(f"deepspeed.config={file} is not JSON: {error}")) from None
    if not isinstance(content, dict) or "zero_optimization" not in content:
        raise RequestError(Problem(f"deepspeed.config={file} has no zero_optimization", None, "see deepspeed_configs/"))
    return content


def _loader() -> type[yaml.SafeLoader]:
    """OmegaConf's loader: as Hydra reads, so that `2e-5` is a number here too."""
    from omegaconf._utils import get_yaml_loader

    loader: type[yaml.SafeLoader] = get_yaml_loader()
    return loader
