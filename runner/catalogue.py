"""What there is to choose from: the files of `conf/` and `recipes/`, read without Hydra."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from runner.paths import CONF, RECIPES

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


def load(group: str, name: str, extra_dirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values `<group>/<name>.yaml`, of `conf/` or a user's own folders, gives to its own group, its in-group
    defaults merged."""
    values: dict[str, Any] = {}
    files = (base / group / f"{name}.yaml" for base in (*extra_dirs, CONF))
    content = read(next((file for file in files if file.is_file()), CONF / group / f"{name}.yaml"))
    for parent in content.get("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            values |= load(group, parent, extra_dirs)
    own = content.get(group, content)
    return values | {key: value for key, value in own.items() if key != "defaults"}


def _loader() -> type[yaml.SafeLoader]:
    """OmegaConf's loader: as Hydra reads, so that `2e-5` is a number here too."""
    from omegaconf._utils import get_yaml_loader

    loader: type[yaml.SafeLoader] = get_yaml_loader()
    return loader
