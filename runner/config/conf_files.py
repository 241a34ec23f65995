"""The catalogue of choices: files of `conf/` and `recipes/`, read without Hydra."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from runner.config import yaml_files
from runner.config.provenance import display_path
from runner.errors import Problem, RequestError
from runner.paths import CONF, RECIPES

GROUPS = ("model", "method", "hw", "deepspeed", "objective", "data", "where", "track")


def options(group: str, extra_dirs: tuple[Path, ...] = ()) -> tuple[str, ...]:
    """Sorted names one can write after `group=`, from `conf/` and a user's own folders."""
    folders = [base / group for base in (*extra_dirs, CONF)]
    return tuple(sorted({file.stem for folder in folders if os.path.isdir(folder) for file in folder.glob("*.yaml")}))


def recipes() -> tuple[str, ...]:
    """Sorted names one can write after `recipe=`."""
    return tuple(sorted(file.stem for file in RECIPES.glob("*.yaml")))


def dump_yaml(content: dict[str, object]) -> str:
    """YAML that `read` reads as the same values: texts such as `1e-5`, `no` and `010` are quoted."""
    from omegaconf._utils import get_omega_conf_dumper

    plain: type[yaml.Dumper] = get_omega_conf_dumper()

    class Quoting(plain):  # type: ignore[misc, valid-type]  # a base known at run time
        """YAML breaks lines at these characters, too, and would read them as a space; escaped they stay."""

    def quoted(dumper: yaml.Dumper, text: str) -> object:
        node: Any = plain.yaml_representers[str](dumper, text)
        if not {"\x85", "\u2028", "\u2029"}.isdisjoint(text):
            node.style = '"'
        return node

    Quoting.add_representer(str, quoted)
    return str(yaml.dump(content, Dumper=Quoting, sort_keys=False, allow_unicode=True, width=1000))


def broken_yaml_problem(error: yaml.YAMLError, place: str | None) -> Problem:
    """YAML that cannot be read; what to do about the two mistakes that its parser has no plain words for."""
    what = str(getattr(error, "problem", error))
    remedy = "indent with spaces: YAML takes no tabs" if "'\\t'" in what else None
    remedy = "leave one document: without the second ---" if "another document" in what else remedy
    return Problem(f"broken YAML: {what}", place, remedy)


def read_file(file: Path) -> dict[str, Any]:
    """One YAML file as written (an empty file is an empty mapping); RequestError for one that cannot be read."""
    return _read(file.absolute())  # a relative path is another file in another working directory


@cache
def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8-sig") as stream:
            content = yaml_files.load(stream) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{display_path(file)}:{mark.line + 1}" if mark else display_path(file)
        raise RequestError(broken_yaml_problem(error, place)) from None
    except UnicodeDecodeError as error:
        raise RequestError(Problem(f"a YAML file is not UTF-8: {error.reason}", display_path(file))) from None
    if not isinstance(content, dict):
        raise RequestError(Problem(f"{display_path(file)} holds no keys", None, "write key: value, one a line"))
    return content


def load_choice(
    group: str, name: str, extra_dirs: tuple[Path, ...] = (), above: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The values `<group>/<name>.yaml`, of `conf/` or a user's own folders, gives to its own group, its in-group
    defaults merged, those already `above` it left out."""
    values: dict[str, Any] = {}
    files = (base / group / f"{name}.yaml" for base in (*extra_dirs, CONF))
    content = read_file(next((file for file in files if os.path.isfile(file)), CONF / group / f"{name}.yaml"))
    for parent in content.get("defaults", []):
        if isinstance(parent, str) and parent not in ("_self_", name, *above):
            values |= load_choice(group, parent, extra_dirs, above | {name})
    own = content.get(group, content)
    return values | {key: value for key, value in own.items() if key != "defaults"}
