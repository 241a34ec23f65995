"""Which file a recipe is, and what is wrong with its defaults list: told with lines, before Hydra reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from runner import catalogue
from runner.errors import Problem, RequestError
from runner.paths import RECIPES
from runner.provenance import flat, shown
from runner.suggest import nearest, nearest_choice

_BASE = "begin it with: defaults: [config, _self_]"


def find(recipe: str, folders: tuple[Path, ...] = ()) -> Path:
    """The file behind `recipe=NAME`, of a user's own `folders` or a shipped one, or a path; RequestError for none."""
    file = Path(recipe).expanduser()
    own = (folder / f"{recipe.removesuffix('.yaml')}.yaml" for folder in folders)
    if not file.is_file() and (found := next((f for f in own if f.is_file()), None)):
        return found
    if recipe in catalogue.recipes():
        return RECIPES / f"{recipe}.yaml"
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        near = nearest(file.stem, catalogue.recipes())
        remedy = f"did you mean recipe={near}?" if near else "python -m runner list recipes shows them"
        raise RequestError(Problem(f"there is no recipe {recipe!r}", "command line", remedy))
    if file.name != f"{file.stem}.yaml" or file.stem == "config":  # Hydra reads .yaml only, and config is the main job
        name = "my_recipe" if file.stem == "config" else file.stem
        raise RequestError(Problem(f"a recipe cannot be called {file.name}", "command line", f"call it {name}.yaml"))
    return file


def problems_in(file: Path, folders: tuple[Path, ...]) -> list[Problem]:
    """Mistakes in the defaults list of a recipe, with a user's own `folders` of choices; YAMLError if it is broken."""
    with file.open(encoding="utf-8") as stream:  # a stream, so that an error knows the file's name
        node = yaml.compose(stream)
    if not isinstance(node, yaml.MappingNode):
        return [Problem(f"{shown(file)} is not a recipe: it holds no keys", None, _BASE)]
    entries = next((value for key, value in node.value if key.value == "defaults"), None)
    entries = entries.value if isinstance(entries, yaml.SequenceNode) else []
    if not any(isinstance(entry, yaml.ScalarNode) and entry.value != "_self_" for entry in entries):
        return [Problem(f"{shown(file)} builds on nothing: its defaults list does not name config", None, _BASE)]
    choices = [pair for entry in entries if isinstance(entry, yaml.MappingNode) for pair in entry.value]
    return [p for group, choice in choices for p in _problems_of_entry(group, choice, shown(file), folders)]


def written(file: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Choices of a recipe by group, and the dotted keys it sets, those of recipes it builds on included."""
    choices: dict[str, str] = {}
    keys: dict[str, Any] = {}
    content = catalogue.read(file.resolve())
    for entry in content.get("defaults") or []:
        if isinstance(entry, dict):
            choices |= {re.sub(r"^(override|optional)\s+", "", str(k)).lstrip("/"): str(v) for k, v in entry.items()}
        elif (base := base_of(file, str(entry))) is not None:
            below = written(base)
            choices, keys = below[0] | choices, below[1] | keys
    return choices, keys | dict(flat({k: v for k, v in content.items() if k != "defaults"}))


def base_of(file: Path, name: str) -> Path | None:
    """The recipe that an entry of a defaults list names: one beside `file`, or a shipped one."""
    found = (folder / f"{name.removesuffix('.yaml')}.yaml" for folder in (file.resolve().parent, RECIPES))
    return next((f for f in found if f.is_file() and f.resolve() != file.resolve()), None)


def no_choice(group: str, name: str, names: tuple[str, ...], place: str) -> Problem:
    """`group=name` where `names` are all there are."""
    near = nearest_choice(group, name, names)
    if meant := _meant(group, name):
        return Problem(f"there is no {group} {name!r}", place, f"write {meant}")
    remedy = f"did you mean {group}={near}?" if near else f"python -m runner list {group} shows all"
    return Problem(f"there is no {group} {name!r}", place, remedy)


def _meant(group: str, name: str) -> str | None:
    """What is no name of a choice and has one meaning: a Hub id, a file, a stage."""
    path = re.search(r"[/.]", name) is not None and not name.endswith((".yaml", ".yml"))
    if group == "model" and (path or Path(name).is_dir()):
        return f"model=hub model.id={name}"
    if group == "data" and path:
        of_hub = (
            re.fullmatch(r"[\w-]+/[\w.-]+", name) and "." not in name.rpartition("/")[2] and not Path(name).exists()
        )
        return f"data=hub data.id={name}" if of_hub else f"data=file data.path={name}"
    if group == "deepspeed" and name.endswith(".json"):
        return f"deepspeed=auto deepspeed.config={name}"
    if group == "deepspeed" and (found := re.fullmatch(r"(?:stage[_-]?|z)?([0-3])", name)):
        return f"deepspeed=zero{found[1]}" if found[1] != "0" else "deepspeed=none"
    if group == "hw" and name.isdigit():
        return f"hw.num_gpus={name}"
    return None


def _problems_of_entry(key: yaml.Node, choice: yaml.Node, file: str, folders: tuple[Path, ...]) -> Iterator[Problem]:
    """What is wrong with `override /group: choice`."""
    place = f"{file}:{key.start_mark.line + 1}"
    group = re.sub(r"^(override|optional)\s+", "", key.value).removeprefix("/").split("@")[0]
    if group.startswith("hydra/") or not isinstance(choice, yaml.ScalarNode):
        return
    names = catalogue.options(group, folders)
    if not names:
        near = nearest(group, catalogue.GROUPS)
        yield Problem(f"there is no group {group!r}", place, near and f"did you mean override /{near}?")
    elif choice.value not in names:
        yield no_choice(group, choice.value, names, place)
    elif group in catalogue.GROUPS and not key.value.startswith("override "):
        yield Problem(f"{group} is chosen twice: in config and here", place, f"write override /{group}: {choice.value}")
